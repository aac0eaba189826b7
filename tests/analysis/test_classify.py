"""Classification equals brute force, however the lattice is cut and whatever settles a tile."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.classify import (
    WAYS,
    by_columns,
    by_ends,
    by_groups,
    by_lines,
    by_pairs,
    by_parts,
    by_tiles,
    classify,
)
from maskflash.analysis.facts import Facts
from maskflash.analysis.ways import tiles
from maskflash.testing import masks
from tests.predicates import affine_masks

SIZES = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))


SHUFFLED = torch.randperm(1280, generator=torch.Generator().manual_seed(0))


def brute_force(dense, block_size):
    """The kind of every tile, from all pairs."""
    bq, bkv = (block_size, block_size) if isinstance(block_size, int) else block_size
    batch, heads, q_len, kv_len = dense.shape
    kinds = torch.zeros(batch, heads, -(-q_len // bq), -(-kv_len // bkv), dtype=torch.int8)
    for i in range(kinds.shape[2]):
        for j in range(kinds.shape[3]):
            tile = dense[:, :, i * bq : (i + 1) * bq, j * bkv : (j + 1) * bkv].flatten(2)
            kinds[:, :, i, j] = tile.any(2).to(torch.int8) + tile.all(2).to(torch.int8)
    return kinds


def problem_of(mask, q_len, kv_len, block_size, batch=2, heads=2):
    block_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    return mask.at(q_len, kv_len, batch=batch, heads=heads).tiled(block_size)


@settings(max_examples=300)
@given(masks(), st.integers(0, 64), st.integers(0, 64), SIZES, st.integers(0, 3), st.sampled_from([2, 3, 8]), st.data())
def test_every_tile_is_what_all_its_pairs_say(mask, q_len, kv_len, block_size, parts, division, data):
    with pytest.MonkeyPatch.context() as patch:
        left_out = data.draw(st.sets(st.sampled_from(WAYS[:-1])), "what these decide, by other ways")
        left_out = left_out if q_len and kv_len else set()
        few = data.draw(st.booleans(), "columns and conditions before tiles")
        ways = [way for way in (*WAYS[:-1], *(by_columns, by_parts) * few, WAYS[-1]) if way not in left_out]
        patch.setattr(tiles, "_DIVISION", division)
        patch.setattr(tiles, "_SQUARES", 4**parts)  # so that there are many levels, and seams
        patch.setattr(tiles, "_PAIRS_AT_ONCE", 1 << (5 * parts))
        found = classify(problem_of(mask, q_len, kv_len, block_size), ways).block_map.kinds()
    expected = brute_force(mask.dense(q_len, kv_len, batch=2, heads=2), block_size)
    assert torch.equal(found.expand_as(expected), expected)


@given(masks(max_len=96), st.integers(0, 32), st.lists(st.integers(0, 32), min_size=2, max_size=2), SIZES)
def test_offsets_shift_the_rows(mask, offset, offsets, block_size):
    offsets = torch.tensor(offsets)
    for value in (offset, offsets, offsets.to(torch.int32)):
        dense = mask.dense(40, 64, batch=2, heads=2, q_offset=value)
        found = mask.block_map(40, 64, batch=2, heads=2, block_size=block_size, q_offset=value)
        expected = brute_force(dense, block_size)
        assert torch.equal(found.kinds().expand_as(expected), expected)
        for b in range(2):
            rows = int(offsets[b]) if isinstance(value, torch.Tensor) else offset
            shifted = mask.dense(rows + 40, 64, batch=2, heads=2)[b, :, rows:]
            assert torch.equal(dense[b], shifted)


OFFSETS = st.one_of(st.integers(0, 24), st.lists(st.integers(0, 24), min_size=2, max_size=2).map(torch.tensor))
ALONE = [by_pairs, by_lines, by_ends, by_groups, by_columns, by_parts, partial(by_tiles, otherwise=())]


@settings(max_examples=200)
@given(st.one_of(masks(), affine_masks()), st.integers(1, 32), st.integers(1, 32), OFFSETS, OFFSETS, SIZES)
def test_every_way_honours_both_offsets(mask, q_len, kv_len, q_offset, kv_offset, block_size):
    problem = replace(problem_of(mask, q_len, kv_len, block_size), q_offset=q_offset, kv_offset=kv_offset)
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.arange(2).view(2, 1, 1)
    q, kv = (
        tokens + (offset.view(2, 1, 1, 1) if isinstance(offset, torch.Tensor) else offset)
        for tokens, offset in ((torch.arange(q_len)[:, None], q_offset), (torch.arange(kv_len), kv_offset))
    )
    bits = replace(problem, q_offset=0, kv_offset=0).visible(b, h, q, kv).expand(2, 2, q_len, kv_len)
    expected = brute_force(bits, block_size)
    facts = Facts(problem)
    for way in ALONE:
        found = way(facts)
        if found is not None:
            assert torch.equal(found.block_map.kinds().expand_as(expected), expected), way
    own = bits[: problem.shape[0], : problem.shape[1]]
    for rows, seen in ((facts.rows, own), (facts.columns, own.transpose(2, 3))):
        if rows is not None:
            place = torch.arange(seen.shape[3])
            told = ((place >= rows.start[..., None]) & (place < rows.stop[..., None])).any(0)
            assert torch.equal(rows.count, seen.sum(-1))
            assert torch.equal(told[rows.told], seen[rows.told])
            assert bool((told | ~seen).all())


@pytest.mark.parametrize(
    ("predicate", "batch", "heads"),
    [
        (lambda b, h, q, kv: q >= kv, 1, 1),
        (lambda b, h, q, kv: q >= kv + b, 3, 1),
        (lambda b, h, q, kv: q >= kv + h, 1, 4),
        (lambda b, h, q, kv: q + b >= kv + h, 3, 4),
        (lambda b, h, q, kv: q + b - b * 1 >= kv, 3, 1),
    ],
)
def test_the_map_has_rows_and_heads_only_where_the_mask_looks_at_them(predicate, batch, heads):
    assert mf.mask(predicate).block_map(64, 64, batch=3, heads=4).shape[:2] == (batch, heads)


def decided(mask, q_len):
    return {kind: n for kind, n in mf.compile(mask).explain(q_len, q_len).to_dict()["decided"].items() if n}


def test_what_settles_a_tile():
    """Formulas, else bounds off the diagonal and samples on it, and elements where samples see nothing."""
    assert decided(mf.causal(), 1024) == {"formula": 64}
    assert decided(mf.mask(lambda b, h, q, kv: q * 1.0 >= kv), 1024) == {"bounds": 56, "samples": 8}
    lonely = mf.mask(lambda b, h, q, kv: (q % 128 == 77) & (kv % 128 == 33))
    assert decided(lonely, 1280) == {"groups": 100}
    assert lonely.block_map(1280, 1280).counts == {"full": 0, "partial": 100, "skip": 0}
    assert decided(mf.mask(lambda b, h, q, kv: SHUFFLED[q] == SHUFFLED[kv] + 1), 1280).keys() == {"samples"}
    scattered = mf.mask(lambda b, h, q, kv: SHUFFLED[q] - SHUFFLED[kv] > 1270)
    assert decided(scattered, 1280).keys() == {"bounds", "samples", "elements"}


def test_large_tiles_are_evaluated_a_few_rows_at_a_time(monkeypatch):
    mask = mf.mask(lambda b, h, q, kv: (q * 7 + kv * kv) % 1000 != 3)
    dense = mask.dense(150, 90)
    monkeypatch.setattr(tiles, "_PAIRS_AT_ONCE", 200)
    monkeypatch.setattr(tiles, "_SAMPLES", ())
    for block_size in ((64, 32), (150, 90), (16, 300)):
        assert torch.equal(mask.block_map(150, 90, block_size=block_size).kinds(), brute_force(dense, block_size))


def test_what_was_evaluated_for():
    """explain() names the condition that kept columns from being cut, with its source line."""

    def told(predicate):
        return mf.compile(predicate).explain(1280, 1280).to_dict()["evaluated_for"]

    hashed = told(lambda b, h, q, kv: q >= kv and (q - kv) * (q + 1) % 4096 != 4095)
    assert "% 4096) != 4095\nin <lambda> (" in hashed and "test_classify.py" in hashed
    assert told(lambda b, h, q, kv: SHUFFLED[q] - SHUFFLED[kv] > 1270).startswith("rows whose values go up and down")
    assert told(mf.causal()) is None
    assert told(lambda b, h, q, kv: (q - kv) % 3 == 0) is None  # samples see it


def test_samples_see_what_is_spread():
    """A mask that is visible here and there in every tile needs no tile evaluated."""
    assert decided(mf.mask(lambda b, h, q, kv: (q * 7 + kv * 13) % 29 < 3), 2048) == {"samples": 256}


def test_bounds_settle_squares_of_tiles(monkeypatch):
    """What is bounded follows the boundary, not the area."""
    boxes = []
    bound = tiles.bounds
    monkeypatch.setattr(
        tiles,
        "bounds",
        lambda expr, inputs, at, *rest: boxes.append(at["q"].lo + at["kv"].lo) or bound(expr, inputs, at, *rest),
    )
    counts = {}
    for q_len in (1 << 15, 1 << 17):
        boxes.clear()
        mf.mask(lambda b, h, q, kv: q * 1.0 >= kv).block_map(q_len, q_len)
        counts[q_len] = sum(box.numel() for box in boxes)
    assert counts[1 << 15] < (1 << 15 >> 7) ** 2 / 2 and counts[1 << 17] < 5 * counts[1 << 15]


BASES = st.sampled_from([0, 2**61, 2**62, 2**63 - 100, -(2**61), -(2**62), 100 - 2**63])


@given(BASES, BASES, st.integers(-40, 40), SIZES, st.data())
def test_numbers_near_the_ends_of_64_bits_are_as_torch_has_them(base, other, near, block_size, data):
    ids = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=40, max_size=40))) + base
    base, other = base + near, other - near
    predicate = data.draw(
        st.sampled_from(
            [
                lambda b, h, q, kv: (q - base) - (kv - other) <= 4,
                lambda b, h, q, kv: abs((q - base) - (kv - base)) < 9,
                lambda b, h, q, kv: (q - base) // 8 == (kv - base) // 8,
                lambda b, h, q, kv: (ids[q] - ids[kv] <= 1) & (q >= kv),
                lambda b, h, q, kv: (ids[q] - kv) + (ids[q] - kv) + (ids[q] - kv) > other,
                lambda b, h, q, kv: (ids[q] - ids[kv]) + (ids[q] - ids[kv]) + (ids[q] - ids[kv]) == 3 * (q - kv),
                lambda b, h, q, kv: min(ids[q], kv + base) - max(ids[kv], q + base) > 2,
            ]
        )
    )
    mask = mf.mask(predicate)
    found = mask.block_map(40, 40, block_size=block_size).kinds()
    assert torch.equal(found, brute_force(mask.dense(40, 40), block_size))


def test_terms_are_brought_together_only_where_their_sum_fits_64_bits():
    ids = torch.arange(40) // 8 + 2**62 - 20  # twice that, and 3 * q, crosses 2**63
    mask = mf.mask(lambda b, h, q, kv: (ids[q] - ids[kv]) + (ids[q] - ids[kv]) <= 3 * kv - 3 * q)
    found = classify(problem_of(mask, 10, 40, 4), (by_columns, *WAYS)).block_map
    assert torch.equal(found.kinds(), brute_force(mask.dense(10, 40), 4))


def test_large_numbers_cost_what_small_ones_do():
    base = 2**61 + 5
    ids = torch.arange(2048) // 100 + base
    assert decided(mf.mask(lambda b, h, q, kv: (q - base) - (kv - base) <= 64), 2048) == {"formula": 256}
    assert decided(mf.mask(lambda b, h, q, kv: (q - base) - (kv - base) <= 64 and q >= kv), 2048) == {"formula": 256}
    assert decided(mf.mask(lambda b, h, q, kv: abs(ids[q] - ids[kv]) <= 1), 2048) == {"intervals": 256}


ROUGH = torch.arange(512) * 7 % 11  # changes at every row


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, h, q, kv: ROUGH[q] >= 3,
        lambda b, h, q, kv: ROUGH[q] >= 3 and q >= kv,
        lambda b, h, q, kv: ROUGH[q] < 3 or q >= kv,
        lambda b, h, q, kv: ROUGH[q] < 3 or q // 100 == kv // 100,
        lambda b, h, q, kv: ROUGH[q] >= 3 and q // 100 == kv // 100,
    ],
)
@pytest.mark.parametrize("block_size", [(16, 16), (16, 32), (10, 3)])
def test_conditions_of_rows_cost_what_those_of_columns_cost(predicate, block_size):
    """Neither goes through tiles, and each map is the other's, turned over."""
    turned = mf.mask(lambda b, h, q, kv: predicate(b, h, kv, q))
    ways = by_lines, by_groups, by_columns
    rows = classify(problem_of(mf.mask(predicate), 500, 300, block_size, 1, 1), ways).block_map
    columns = classify(problem_of(turned, 300, 500, block_size[::-1], 1, 1), ways).block_map
    assert torch.equal(rows.kinds(), columns.kinds().transpose(2, 3))
    assert torch.equal(rows.kinds(), brute_force(mf.mask(predicate).dense(500, 300), block_size))
    for x, y in ((rows.rows, columns.columns), (rows.columns, columns.rows)):
        assert all(map(torch.equal, x.tensors, y.tensors))


