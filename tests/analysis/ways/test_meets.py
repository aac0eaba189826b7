"""Where rows match columns: the map is the brute-force one, and its cost follows what meets, not the area."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.classify import by_groups, by_lines, by_tiles, classify
from maskflash.analysis.ways import meets, tiles
from maskflash.analysis.ways.separate import matchings
from maskflash.analysis.ways.tiles import Tiles
from maskflash.errors import MaskIndexError

LENGTH = 48
IDS = st.lists(st.integers(-1, 9), min_size=2 * LENGTH, max_size=2 * LENGTH).map(lambda x: torch.tensor(x).view(2, -1))
PREDICATES = {
    "equal": lambda x, y: lambda b, h, q, kv: x[0, q] == x[0, kv],
    "causal": lambda x, y: lambda b, h, q, kv: x[0, q] == x[0, kv] and q >= kv,
    "causal first": lambda x, y: lambda b, h, q, kv: q >= kv and kv == kv and x[0, kv] == x[0, q],
    "gaps of the row": lambda x, y: lambda b, h, q, kv: (x[0, q] == x[0, kv]) & (x[0, q] >= 0),
    "gaps of the column": lambda x, y: lambda b, h, q, kv: (x[0, q] == x[0, kv]) & (x[0, kv] != -1) & (q - kv < 9),
    "by batch row": lambda x, y: lambda b, h, q, kv: x[b, q] == x[b, kv] and x[b, q] >= 0,
    "by head": lambda x, y: lambda b, h, q, kv: x[h, q] == y[b, kv],
    "two tables": lambda x, y: lambda b, h, q, kv: x[0, q] == y[0, kv],
    "two equalities": lambda x, y: lambda b, h, q, kv: x[0, q] == x[0, kv] and y[0, q] == y[0, kv] and q >= kv,
    "either": lambda x, y: lambda b, h, q, kv: (x[0, q] == x[0, kv] or y[0, q] == y[0, kv]) and q >= kv,
    "neither": lambda x, y: lambda b, h, q, kv: not (x[0, q] == x[0, kv] and x[0, q] > 3),
    "differ": lambda x, y: lambda b, h, q, kv: x[0, q] != x[0, kv],
    "exactly one": lambda x, y: lambda b, h, q, kv: (x[0, q] == x[0, kv]) ^ (q >= kv),
    "global": lambda x, y: lambda b, h, q, kv: (x[0, q] == x[0, kv]) | (kv < 5) | (x[0, q] == 3),
    "rearranged": lambda x, y: lambda b, h, q, kv: x[0, q] - x[0, kv] == y[0, kv] - 2,
    "a condition used twice": lambda x, y: (
        lambda b, h, q, kv: (x[0, q] == x[0, kv]) & (x[0, q] >= 3) | (x[0, q] >= 3) & (q < kv)
    ),
    "a branch": lambda x, y: lambda b, h, q, kv: (x[0, q] == x[0, kv]) if q >= kv else (y[0, q] == 2),
    "bools": lambda x, y: lambda b, h, q, kv: (x[0, q] > 3) == (y[0, kv] > 3),
    "a row in another way": lambda x, y: lambda b, h, q, kv: x[0, q] == kv % 7,
}


def decided(mask, length):
    return {kind: n for kind, n in mf.compile(mask).explain(length, length).to_dict()["decided"].items() if n}


def brute_force(dense, block_size):
    bq, bkv = block_size
    batch, heads, q_len, kv_len = dense.shape
    kinds = torch.zeros(batch, heads, -(-q_len // bq), -(-kv_len // bkv), dtype=torch.int8)
    for i in range(kinds.shape[2]):
        for j in range(kinds.shape[3]):
            tile = dense[:, :, i * bq : (i + 1) * bq, j * bkv : (j + 1) * bkv].flatten(2)
            kinds[:, :, i, j] = tile.any(2).to(torch.int8) + tile.all(2).to(torch.int8)
    return kinds


@pytest.mark.parametrize("name", PREDICATES)
@settings(max_examples=15)
@given(st.data())
def test_every_tile_is_what_all_its_pairs_say(name, data):
    mask = mf.mask(PREDICATES[name](data.draw(IDS), data.draw(IDS)))
    q_len, kv_len, *block_size = (data.draw(st.integers(1, most)) for most in (LENGTH, LENGTH, 20, 20))
    offset = data.draw(st.sampled_from([0, LENGTH - q_len, torch.tensor([0, LENGTH - q_len])]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meets, "_DENSE", data.draw(st.sampled_from([0.05, 1.0])))
        patch.setattr(meets, "_AT_ONCE", data.draw(st.sampled_from([1, 7, 1 << 20])))
        patch.setattr(tiles, "_DIVISION", data.draw(st.sampled_from([2, 3, 8])))
        patch.setattr(tiles, "_SQUARES", data.draw(st.sampled_from([1, 4, 64])))
        problem = mask.at(q_len, kv_len, batch=2, heads=2, q_offset=offset).tiled(tuple(block_size))
        found = classify(problem, (by_lines, by_groups, by_tiles)).block_map.kinds()
    expected = brute_force(mask.dense(q_len, kv_len, batch=2, heads=2, q_offset=offset), block_size)
    assert torch.equal(found.expand_as(expected), expected)


@pytest.mark.parametrize("name", sorted(set(PREDICATES) - {"differ", "neither"}))
def test_what_is_matched_is_found(name):
    x = torch.zeros(2, 4, dtype=torch.long)
    assert matchings(mf.mask(PREDICATES[name](x, x)).traced({}).expr)


def short(length, longest, seed=0, **kinds):
    """Runs of up to `longest` tokens; ids in any order, of which some may come again or be -1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (length,), generator=generator)
    ids = torch.randperm(length, generator=generator)
    ids = ids % kinds.get("again", length)
    ids[torch.rand(length, generator=generator) < kinds.get("gaps", 0)] = -1
    return ids.repeat_interleave(lengths)[:length].contiguous()


