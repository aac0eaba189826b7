"""Conditions decided each by its own way, and joined: the map of all pairs, with few of them looked at."""

import operator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import CONDITION_WAYS, by_parts, classify
from maskflash.analysis.facts import Facts
from maskflash.analysis.ways import groups

CPU = torch.device("cpu")
SIZES = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))


def problem_of(mask, q_len, kv_len, block_size=(16, 16), q_offset=0):
    block_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    return mask.at(q_len, kv_len, batch=2, heads=2, q_offset=q_offset).tiled(block_size)


def expected(mask, problem):
    (batch, heads), (rows, width) = problem.shape[:2], problem.block_size
    dense = mask.dense(problem.q_len, problem.kv_len, batch=2, heads=2, q_offset=problem.q_offset)[:batch, :heads]
    kinds = torch.zeros(problem.shape, dtype=torch.int8)
    for i, band in enumerate(dense.split(rows, 2)):
        for j, tile in enumerate(band.split(width, 3)):
            kinds[:, :, i, j] = tile.flatten(2).any(2).to(torch.int8) + tile.flatten(2).all(2).to(torch.int8)
    return BlockMap.from_kinds(kinds, problem.q_len, problem.kv_len, problem.block_size)


def same_maps(x, y):
    return all(map(torch.equal, (*x.rows.tensors, *x.columns.tensors), (*y.rows.tensors, *y.columns.tensors)))


DRAW = torch.Generator().manual_seed(0)
CELL = torch.randint(0, 5, (2, 100), generator=DRAW)
NEAR = torch.rand(2, 5, 5, generator=DRAW) < 0.5
FLAG = torch.rand(100, generator=DRAW) < 0.8
CONDITIONS = [
    lambda b, h, q, kv: NEAR[h, CELL[b, q], CELL[b, kv]],
    lambda b, h, q, kv: NEAR[0, q // 20 % 5, kv // 20 % 5],
    lambda b, h, q, kv: FLAG[q],
    lambda b, h, q, kv: FLAG[kv] | (CELL[0, q] == 3),
    lambda b, h, q, kv: q >= kv,
    lambda b, h, q, kv: abs(q - kv) < 30,
    lambda b, h, q, kv: kv < 12 or q < 7,
    lambda b, h, q, kv: q // 25 == kv // 25,
    lambda b, h, q, kv: q - kv >= 8 * b - h,
    lambda b, h, q, kv: q * 2 >= kv,
]


def joined():
    """Conditions joined by `and`, `or` and `not`."""
    leaves = st.sampled_from(CONDITIONS).map(mf.mask)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda join, x, y: join(x, y), st.sampled_from([operator.and_, operator.or_]), inner, inner),
            inner.map(operator.invert),
        ),
        max_leaves=5,
    )


@settings(max_examples=300)
@given(joined(), st.integers(1, 90), st.integers(1, 90), SIZES, st.sampled_from([0, 3, torch.tensor([0, 9])]))
def test_joined_conditions_make_the_map_of_all_pairs(mask, q_len, kv_len, block_size, offset):
    problem = problem_of(mask, q_len, kv_len, block_size, offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_TOKENS", 0.01)
        found = by_parts(Facts(problem))
    assume(found is not None)
    assert same_maps(found.block_map, expected(mask, problem))


@pytest.mark.parametrize("tokens", [2048, 4096])
def test_pairs_are_looked_at_only_where_two_conditions_are_partial(tokens, monkeypatch):
    cell = torch.arange(tokens) * 30 // tokens
    near = torch.rand(30, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = mf.mask(lambda b, h, q, kv: near[cell[q], cell[kv]] and q >= kv)
    problem = problem_of(mask, tokens, tokens, 32)
    evaluated = []
    visible = type(problem).visible

    def counted(self, b, h, q, kv):
        bits = visible(self, b, h, q, kv)
        evaluated.append(bits.numel())
        return bits

    monkeypatch.setattr(type(problem), "visible", counted)
    found = classify(problem, (*CONDITION_WAYS, by_parts))
    assert found.decided["parts"] == (tokens // 32) ** 2
    assert sum(evaluated) < 3 * tokens * 32  # of tiles on the diagonal, and a few


SHORT = torch.arange(50) % 3


def test_a_guard_of_another_condition_holds():
    """One by one, the second condition fails; together, as the mask says, it doesn't."""
    guarded = mf.mask(lambda b, h, q, kv: q + kv * 0 < 50 and SHORT[q] * 7 % 5 == kv % 3 and q >= kv)
    problem = problem_of(guarded, 90, 90)
    assert by_parts(Facts(problem)) is None
    assert same_maps(classify(problem).block_map, expected(guarded, problem))
    bare = mf.mask(lambda b, h, q, kv: (SHORT[q] * 7 % 5 == kv % 3) & (q >= kv))
    with pytest.raises(mf.MaskIndexError):
        classify(problem_of(bare, 90, 90))


def test_conditions_that_no_way_decides_are_left_to_tiles():
    heights = torch.rand(90)
    for predicate in (
        lambda b, h, q, kv: q >= kv and heights[q] < heights[kv],
        lambda b, h, q, kv: heights[q] < heights[kv],
        lambda b, h, q, kv: q >= kv,
        lambda b, h, q, kv: (q >= kv) ^ FLAG[q],
    ):
        assert by_parts(Facts(problem_of(mf.mask(predicate), 90, 90))) is None