def test_an_empty_side_gives_an_empty_map():
    for q_len, kv_len in ((0, 5), (5, 0), (0, 0)):
        found = mf.causal().block_map(q_len, kv_len)
        assert found.counts == {"full": 0, "partial": 0, "skip": 0}
        assert mf.causal().dense(q_len, kv_len).shape == (1, 1, q_len, kv_len)


def test_a_look_up_out_of_range_is_found_wherever_it_hides():
    table = torch.arange(1000)
    for predicate in (
        lambda b, h, q, kv: table[q] >= 0,  # would be full
        lambda b, h, q, kv: table[q] < 0,  # would be skip
        lambda b, h, q, kv: (q > 5000) & (table[kv] > 3),  # & reaches both sides
    ):
        mf.mask(predicate).block_map(1000, 1000)
        with pytest.raises(mf.MaskIndexError, match=r"test_classify.py:\d+.*of a table of shape \(1000,\)"):
            mf.mask(predicate).block_map(1001, 1001)


def test_a_guarded_look_up_out_of_range_is_fine():
    table = torch.arange(1000)
    guarded = mf.mask(lambda b, h, q, kv: q < 1000 and table[q] > 3)
    assert guarded.dense(1300, 1)[0, 0, :, 0].nonzero().flatten().tolist() == list(range(4, 1000))
    assert guarded.block_map(1300, 1300).counts["full"] > 0
