"""Rows are what rows see, whether formulas, pieces, groups or all pairs tell."""

import operator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import by_ends, by_tiles, classify
from maskflash.analysis.facts import Facts
from maskflash.analysis.intervals import MOST_INTERVALS, Rows
from maskflash.analysis.ways import columns
from maskflash.analysis.ways.ends import map_of_intervals
from maskflash.backends.cpu import plan as cpu_plan
from maskflash.op import cache
from maskflash.testing import Shape, assert_matches_dense, masks
from tests.predicates import affine_masks

CPU = torch.device("cpu")


def problem_of(mask, q_len, kv_len, q_offset=0):
    return mask.at(q_len, kv_len, batch=2, heads=2, q_offset=q_offset).tiled((16, 16))


def check(mask, q_len, kv_len, offset=0):
    problem = problem_of(mask, q_len, kv_len, offset)
    facts = Facts(problem)
    assume(facts.rows is not None)
    batch, heads = problem.shape[:2]
    dense = mask.dense(q_len, kv_len, batch=2, heads=2, q_offset=offset)[:batch, :heads]
    are_what_is_seen(facts.rows, dense)
    if facts.columns is not None:
        are_what_is_seen(facts.columns, dense.transpose(2, 3))


def are_what_is_seen(rows, dense):
    """Hulls and counts are those of the bits (B, H, rows, columns), and so are intervals where they tell."""
    length = dense.shape[3]
    sees = dense.any(-1)
    start, stop = rows.hulls
    assert torch.equal(rows.count, dense.sum(-1))
    assert torch.equal(start[sees], dense.int().argmax(-1)[sees])
    assert torch.equal(stop[sees], length - dense.flip(-1).int().argmax(-1)[sees])
    assert bool((stop <= start)[~sees].all())
    column = torch.arange(length)
    bits = ((column >= rows.start[..., None]) & (column < rows.stop[..., None])).sum(0)
    assert torch.equal(bits[rows.told], dense[rows.told].long())
    some = rows.start < rows.stop
    assert bool((some[:-1] | ~some[1:]).all())  # a row's missing intervals are its last
    assert bool((rows.start[1:] > rows.stop[:-1])[some[1:]].all())  # apart
    edges = torch.nn.functional.pad(dense.int(), (1, 1)).diff(dim=-1).abs().sum(-1)
    if rows.group is None and edges.max() <= 2 * MOST_INTERVALS:
        assert rows.told.all()


@settings(max_examples=200)
@given(masks(), st.integers(1, 64), st.integers(1, 64), st.sampled_from([16, 200, 1 << 18]))
def test_they_are_what_rows_see(mask, q_len, kv_len, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "PIECES_AT_ONCE", at_once)  # so that seams are tested too
        check(mask, q_len, kv_len)


@given(affine_masks(), st.integers(1, 64), st.integers(1, 64), st.integers(0, 40))
def test_formulas_know_offsets(mask, q_len, kv_len, offset):
    check(mask, q_len, kv_len, offset)


def test_what_tells_and_what_does_not():
    ids = torch.tensor([1, 1, 0, 2])
    assert Facts(problem_of(mf.document([30, 10]), 40, 40)).intervals is not None
    assert Facts(problem_of(mf.document(ids=ids.repeat(10)), 40, 40)).intervals is None  # ids don't ascend
    assert Facts(problem_of(mf.causal() & mf.document([30, 10]), 14, 40, q_offset=26)).intervals is not None
    assert Facts(problem_of(mf.natten(6, 6, 3, 3), 36, 36)).rows is None


