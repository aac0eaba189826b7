"""Rows and columns that a mask treats alike: their groups' pairs tell every tile and what every row sees, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.ways import groups as module
from maskflash.analysis.ways.groups import find_groups
from maskflash.backends.cpu import plan
from maskflash.op import analyse, cache
from maskflash.testing import Shape, assert_matches_dense

CPU = torch.device("cpu")
SIZES = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))
LENGTHS = st.integers(1, 90)
OFFSETS = st.sampled_from([0, 3, torch.tensor([0, 9]), torch.tensor([7, 2], dtype=torch.int32)])
LONGEST = 100  # tokens that tables have room for, offsets included


def problem_of(mask, q_len, kv_len, block_size=(16, 16), q_offset=0, **mask_args):
    block_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    return mask.at(q_len, kv_len, batch=2, heads=2, q_offset=q_offset, **mask_args).tiled(block_size)


def expected(mask, problem, **mask_args):
    """The map of all pairs, and the pairs themselves, of the problem's shape."""
    (batch, heads), (rows, width) = problem.shape[:2], problem.block_size
    dense = mask.dense(problem.q_len, problem.kv_len, batch=2, heads=2, q_offset=problem.q_offset, **mask_args)
    dense = dense[:batch, :heads]
    kinds = torch.zeros(problem.shape, dtype=torch.int8)
    for i, band in enumerate(dense.split(rows, 2)):
        for j, tile in enumerate(band.split(width, 3)):
            kinds[:, :, i, j] = tile.flatten(2).any(2).to(torch.int8) + tile.flatten(2).all(2).to(torch.int8)
    return BlockMap.from_kinds(kinds, problem.q_len, problem.kv_len, problem.block_size), dense


def same_maps(x, y):
    return all(map(torch.equal, (*x.rows.tensors, *x.columns.tensors), (*y.rows.tensors, *y.columns.tensors)))


def check(mask, problem, **mask_args):
    """The groups' map and hulls are those of all pairs."""
    found = find_groups(problem)
    assert found is not None
    block_map, dense = expected(mask, problem, **mask_args)
    assert same_maps(found.block_map(), block_map)
    rows = found.seen()
    start, stop, count = rows.start[0], rows.stop[0], rows.count
    sees = dense.any(-1)
    assert torch.equal(count, dense.sum(-1))
    assert torch.equal(start[sees], dense.int().argmax(-1)[sees])
    assert torch.equal(stop[sees], problem.kv_len - dense.flip(-1).int().argmax(-1)[sees])
    assert bool((stop <= start)[~sees].all())


@pytest.fixture(autouse=True)
def _however_many_there_are(monkeypatch):
    """Groups are taken however few tokens they have."""
    monkeypatch.setattr(module, "_TOKENS", 0.01)


