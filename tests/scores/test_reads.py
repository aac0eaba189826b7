"""What visible pairs look up must be there, and only that; it is found without looking at pairs where bounds tell."""

import pytest
import torch

import maskflash as mf
from maskflash.analysis.problem import Problem
from maskflash.scores import reads
from maskflash.testing import Shape, assert_matches_dense

N = 40
SHAPE = Shape(2, 2, 1, N, N, 8, 8)
SHORT = torch.linspace(-1, 1, 30)
FULL = torch.linspace(-1, 1, N)
INDEX = torch.arange(N) % 30
CAUSAL = mf.causal()


def first_30(b, h, q, kv):
    return q < 30 and kv < 30


@pytest.mark.parametrize(
    ("score", "mask"),
    [
        (lambda score, b, h, q, kv: score + SHORT[q], mf.mask(first_30)),
        (lambda score, b, h, q, kv: score * SHORT[kv], mf.mask(first_30)),
        (lambda score, b, h, q, kv: score + FULL[q - kv], CAUSAL),  # of the future: negative, but from the end
        (lambda score, b, h, q, kv: score + SHORT[q - kv], mf.sliding_window(29)),
        (lambda score, b, h, q, kv: score + FULL[-1 - q], CAUSAL),
        (lambda score, b, h, q, kv: score + SHORT[INDEX[q]] * SHORT[INDEX[kv]], CAUSAL),  # nested
        (lambda score, b, h, q, kv: torch.where((q < 30) & (kv < 30), score + SHORT[q], score), mf.mask(first_30)),
        (lambda score, b, h, q, kv: score + SHORT[q] if q < 30 else score, CAUSAL),  # guarded by itself
        (lambda score, b, h, q, kv: score + SHORT[max(0, min(kv - q + 29, 29))], CAUSAL),
        (lambda score, b, h, q, kv: score + FULL[kv // (q - kv)], mf.mask(lambda b, h, q, kv: q > kv)),
        (lambda score, b, h, q, kv: score + FULL[q % max(1, q - kv)], CAUSAL),
    ],
    ids=range(11),
)
def test_what_only_hidden_pairs_would_look_up_is_no_error(score, mask):
    assert_matches_dense(mask, SHAPE, score=score, block_size=16)


BATCHED = torch.randn(1, N)
PER_HEAD = torch.randn(1, 2 * N)


@pytest.mark.parametrize(
    ("score", "mask", "code", "index", "pair"),
    [
        (lambda score, b, h, q, kv: score + SHORT[q], CAUSAL, "SHORT[q]", "30", {"q": 30}),
        (lambda score, b, h, q, kv: score * SHORT[kv], CAUSAL, "SHORT[kv]", "30", {"kv": 30}),
        (lambda score, b, h, q, kv: score + SHORT[q - kv], mf.sliding_window(30), "SHORT[q - kv]", "30", {}),
        (lambda score, b, h, q, kv: score + SHORT[q - kv - 31], CAUSAL, "SHORT[q - kv - 31]", "-31", {}),
        (lambda score, b, h, q, kv: score + SHORT[-1 - q], CAUSAL, "SHORT[-1 - q]", "-31", {"q": 30}),
        (lambda score, b, h, q, kv: score + SHORT[INDEX[q] + 1], CAUSAL, "SHORT[INDEX[q] + 1]", "30", {"q": 29}),
        (lambda score, b, h, q, kv: score + SHORT[q] if q < 31 else score, CAUSAL, "SHORT[q]", "30", {"q": 30}),
        (lambda score, b, h, q, kv: score + torch.where(q < 30, SHORT[q], 0.0), CAUSAL, None, None, None),
        (lambda score, b, h, q, kv: score + FULL[kv // (q - kv)], CAUSAL, "kv // (q - kv)", None, {}),
        (lambda score, b, h, q, kv: torch.where(score > 0, SHORT[q], score), CAUSAL, "SHORT[q]", "30", {"q": 30}),
        (lambda score, b, h, q, kv: SHORT[q] if score > 0 else score, CAUSAL, "SHORT[q]", "30", {"q": 30}),
        (lambda score, b, h, q, kv: score + BATCHED[b, q], CAUSAL, "BATCHED[b, q]", "(1, 0)", {"b": 1}),
        (lambda score, b, h, q, kv: score + PER_HEAD[h, q], CAUSAL, "PER_HEAD[h, q]", "(1, 0)", {"h": 1}),
    ],
    ids=range(13),
)
def test_a_visible_pair_that_looks_beyond_is_told(score, mask, code, index, pair):
    q, k, v = SHAPE.tensors(torch.float32)
    attn = mf.compile(mask, score=score, block_size=16)
    if code is None:  # a guard, as in Python: what is not chosen isn't looked up
        attn(q, k, v)
        return
    with pytest.raises(mf.MaskIndexError) as caught:
        attn(q, k, v)
    message = str(caught.value)
    assert f"{__file__}:" in message
    assert f'"{code}"' in message
    if index is not None:
        assert f"reads index {index} of a table of shape" in message
    for name, value in pair.items():
        assert f"{name}={value}" in message
    with pytest.raises(mf.MaskIndexError):  # told again, not taken from what is kept
        attn(q, k, v)


def test_offsets_move_what_is_looked_up():
    q, k, v = (x[:, :, :10] for x in SHAPE.tensors(torch.float32))
    attn = mf.compile(mf.full(), score=lambda score, b, h, q, kv: score + SHORT[q] * SHORT[kv])
    attn(q, k, v, q_offset=20, kv_offset=20)
    with pytest.raises(mf.MaskIndexError, match="reads index 30"):
        attn(q, k, v, q_offset=21, kv_offset=20)
    attn(q, k, v, q_offset=torch.tensor([3, 20]))
    with pytest.raises(mf.MaskIndexError, match=r"reads index 30 .*b=1"):
        attn(q, k, v, kv_offset=torch.tensor([3, 21]))
    short = Shape(2, 2, 1, 10, 10, 8, 8)
    score = lambda score, b, h, q, kv: score + SHORT[q] * SHORT[kv]  # noqa: E731
    assert_matches_dense(mf.full(), short, score=score, q_offset=20, kv_offset=torch.tensor([3, 20]))


def test_tables_that_arguments_give_are_checked_anew():
    q, k, v = SHAPE.tensors(torch.float32)
    attn = mf.compile(CAUSAL, score=lambda score, b, h, q, kv, *, t, at: score + t[at[q]])
    attn(q, k, v, t=SHORT, at=INDEX)
    with pytest.raises(mf.MaskIndexError, match="reads index 29"):
        attn(q, k, v, t=SHORT[:29], at=INDEX)
    index = INDEX.clone()
    attn(q, k, v, t=SHORT, at=index)
    index[7] = 99
    with pytest.raises(mf.MaskIndexError, match=r"reads index 99 .*q=7"):
        attn(q, k, v, t=SHORT, at=index)


def test_an_empty_table_or_call():
    empty = torch.empty(0)
    q, k, v = SHAPE.tensors(torch.float32)
    score = lambda score, b, h, q, kv: score + empty[q]  # noqa: E731
    with pytest.raises(mf.MaskIndexError):
        mf.attention(q, k, v, score=score)
    assert mf.attention(q[:, :, :0], k, v, score=score).shape == (2, 2, 0, 8)
    assert not mf.attention(q, k[:, :, :0], v[:, :, :0], score=score).any()


# ------------------------------------------------------------------------------------------------------------ costs


@pytest.fixture
def pairs_looked_at(monkeypatch):
    """How many pairs are evaluated one by one."""
    found = []
    real = Problem.visible

    def visible(self, *args):
        result = real(self, *args)
        found.append(result.numel())
        return result

    monkeypatch.setattr(Problem, "visible", visible)
    return found


MANY = 131_072
LENGTHS = [MANY // 2 - 5, MANY // 2 + 5]
BUCKET = torch.arange(MANY) // 1000


@pytest.mark.parametrize(
    ("score", "mask"),
    [
        (lambda score, b, h, q, kv, *, t: score + t[q - kv], CAUSAL),
        (lambda score, b, h, q, kv, *, t: score + t[kv - q + MANY - 1], CAUSAL),
        (lambda score, b, h, q, kv, *, t: score + t[q] + t[kv], CAUSAL),
        (lambda score, b, h, q, kv, *, t: score + t[min(max(kv - q, -500), 500) + 500], CAUSAL),
        (lambda score, b, h, q, kv, *, t: score + t[BUCKET[q]], CAUSAL),
        (lambda score, b, h, q, kv, *, t: score + t[q - kv], mf.causal() & mf.document(LENGTHS)),
        (lambda score, b, h, q, kv, *, t: score + t[(q - kv) // 7], mf.sliding_window(4096)),
    ],
    ids=range(7),
)
def test_bounds_and_formulas_decide_without_pairs(score, mask, pairs_looked_at):
    bound = mf.score(score)
    table = torch.zeros(MANY)
    at = mask.at(MANY, MANY)
    slots = bound.slots({"t": table})[0]
    inputs = slots.traced.filled(bound.reading().slots).bind({"t": table})
    reads.check(at.tiled((128, 128)), slots.expr, inputs)
    assert sum(pairs_looked_at) < 64 * 128 * 128  # of 17 billion


def test_a_failing_look_up_among_many_tokens_is_found_too():
    q, k, v = (torch.zeros(1, 1, MANY // 8, 8) for _ in range(3))
    table = torch.zeros(MANY // 8 - 1)
    with pytest.raises(
        mf.MaskIndexError, match=rf"reads index {MANY // 8 - 1} of a table .* q={MANY // 8 - 1}, kv=0\b"
    ):
        mf.attention(q, k, v, CAUSAL, score=lambda score, b, h, q, kv: score + table[q - kv])