CONJUNCTS = [
    lambda b, h, q, kv: q >= kv,
    lambda b, h, q, kv: q - kv <= 9,
    lambda b, h, q, kv: abs(q - kv) < 7,
    lambda b, h, q, kv: q // 8 == kv // 8,
    lambda b, h, q, kv: -q <= 5 - kv,
    lambda b, h, q, kv: 50 - q > kv,
    lambda b, h, q, kv: kv < 41 and q >= 3,
    lambda b, h, q, kv: kv % 3 != 1,
    lambda b, h, q, kv: q % 20 != 4,
    lambda b, h, q, kv: kv >= 8 * b + h,
    lambda b, h, q, kv: q < 30 or q > 33,
    lambda b, h, q, kv: (q // 4) * 4 > kv,
    lambda b, h, q, kv: not (q < kv),
    lambda b, h, q, kv: q != kv,
]
ROWS = torch.arange(64)


@st.composite
def joined(draw):
    """Comparisons joined by `and`, some of them with tables."""
    ascending = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=128, max_size=128))).view(2, 64).sort(-1).values
    tables = [
        mf.mask(lambda b, h, q, kv: ascending[b, q] == ascending[b, kv]),
        mf.mask(lambda b, h, q, kv: ascending[0, kv] <= ascending[0, q]),
        mf.mask(lambda b, h, q, kv: -ascending[0, q] < -ascending[0, kv]),
        mf.mask(mf.document(lengths=draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))).function),
    ]
    parts = draw(st.lists(st.sampled_from([*map(mf.mask, CONJUNCTS), *tables]), min_size=1, max_size=3))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


@settings(max_examples=300)
@given(joined(), st.integers(1, 64), st.integers(1, 64), st.sampled_from([(16, 16), (3, 5), (1, 1), (64, 2)]))
def test_ends_of_joined_comparisons_are_what_rows_see_and_make_the_map(mask, q_len, kv_len, block_size):
    problem = mask.at(q_len, kv_len, batch=2, heads=2).tiled(block_size)
    facts = Facts(problem)
    found = facts.intervals
    assume(found is not None)
    batch, heads = problem.shape[:2]
    dense = mask.dense(q_len, kv_len, batch=2, heads=2)[:batch, :heads]
    column = torch.arange(kv_len)
    seen = (column >= found.start[0, ..., None]) & (column < found.stop[0, ..., None])
    assert torch.equal(seen, dense)
    assert torch.equal(found.count, dense.sum(-1))
    made = by_ends(facts)
    if made is not None:
        block_map = made.block_map
        rows = torch.nn.functional.pad(dense.float(), (0, -kv_len % block_size[1], 0, -q_len % block_size[0]), value=-1)
        tiles = rows.unflatten(3, (-1, block_size[1])).unflatten(2, (-1, block_size[0])).transpose(3, 4)
        some, every = (tiles == 1).flatten(4).any(-1), (tiles != 0).flatten(4).all(-1)
        expected = BlockMap.from_kinds((some.int() + (some & every)).to(torch.int8), q_len, kv_len, block_size)
        assert all(map(torch.equal, block_map.rows.tensors, expected.rows.tensors))
        assert all(map(torch.equal, block_map.columns.tensors, expected.columns.tensors))


