"""Masks with numbers near the ends of 64 bits: every way to a map finds what evaluating each pair does."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.classify import by_columns, by_ends, by_lines, by_tiles, classify
from maskflash.analysis.facts import Facts
from maskflash.analysis.ways.columns import find_pieces
from maskflash.analysis.ways.coverage import cover

FAR = st.one_of(
    st.sampled_from([2**63 - 1, -(2**63), 2**62, -(2**62), 2**61, -(2**61), 2**60, 0]), st.integers(-(2**63), 2**63 - 1)
)
NEAR = st.integers(-3, 3)
NUMBER = st.builds(lambda far, near: max(-(2**63), min(2**63 - 1, far + near)), FAR, NEAR)
COMPARED = [
    lambda q, kv, n, m: q - n <= kv,
    lambda q, kv, n, m: kv <= q + n,
    lambda q, kv, n, m: q - n >= kv - m,
    lambda q, kv, n, m: abs((q - n) - (kv - n)) <= 3,
    lambda q, kv, n, m: abs((q - n) - (kv - m)) <= 3,
    lambda q, kv, n, m: q - kv - n >= -m,
    lambda q, kv, n, m: abs(q - kv) <= n,
    lambda q, kv, n, m: -(q - n) <= -(kv - n),
    lambda q, kv, n, m: max(q - n, kv) <= min(kv - m, q),
    lambda q, kv, n, m: (q - n) * 2 >= kv + m,
    lambda q, kv, n, m: (q - n) // 3 == (kv - n) // 3,
    lambda q, kv, n, m: ~(q - n) <= kv - m,
    lambda q, kv, n, m: q < n or kv >= m,
]


@st.composite
def problems(draw):
    """A comparison, or two joined, with numbers or a table of them; and a small call."""
    whole = None
    for _ in range(draw(st.integers(1, 2))):
        compare, n, m = draw(st.sampled_from(COMPARED)), draw(NUMBER), draw(NUMBER)
        if draw(st.booleans()):
            values = torch.tensor(draw(st.lists(NUMBER, min_size=8, max_size=8)))
            if draw(st.booleans()):
                values = values.sort(descending=draw(st.booleans())).values
            found = mf.mask(lambda b, h, q, kv, v=None, x=values: x[q] <= x[kv])
        else:
            found = mf.mask(lambda b, h, q, kv, f=compare, n=n, m=m: f(q, kv, n, m))
        whole = found if whole is None else whole & found if draw(st.booleans()) else whole | found
    return whole


@given(problems(), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_every_way_is_exact(mask, q_len, kv_len):
    problem = mask.at(q_len, kv_len).tiled((2, 2))
    seen = mask.dense(q_len, kv_len)
    expected = mf.BlockMap.from_kinds(kinds(seen[0, 0]), q_len, kv_len, (2, 2)).kinds()
    assert torch.equal(classify(problem).block_map.kinds(), expected)
    facts = Facts(problem)
    for way in (by_lines, by_ends, by_columns, partial(by_tiles, otherwise=())):
        if (found := way(facts)) is not None:
            assert torch.equal(found.block_map.kinds(), expected), way
    for rows in (facts.rows, facts.intervals):
        assert rows is None or torch.equal(rows.count[0, 0], seen[0, 0].sum(1))


def kinds(seen):
    """Of tiles of 2 x 2, from pairs."""
    rows = [[tile for tile in band.split(2, 1)] for band in seen.split(2, 0)]
    return torch.tensor([[int(tile.any()) + int(tile.all()) for tile in row] for row in rows], dtype=torch.int8)[
        None, None
    ]


@pytest.mark.parametrize("base", [2**61, 2**61 + 2**60, -(2**61)])
def test_differences_from_a_far_base_have_formulas(base):
    mask = mf.mask(lambda b, h, q, kv: abs((q - base) - (kv - base)) <= 100)
    decided = mf.compile(mask).explain(4096, 4096).to_dict()["decided"]
    assert [how for how, tiles in decided.items() if tiles] == ["formula"]


def test_rows_that_descend_to_the_least_number_are_cut_where_they_turn():
    values = torch.tensor([2**63 - 1, 5, -(2**63) + 1, -(2**63)])
    mask = mf.mask(lambda b, h, q, kv: values[q] <= values[kv])
    problem = mask.at(4, 4).tiled((1, 1))
    assert torch.equal(cover(find_pieces(problem)).kinds()[0, 0] == 2, mask.dense(4, 4)[0, 0])
