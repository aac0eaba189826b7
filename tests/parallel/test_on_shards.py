"""Ranks that each hold a shard compute what one process does, send what the plan says, and raise errors together."""

import re

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
pytest.importorskip("torch.distributed")
import maskflash as mf  # noqa: E402
from tests.parallel import ranks_do  # noqa: E402
from tests.parallel.on_shards import LENGTH, MASKS, plans  # noqa: E402
from tests.parallel.worlds import in_processes  # noqa: E402


def all_of_it(rank):
    return ranks_do.everything(rank), ranks_do.traffic(rank), ranks_do.mistakes(rank)


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    """What each of 2 and of 3 processes has found."""
    found = in_processes(request.param, all_of_it)
    assert sorted(found) == list(range(request.param))
    return found


def test_results_and_gradients_are_those_of_one_process(world):
    for rank, (distances, _, _) in world.items():
        assert len(distances) > 30
        assert {name: far for name, far in distances.items() if not far <= 1} == {}, rank


def test_bytes_are_those_of_keys_that_a_mask_shows_and_others_hold(world):
    """Counted by the dense mask: forward k and v in float32, backward these once more, and their gradients back.

    Ranks have compared what they counted with what plans say already.
    """
    token = 2 * 2 * (8 + 5) * 4  # batch rows, key heads, numbers of k and v, bytes
    of_kind = plans(len(world))
    for rank, (_, traffic, _) in world.items():
        for (name, kind), (forward, backward) in traffic.items():
            mask, args = MASKS[name]
            seen = mf.mask(mask).dense(LENGTH, LENGTH, batch=2, heads=4, **args).any(0).any(0)
            holder = torch.zeros(LENGTH, dtype=torch.int64)
            for who, ranges in enumerate(of_kind[kind].shards):
                for start, stop in ranges:
                    holder[start:stop] = who
            needs = torch.stack([seen[holder == who].any(0) for who in range(len(world))])
            received = int((needs[rank] & (holder != rank)).sum()) * token
            sent = int(needs[:, holder == rank].sum() - needs[rank, holder == rank].sum()) * token
            assert forward == [received, sent], (name, kind)
            assert backward == [received + sent] * 2, (name, kind)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        (
            "mask",
            "ArgumentError",
            r"the mask is causal\(\) \(\w+\) on ranks? 0.*, full\(\) \(\w+\) on rank \d; expected",
        ),
        (
            "number",
            "ArgumentError",
            r"the mask is sliding_window\(3\) \(\w+\) on rank 0, sliding_window\(4\) .* rank 1",
        ),
        (
            "shard",
            "ArgumentError",
            r"on rank 0: q has \d+ tokens, expected the \d+ that rank 0 of the plan holds; plan.sh",
        ),
        (
            "dtype",
            "ArgumentError",
            r"the dtype is torch.float64 on ranks? 0.*, torch.float32 on rank \d; expected the same",
        ),
        ("shape", "ArgumentError", r"the shape is .*\(2, 4, 2, 8, 5\) on ranks? 0.*\(1, 4, 2, 8, 5\) on rank \d"),
        ("table", "ArgumentError", r"what its tables hold is \w+ on ranks? 0.*, \w+ on rank \d"),
        ("short table", "MaskIndexError", r"on rank \d: .*ids"),
        ("plan", "ArgumentError", r"the plan is 101 tokens on \d ranks \(\w+\) on rank 0, 101 tokens on \d ranks"),
        (
            "world size",
            "ArgumentError",
            r"on rank \d: .*group has \d ranks, expected the plan's \d; make a plan of world",
        ),
        ("seed", "ArgumentError", r"dropout is 0.5 with seed 0 on rank 0, 0.5 with seed 1 on rank 1"),
        ("gradients", "ArgumentError", r"what asks for gradients is q, k, v on rank 0, nothing on rank"),
        ("score", "ArgumentError", r"the score is softcap\(3\) \(\w+\) on rank 0, softcap\(4\)"),
        ("sinks", "ArgumentError", r"on rank \d: sinks have shape \(3,\), expected a dense \(4,\)"),
        ("no sinks", "ArgumentError", r"sinks is none on ranks? 0.*, torch.float32 on rank \d"),
        ("a bug", "ArgumentError", r"on rank \d: ZeroDivisionError: of the user's own"),
    ],
)
def test_every_rank_raises_the_same_error(world, name, kind, said):
    errors = {mistakes.get(name) for _, _, mistakes in world.values()}
    ((found, text),) = errors
    assert found == kind
    assert re.search(f"^parallel attention: {said}", text, re.DOTALL), text


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_rank_that_dies_is_an_error_of_torch_s_on_the_others(when):
    found = in_processes(2, ranks_do.dies, when, exit_codes=[0, 3])
    assert "closed by peer" in found[0] or "gloo" in found[0]