@pytest.mark.parametrize(
    ("mask", "intervals"),
    [
        (mf.causal() & mf.document([30, 10]), True),
        (mf.document([30, 10]), True),
        (mf.mask(lambda b, h, q, kv: q >= kv and kv % 3 != 1), False),  # nor a comb
        (mf.mask(lambda b, h, q, kv: 50 - q > kv and kv // 3 <= q), True),
        (mf.mask(lambda b, h, q, kv: q != kv and ROWS[q] >= 0), False),  # what a row sees is apart
        (mf.mask(lambda b, h, q, kv: ROWS[q] >= kv or kv < 2), False),  # not joined by and
        (mf.mask(lambda b, h, q, kv: ROWS[q] == 1 or ROWS[q] - kv >= 0), False),
    ],
)
def test_what_is_an_interval(mask, intervals):
    assert (classify(problem_of(mask, 40, 40)).decided["intervals"] > 0) is intervals


@given(st.lists(st.sampled_from([-(2**63), -(2**62), -1, 0, 2**62, 2**63 - 2, 2**63 - 1]), min_size=1, max_size=9))
def test_numbers_far_apart_are_compared_and_not_subtracted(numbers):
    rows, near, first = torch.tensor(numbers), torch.tensor([2**63 - 2, 2**63 - 1]), torch.tensor([-(2**63)])
    for table in (near, first):
        check(mf.mask(lambda b, h, q, kv, table=table: rows[q] < table[kv]), len(numbers), len(table))
        check(mf.mask(lambda b, h, q, kv, table=table: rows[q] >= table[kv]), len(numbers), len(table))
    for compare in (operator.lt, operator.le, operator.gt, operator.ge):
        check(mf.mask(lambda b, h, q, kv, compare=compare: compare(kv, rows[q])), len(numbers), 7)


@pytest.mark.parametrize(
    "seen",
    [
        [(0, 4), (0, 4), (40, 44), (40, 44)],
        [(40, 44), (40, 44), (0, 4), (0, 4)],
        [(0, 4), (4, 4), (44, 40), (40, 44)],  # rows that see nothing, and lead over
        [(40, 44), (44, 40), (4, 0), (0, 4)],
    ],
)
def test_rows_of_a_line_that_lie_apart_are_not_one_stretch(seen):
    """The rows of a tile see tiles far from each other: the map comes another way, and is the same."""
    start, stop = (x.view(1, 1, 4) for x in torch.tensor(seen).T)
    problem = mf.full().at(4, 64).tiled((4, 8))
    assert map_of_intervals(problem, Rows(start[None], stop[None], (stop - start).clamp(min=0))) is None


FEW = torch.arange(30)


@pytest.mark.parametrize(
    ("guarded", "bare"),
    [
        (lambda b, h, q, kv: q < 30 and FEW[q] >= kv, lambda b, h, q, kv: FEW[q] >= kv),
        (lambda b, h, q, kv: kv < 30 and q >= FEW[kv], lambda b, h, q, kv: q >= FEW[kv]),
        (lambda b, h, q, kv: kv < 30 and FEW[kv] > 3, lambda b, h, q, kv: q >= kv and FEW[kv] > 3),
        (lambda b, h, q, kv: q < 30 and FEW[q] > 3, lambda b, h, q, kv: q >= kv and FEW[q] > 3),
    ],
)
def test_a_look_up_that_may_fail_is_left_to_those_who_look(guarded, bare):
    for predicate in (guarded, bare):
        assert Facts(problem_of(mf.mask(predicate), 40, 40)).intervals is None
    classify(problem_of(mf.mask(guarded), 40, 40))
    with pytest.raises(mf.MaskIndexError):
        classify(problem_of(mf.mask(bare), 40, 40))


def test_an_analysis_evaluates_no_pair_that_rows_tell(monkeypatch):
    """A long packed batch is planned without a look at its partial tiles."""
    from maskflash.analysis.problem import Problem
    from maskflash.op.analyse import analyse

    pairs = []
    visible = Problem.visible

    def counted(self, b, h, q, kv):
        bits = visible(self, b, h, q, kv)
        pairs.append(bits.numel())
        return bits

    monkeypatch.setattr(Problem, "visible", counted)
    mask = mf.causal() & mf.document([1000] * 8 + [192])
    problem = mask.at(8192, 8192).tiled((128, 128))
    partial = analyse(problem, "cpu").block_map.counts["partial"]
    assert sum(pairs) < partial * 128**2 / 8


@settings(max_examples=60)
@given(st.one_of(masks(max_len=200), affine_masks(max_len=200)), st.integers(1, 200), st.integers(1, 200))
def test_attention_by_rows_is_the_dense_one(mask, q_len, kv_len):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_plan, "_MANY_PAIRS", -1)
        shape = Shape(batch=2, heads=2, q_len=q_len, kv_len=kv_len, head_dim=16)
        cache.invalidate({mask.traced({}).expr.text})
        assert_matches_dense(mask, shape, block_size=32)


@settings(max_examples=150)
@given(masks(), st.integers(1, 8), st.integers(1, 64), st.integers(0, 40), st.sampled_from([(16, 16), (3, 5), (1, 1)]))
def test_few_rows_evaluated_at_once_are_what_they_see_and_make_the_map(mask, q_len, kv_len, offset, block_size):
    problem = mask.at(q_len, kv_len, batch=2, heads=2, q_offset=offset).tiled(block_size)
    facts = Facts(problem)
    rows, block_map = facts.pairs
    assert torch.equal(block_map.kinds(), by_tiles(facts).block_map.kinds())
    dense = mask.dense(q_len, kv_len, batch=2, heads=2, q_offset=offset)[: problem.shape[0], : problem.shape[1]]
    are_what_is_seen(rows, dense)