@st.composite
def looked_up(draw):
    """Masks of what tables say of the row and of the column: sorted or not, by batch row and head or not."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    cells, density = draw(st.integers(1, 12)), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    cell = torch.randint(0, cells, (2, LONGEST), generator=seed)
    if draw(st.booleans(), "sorted"):
        cell = cell.sort(-1).values
    kind = torch.randint(-3, 3, (LONGEST,), generator=seed).to(draw(st.sampled_from([torch.int64, torch.int8])))
    near = torch.rand(2, cells, cells, generator=seed) < density
    weight = torch.randn(2, cells, cells, generator=seed)
    weight[weight > 1.5] = torch.nan
    height = torch.randint(0, 4, (LONGEST,), generator=seed) * 0.5
    height[draw(st.integers(0, LONGEST - 1))] = torch.nan
    flag = torch.rand(LONGEST, generator=seed) < 0.7
    return mf.mask(
        draw(
            st.sampled_from(
                [
                    lambda b, h, q, kv: near[0, cell[0, q], cell[0, kv]],
                    lambda b, h, q, kv: near[h, cell[b, q], cell[b, kv]],
                    lambda b, h, q, kv: near[h][cell[0][q], cell[1][kv]],
                    lambda b, h, q, kv: near[b, cell[h, q], cell[0, kv] - cells],  # negative indices wrap
                    lambda b, h, q, kv: weight[0, cell[0, q], cell[0, kv]] >= 0,
                    lambda b, h, q, kv: not (weight[h, cell[0, q], cell[0, kv]] < 0.3),
                    lambda b, h, q, kv: (kind[q] * kind[kv]) % 4 == 1,
                    lambda b, h, q, kv: height[q] <= height[kv] or kind[kv] == -3,
                    lambda b, h, q, kv: flag[q],
                    lambda b, h, q, kv: flag[kv] and kind[kv] != 0,
                    lambda b, h, q, kv: near[0, (q // 8) % cells, (kv // 8) % cells] ^ flag[q],
                    lambda b, h, q, kv: kind[q] == kind[kv] if flag[q] else near[0, cell[b, q], cell[b, kv]],
                    lambda b, h, q, kv: 0.5 / height[q] > kind[kv],
                    lambda b, h, q, kv: b == h,
                    lambda b, h, q, kv: (q - b) // 9 == kv // 9,
                ]
            )
        )
    )


@settings(max_examples=300)
@given(looked_up(), LENGTHS, LENGTHS, SIZES, OFFSETS, st.sampled_from([1, 50, 1 << 21]), st.sampled_from([1, 3, 512]))
def test_groups_say_what_all_pairs_say(mask, q_len, kv_len, block_size, offset, at_once, lines):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PAIRS_AT_ONCE", at_once)  # so that seams are tested too
        patch.setattr(module, "_WORDS_AT_ONCE", at_once)
        patch.setattr(module, "_LINES_AT_ONCE", lines)
        check(mask, problem_of(mask, q_len, kv_len, block_size, offset))


@settings(max_examples=150)
@given(mf.testing.masks(), st.integers(1, 64), st.integers(1, 64), SIZES)
def test_any_mask_has_groups(mask, q_len, kv_len, block_size):
    """At worst each row and each column is one."""
    check(mask, problem_of(mask, q_len, kv_len, block_size))


SHORT = torch.arange(50) % 3
FLAG = torch.arange(90) < 50
PAIRS = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)) < 0.5
WIDE = torch.arange(90) % 3


@pytest.mark.parametrize(
    ("guarded", "bare"),
    [
        (lambda b, h, q, kv: q < 50 and SHORT[q] > 0, lambda b, h, q, kv: SHORT[q] > 0),
        (lambda b, h, q, kv: FLAG[q] and SHORT[q] > 0, lambda b, h, q, kv: FLAG[q] & (SHORT[q] > 0)),
        (lambda b, h, q, kv: FLAG[kv] and SHORT[kv] > 9, lambda b, h, q, kv: SHORT[kv] > 9),
        (
            lambda b, h, q, kv: FLAG[q] and FLAG[kv] and SHORT[q] == SHORT[kv],
            lambda b, h, q, kv: SHORT[q] == SHORT[kv],
        ),
        (
            lambda b, h, q, kv: WIDE[kv] < 2 and PAIRS[WIDE[q], WIDE[kv]],
            lambda b, h, q, kv: PAIRS[WIDE[q], WIDE[kv]],
        ),
        (
            lambda b, h, q, kv: WIDE[kv] != WIDE[q] and WIDE[q] % (WIDE[kv] - WIDE[q]) == 0,
            lambda b, h, q, kv: WIDE[q] % (WIDE[kv] - WIDE[q]) == 0,
        ),
    ],
)
def test_an_error_is_raised_where_some_pair_reaches_it(guarded, bare):
    mask = mf.mask(guarded)
    check(mask, problem_of(mask, 90, 90))
    with pytest.raises(mf.MaskIndexError, match=r"test_groups.py:\d+"):
        find_groups(problem_of(mf.mask(bare), 90, 90)).block_map()


def test_a_row_that_fails_is_in_no_group_with_one_that_is_guarded():
    """Both have the same value, and a look-up that fails in both; only one of them reaches it."""
    guard = torch.zeros(90, dtype=torch.bool)
    mask = mf.mask(lambda b, h, q, kv: guard[q] and SHORT[q] > 5)
    check(mask, problem_of(mask, 90, 90))
    guard[77] = True
    with pytest.raises(mf.MaskIndexError, match="q=77"):
        find_groups(problem_of(mask, 90, 90)).block_map()


def test_an_error_names_the_first_pair():
    mask = mf.mask(lambda b, h, q, kv: PAIRS[WIDE[q], WIDE[kv]])
    with pytest.raises(mf.MaskIndexError, match="q=0, kv=2"):
        find_groups(problem_of(mask, 90, 90)).block_map()


def test_groups_are_taken_only_where_they_are_few(monkeypatch):
    monkeypatch.undo()
    doc = torch.arange(4096) // 3
    heights = torch.rand(4096)
    for predicate in (
        lambda b, h, q, kv: doc[q] != doc[kv],
        lambda b, h, q, kv: q * 1.0 >= kv,
        lambda b, h, q, kv: heights[q] < heights[kv],
        lambda b, h, q, kv: (q * 7 + kv * 13) % 29 < 3,
    ):
        assert find_groups(problem_of(mf.mask(predicate), 2048, 2048)) is None
    few = mf.mask(lambda b, h, q, kv: (doc[q] % 5) * (doc[kv] % 7) < heights[kv] * 20)  # one side may have many
    assert find_groups(problem_of(few, 2048, 2048)) is not None


@pytest.mark.parametrize("tokens", [1 << 12, 1 << 15])
@pytest.mark.parametrize("in_order", [True, False])
def test_what_is_evaluated_follows_the_groups_and_not_the_tokens(tokens, in_order, monkeypatch):
    monkeypatch.undo()
    cell = torch.arange(tokens) * 40 // tokens
    cell = cell if in_order else cell[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))]
    near = torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = mf.mask(lambda b, h, q, kv: near[cell[q], cell[kv]])
    problem = problem_of(mask, tokens, tokens, 128)
    evaluated = []
    visible = Problem.visible

    def counted(self, b, h, q, kv):
        bits = visible(self, b, h, q, kv)
        evaluated.append(bits.numel())
        return bits

    monkeypatch.setattr(Problem, "visible", counted)
    found = classify(problem)
    assert found.decided["groups"] == (tokens // 128) ** 2
    assert sum(evaluated) == 40 * 40


@settings(max_examples=40)
@given(looked_up(), LENGTHS, LENGTHS)
def test_attention_by_groups_is_the_dense_one(mask, q_len, kv_len):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_MANY_PAIRS", -1)
        cache.invalidate({mask.traced({}).expr.text})
        assert_matches_dense(mask, Shape(batch=2, heads=2, q_len=q_len, kv_len=kv_len), block_size=32)


@pytest.mark.parametrize("tokens", [1 << 12, 1 << 13])
def test_a_plan_evaluates_one_row_of_each_group(tokens, monkeypatch):
    """Rows with holes cost their groups and the tiles that they visit."""
    monkeypatch.undo()
    cell = torch.arange(tokens) // 64
    near = torch.rand(tokens // 64, tokens // 64, generator=torch.Generator().manual_seed(1)) < 256 / tokens
    mask = mf.mask(lambda b, h, q, kv: near[cell[q], cell[kv]])
    evaluated = []
    visible = Problem.visible

    def counted(self, b, h, q, kv):
        bits = visible(self, b, h, q, kv)
        evaluated.append(bits.numel())
        return bits

    monkeypatch.setattr(Problem, "visible", counted)
    monkeypatch.setattr(plan, "_MANY_PAIRS", -1)
    problem = problem_of(mask, tokens, tokens, 128)
    partial = analyse.analyse(problem, "cpu").block_map.counts["partial"]
    assert sum(evaluated) <= 2 * (tokens // 64) ** 2 + partial * 2 * 128
