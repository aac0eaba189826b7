"""Columns cut into pieces say what the mask says, pair by pair, and their tiles are the brute-force ones."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.analysis.ways import columns
from maskflash.analysis.ways.columns import find_pieces
from maskflash.analysis.ways.coverage import cover
from maskflash.testing import masks

SIZES = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))
CPU = torch.device("cpu")


def problem_of(mask, q_len, kv_len, block_size=(16, 16), q_offset=0):
    return mask.at(q_len, kv_len, batch=2, heads=2, q_offset=q_offset).tiled(block_size)


def same_runs(x, y):
    return all(torch.equal(getattr(x, name), getattr(y, name)) for name in ("offsets", "start", "stop", "full"))


@settings(max_examples=200)
@given(masks(), st.integers(1, 64), st.integers(1, 64), st.sampled_from([0, 3, torch.tensor([0, 9])]))
def test_pieces_are_the_mask(mask, q_len, kv_len, offset):
    if not isinstance(offset, int) or offset:
        q_len = min(q_len, 50)  # tables have room for 64 rows
    pieces = find_pieces(problem_of(mask, q_len, kv_len, q_offset=offset))
    assume(pieces is not None)
    batch, heads = pieces.problem.shape[:2]
    start, visible = pieces.cut(slice(0, batch), slice(0, heads), slice(0, kv_len))
    assert bool((start.diff(dim=0) >= 0).all()) and int(start[0].max()) == 0 and int(start.max()) <= q_len
    row = torch.arange(q_len)[:, None, None, None, None]
    last = (row >= start).sum(1) - 1  # the piece of each row
    found = visible.gather(0, last).permute(1, 2, 0, 3)
    dense = mask.dense(q_len, kv_len, batch=2, heads=2, q_offset=offset)
    assert torch.equal(found.expand_as(dense), dense)


@settings(max_examples=200)
@given(masks(), st.integers(1, 64), st.integers(1, 64), SIZES, st.sampled_from([64, 300, 1 << 18]))
def test_their_tiles_are_those_of_all_pairs(mask, q_len, kv_len, block_size, at_once):
    block_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    problem = problem_of(mask, q_len, kv_len, block_size)
    pieces = find_pieces(problem)
    assume(pieces is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "PIECES_AT_ONCE", at_once)  # so that seams are tested too
        found = cover(pieces)
    bits = mask.dense(q_len, kv_len, batch=2, heads=2)[: problem.shape[0], : problem.shape[1]]
    kinds = torch.zeros(problem.shape, dtype=torch.int8)
    for i, band in enumerate(bits.split(block_size[0], 2)):
        for j, tile in enumerate(band.split(block_size[1], 3)):
            kinds[:, :, i, j] = tile.flatten(2).any(2).to(torch.int8) + tile.flatten(2).all(2).to(torch.int8)
    expected = BlockMap.from_kinds(kinds, q_len, kv_len, block_size)
    assert same_runs(found.columns, expected.columns) and same_runs(found.rows, expected.rows)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_runs_turn_over(units, n_q, n_kv, seed):
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (units, 1, n_q, n_kv), generator=draw, dtype=torch.int8)
    block_map = BlockMap.from_kinds(kinds, n_q, n_kv, (1, 1))
    assert same_runs(block_map.columns.transposed(n_kv, n_q), block_map.rows)
    assert same_runs(block_map.rows.transposed(n_q, n_kv), block_map.columns)


def test_what_no_guard_excludes_is_an_error_here_too():
    table = torch.arange(50)
    for predicate in (
        lambda b, h, q, kv: table[q] >= table[kv],
        lambda b, h, q, kv: q >= kv and table[q] >= 0,
        lambda b, h, q, kv: q >= kv and table[kv] <= q,
    ):
        cover(find_pieces(problem_of(mf.mask(predicate), 50, 50)))
        with pytest.raises(mf.MaskIndexError, match=r"test_columns.py:\d+.*of a table of shape \(50,\)"):
            cover(find_pieces(problem_of(mf.mask(predicate), 51, 51)))


def test_an_error_in_the_middle_of_a_piece_is_found():
    table = torch.zeros(50, dtype=torch.int64)
    for predicate in (lambda b, h, q, kv: q >= kv and table[q] >= 0, lambda b, h, q, kv: table[q] >= kv - 10):
        cover(find_pieces(problem_of(mf.mask(predicate), 50, 10)))
        with pytest.raises(mf.MaskIndexError):
            cover(find_pieces(problem_of(mf.mask(predicate), 51, 10)))


def test_guarded_look_ups_are_none():
    table = torch.arange(50) // 7
    mask = mf.mask(lambda b, h, q, kv: q < 50 and kv < 50 and table[q] == table[kv])
    problem = problem_of(mask, 90, 80)
    assert same_runs(cover(find_pieces(problem)).rows, classify(problem).block_map.rows)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, h, q, kv: q % 5 >= kv,  # neither ascends nor descends
        lambda b, h, q, kv: (q % 2 == 0) & (q >= kv),  # changes at every row
        lambda b, h, q, kv: q + (1 << 62) - kv >= 0,  # may overflow
    ],
)
def test_what_rows_or_numbers_forbid_is_left_to_tiles(predicate):
    assert find_pieces(problem_of(mf.mask(predicate), 60, 60)) is None


def test_rows_may_descend():
    table = torch.arange(60).flip(0)
    mask = mf.mask(lambda b, h, q, kv: table[q] <= table[kv] and table[q] > 4)
    problem = problem_of(mask, 60, 60, (1, 1))
    assert same_runs(cover(find_pieces(problem)).rows, classify(problem).block_map.rows)


def test_decided_by_columns():
    facts = mf.compile(mf.causal() | mf.document([8191]), block_size=16).explain(8192, 8192).to_dict()
    assert {way: count for way, count in facts["decided"].items() if count} == {"columns": 512**2}
    assert facts["tiles"] == {"full": 512 * 511, "partial": 512, "skip": 0}
