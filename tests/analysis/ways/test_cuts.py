"""Between neighbouring cuts a mask is constant, and what compares anything else has none."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.ways.cuts import Cuts, find_cuts
from tests.predicates import affine_masks

TABLE = torch.arange(9)


def cuts_of(predicate):
    traced = mf.mask(predicate).traced({})
    return find_cuts(traced.expr, traced.bind({}).params)


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        (lambda b, h, q, kv: q >= kv, Cuts((), (), (0, 1))),
        (lambda b, h, q, kv: kv < 5, Cuts((), (5, 6), ())),
        (lambda b, h, q, kv: 2 * q > 7, Cuts((4,), (), ())),
        (lambda b, h, q, kv: 3 * kv - 3 * q < 7, Cuts((), (), (-2,))),
        (lambda b, h, q, kv: abs(q - kv) <= 4, Cuts((), (), (-4, -3, 0, 1, 4, 5))),
        (lambda b, h, q, kv: max(kv, 3) <= q, Cuts((3, 4), (3, 4), (0, 1))),
        (lambda b, h, q, kv: (q if q > 5 else 9) >= 7, Cuts((5, 6, 7, 8), (), ())),
        (lambda b, h, q, kv: True, Cuts((), (), ())),
    ],
)
def test_the_lines(predicate, expected):
    assert cuts_of(predicate) == expected


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, h, q, kv: q >= 2 * kv,
        lambda b, h, q, kv: q + kv > 9,
        lambda b, h, q, kv: q // 4 >= kv // 4,
        lambda b, h, q, kv: q * kv > 9,
        lambda b, h, q, kv: q >= kv + h,
        lambda b, h, q, kv: q * 0.5 >= kv,
        lambda b, h, q, kv: TABLE[q] > kv,
        lambda b, h, q, kv: (q > kv) + (q > 5) == 1,
        lambda b, h, q, kv: abs(abs(abs(abs(q - kv) - 1) - 2) - 3) < 4,
    ],
)
def test_what_is_no_such_comparison(predicate):
    assert cuts_of(predicate) is None


@given(affine_masks())
def test_the_mask_is_constant_between_them(mask):
    traced = mask.traced({})
    cuts = find_cuts(traced.expr, traced.bind({}).params)
    assert cuts is not None
    bits = mask.dense(24, 24)[0, 0]
    kinds = {}
    for q, kv in itertools.product(range(24), range(24)):
        cell = tuple(
            sum(cut <= place for cut in lines)
            for lines, place in ((cuts.rows, q), (cuts.columns, kv), (cuts.diagonals, q - kv))
        )
        assert kinds.setdefault(cell, bool(bits[q, kv])) == bool(bits[q, kv])


@given(st.integers(-9, 9), st.integers(1, 5), st.integers(-30, 30))
def test_the_root_is_exact(sign, factor, constant):
    factor = factor if sign >= 0 else -factor
    cuts = cuts_of(lambda b, h, q, kv: factor * q + constant >= 0)
    turns = [q for q in range(-40, 40) if (factor * q + constant >= 0) != (factor * (q - 1) + constant >= 0)]
    assert set(turns) <= set(cuts.rows)
