"""Formulas give the brute-force map, run for run, whatever the lengths, tiles and offset."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.ways import lines as module
from maskflash.analysis.ways.lines import find_formula
from tests.predicates import affine_masks

SIDES = st.integers(1, 40)
CPU = torch.device("cpu")


def problem_of(mask, q_len, kv_len, block_size=(16, 16), q_offset=0):
    return mask.at(q_len, kv_len, batch=2, heads=2, q_offset=q_offset).tiled(block_size)


def same_runs(x, y):
    return all(torch.equal(getattr(x, name), getattr(y, name)) for name in ("offsets", "start", "stop", "full"))


def brute_force(dense, block_size):
    bq, bkv = block_size
    kinds = torch.zeros(1, 1, -(-dense.shape[0] // bq), -(-dense.shape[1] // bkv), dtype=torch.int8)
    for i, band in enumerate(dense.split(bq)):
        for j, tile in enumerate(band.split(bkv, 1)):
            kinds[0, 0, i, j] = int(tile.any()) + int(tile.all())
    return BlockMap.from_kinds(kinds, *dense.shape, block_size)


APART = mf.mask(lambda b, h, q, kv: kv < 3 or (5 <= kv < 8 and q - kv >= 20) or 10 <= kv < 12)


@settings(max_examples=300)
@example(APART, 40, 40, 0, 4, 16, 4096)  # three strips of one tile, of which some rows don't see the middle one
@given(affine_masks(), SIDES, SIDES, st.integers(0, 30), SIDES, SIDES, st.sampled_from([1, 3, 4096]))
def test_its_runs_are_those_of_all_pairs(mask, q_len, kv_len, offset, rows, width, at_once):
    problem = problem_of(mask, q_len, kv_len, (rows, width), offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LINES_AT_ONCE", at_once)
        found = find_formula(problem).block_map()
    expected = brute_force(mask.dense(q_len, kv_len, q_offset=offset)[0, 0], (rows, width))
    assert same_runs(found.rows, expected.rows) and same_runs(found.columns, expected.columns)


def test_a_length_costs_nothing():
    """Ten million tokens: the runs follow the rows of tiles, and nothing is as long as the sequence."""
    found = find_formula(problem_of(mf.causal(), 10_000_000, 10_000_000, (128, 128))).block_map()
    assert found.counts["partial"] == 78125 and found.nbytes < 10 << 20
    window = mf.sliding_window(4096).block_map(10_000_000, 10_000_000)
    visited = {"full": 31 * 78125 - 31 * 32 // 2, "partial": 2 * 78125 - 32}
    assert window.counts == {**visited, "skip": 78125**2 - sum(visited.values())}


@pytest.mark.parametrize(
    "mask",
    [
        mf.document([2, 3]),
        mf.mask(lambda b, h, q, kv: q >= kv + h),
        mf.mask(lambda b, h, q, kv: q + (1 << 62) - kv >= 0),  # may overflow
        mf.padding([3, 9]),
    ],
)
def test_what_has_none(mask):
    assert find_formula(problem_of(mask, 40, 40)) is None


def test_offsets_of_their_own_and_empty_sides_have_none():
    assert find_formula(problem_of(mf.causal(), 40, 40, q_offset=torch.tensor([0, 3]))) is None
    assert find_formula(problem_of(mf.causal(), 0, 40)) is None


def test_too_many_cells_are_left_to_others(monkeypatch):
    monkeypatch.setattr(module, "_MOST_CELLS", 3)
    assert find_formula(problem_of(mf.causal(), 40, 40)) is not None
    assert find_formula(problem_of(mf.prefix_lm(5), 40, 40)) is None


@given(affine_masks(max_len=1 << 20), st.integers(1, 1 << 20), st.integers(0, 2**32))
def test_pairs_of_long_sequences_are_in_tiles_of_their_kind(mask, length, seed):
    draw = torch.Generator().manual_seed(seed)
    problem = problem_of(mask, length, length, (1024, 512))
    block_map = find_formula(problem).block_map()
    q, kv = torch.randint(0, length, (2, 500), generator=draw)
    zero = torch.tensor(0)
    seen = problem.visible(zero, zero, q, kv).expand(500)
    kind = block_map.kinds()[0, 0][q // 1024, kv // 512]
    assert bool((kind[seen] > 0).all()) and bool((kind[~seen] < 2).all())