def same_document(doc):
    return lambda b, h, q, kv: doc[q] == doc[kv]


@pytest.mark.parametrize("kinds", [{}, {"gaps": 0.3}, {"again": 500}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_short_documents_in_any_order_need_no_pair(kinds, causal):
    doc = short(4096, 6, **kinds)

    def same(b, h, q, kv):
        return doc[q] == doc[kv] and doc[q] >= 0 and (q >= kv or not causal)

    edges = 32 if causal else 0  # tiles on the diagonal, which compare more than documents
    assert decided(same, 4096).get("elements", 0) <= edges
    assert torch.equal(
        mf.mask(same).block_map(4096, 4096).kinds(), brute_force(mf.mask(same).dense(4096, 4096), (128, 128))
    )


def test_its_cost_follows_the_length(monkeypatch):
    """Boxes that are bounded: sixteen times as many tiles, four times as long."""
    boxes = []
    bound = tiles.bounds
    monkeypatch.setattr(
        tiles,
        "bounds",
        lambda expr, inputs, at, *rest: boxes.append(at["q"].lo + at["kv"].lo) or bound(expr, inputs, at, *rest),
    )
    counts = []
    for length in (1 << 15, 1 << 17):
        boxes.clear()
        mf.mask(same_document(short(length, 6))).block_map(length, length)
        counts.append(sum(box.numel() for box in boxes))
    assert counts[1] < 6 * counts[0]


def test_the_pairs_that_match_are_counted():
    doc = short(500, 6, again=60, gaps=0.2)
    mask = mf.mask(lambda b, h, q, kv: doc[q] == doc[kv] and doc[q] >= 0)
    problem = mask.at(500, 490).tiled((10, 7))
    (found,) = meets.find_meets(problem, Tiles(problem).undecided)
    counts = mask.dense(500, 490)[0, 0].view(50, 10, 70, 7).sum((1, 3)).flatten()
    assert torch.equal(found.tiles, counts.nonzero()[:, 0])
    assert torch.equal(found.pairs, counts[counts > 0])


def test_what_meets_everywhere_is_left_to_samples():
    for predicate in (lambda b, h, q, kv: q % 3 == kv % 3, lambda b, h, q, kv: q % 64 == kv % 64):
        problem = mf.mask(predicate).at(4096, 4096).tiled((128, 128))
        assert not meets.find_meets(problem, Tiles(problem).undecided)


def test_a_look_up_out_of_range_is_an_error_wherever_it_is_reached():
    doc, few = short(4096, 6), torch.zeros(4000)
    for hidden in (
        lambda b, h, q, kv: (doc[q] == doc[kv]) & (few[kv] == 0),
        lambda b, h, q, kv: few[kv] == 0 and doc[q] == doc[kv],
        lambda b, h, q, kv: doc[q] == doc[kv + 1],
    ):
        with pytest.raises(MaskIndexError):
            mf.mask(hidden).block_map(4096, 4096)
    guarded = mf.mask(lambda b, h, q, kv: kv < 4000 and doc[q] == doc[kv] and few[kv] == 0)
    assert torch.equal(guarded.block_map(4096, 4096).kinds(), brute_force(guarded.dense(4096, 4096), (128, 128)))
