"""Which rows see a column, as bits: the statements say of every pair what the mask's expression says."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton.emit import emit
from maskflash.backends.triton.emit_shown import emit_shown
from maskflash.backends.triton.signature import TableKind

ROWS, COLUMNS, START = 64, 40, 7
_LIMIT = 2**31 - 1


class Pointer:
    """A table's address, to which indices times strides are added."""

    def __init__(self, table, place=0):
        self.table, self.place = table, place

    def __add__(self, offset):
        return Pointer(self.table, self.place + offset)


def load(pointer, mask=True, other=0):
    mask = torch.as_tensor(mask)
    place = torch.where(mask, torch.as_tensor(pointer.place), 0)
    return torch.where(mask, pointer.table.flatten()[place], other)


# Triton's operations on torch's tensors. Integers are of 64 bits, so nothing that is narrow can wrap here.
TL = SimpleNamespace(
    where=torch.where,
    load=load,
    full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    int64=torch.int64,
    int32=torch.int64,
    int1=torch.bool,
    maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    abs=torch.abs,
)


def rows_from(t):
    t = torch.as_tensor(t)
    return torch.where(t < 64, torch.tensor(-1) << t.clamp(0, 63), 0)


def shown(problem):
    """Bits of the rows from START on for each column; None where the mask has none."""
    tables = problem.inputs.tables
    kinds = tuple(map(TableKind.of, tables))
    lines = emit_shown(problem.expr, kinds, narrow=True, negative_kv=False)
    if not lines:
        return None
    before = emit(problem.expr, kinds, narrow=True).lines
    names = {"tl": TL, "rows_from": rows_from, "b": torch.tensor(0), "h": torch.tensor(0)}
    names |= {"kv": torch.arange(COLUMNS), "q_first": START, "q": torch.arange(START, START + ROWS)}
    names |= {f"p{slot}": torch.tensor(int(value)) for slot, value in enumerate(problem.inputs.params)}
    for slot, table in enumerate(tables):
        names[f"t{slot}"] = Pointer(table)
        for axis in range(table.ndim):
            names[f"t{slot}_size{axis}"] = torch.tensor(table.shape[axis])
            names[f"t{slot}_stride{axis}"] = torch.tensor(table.contiguous().stride(axis))
    for line in (*before["once"], *before["rows"], *before["columns"], *lines):
        exec(line, names)
    return torch.as_tensor(names["shown"]).expand(COLUMNS)


def assert_shown(made, **tables):
    problem = made.at(START + ROWS, COLUMNS, **tables).tiled((128, 64))
    word = shown(problem)
    assert word is not None, "the mask has no bits"
    bits = (word[None, :] >> torch.arange(ROWS)[:, None]) & 1
    assert torch.equal(bits != 0, made.at(START + ROWS, COLUMNS, **tables).dense()[0, 0, START:])


FAR = torch.tensor([-_LIMIT - 1, _LIMIT, 0, 30, 63, 64, 70, 71, 72, -1]).repeat(4)
NEAR = torch.arange(COLUMNS) * 2 - 5


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, kv, x, y: q >= kv,
        lambda b, h, q, kv, x, y: (q >= x[kv]) & (q < y[kv]),
        lambda b, h, q, kv, x, y: not (q < x[kv] or q > y[kv]),
        lambda b, h, q, kv, x, y: x[kv] == q or q + 3 != y[kv],
        lambda b, h, q, kv, x, y: (q - 9 <= kv) ^ (x[kv] > 3),
        lambda b, h, q, kv, x, y: (kv - q > -4) & (kv - q <= 30),
        lambda b, h, q, kv, x, y: (q <= y[kv]) == (q > kv),
        lambda b, h, q, kv, x, y: (kv < 4) | (q - kv < 20 if y[kv] > 10 else q > 50),
        lambda b, h, q, kv, x, y: 5 - (kv - q) > y[kv] - 2,
        lambda b, h, q, kv, x, y: q > 11,
        lambda b, h, q, kv, x, y: kv > 11,
    ],
)
def test_bits_are_what_the_mask_shows(rule):
    made = mf.mask(lambda b, h, q, kv, *, x, y: rule(b, h, q, kv, x, y))
    assert_shown(made, x=NEAR, y=NEAR.flip(0))


def test_numbers_far_from_the_rows():
    assert_shown(mf.mask(lambda b, h, q, kv, *, x: (q >= x[kv]) | (q == x[kv]) | (q + 1 <= x[kv])), x=FAR)
    assert_shown(mf.mask(lambda b, h, q, kv, *, x: q > x[kv]), x=FAR)


@given(st.lists(st.tuples(*(st.integers(0, n - 1) for n in (5, 4, 6, 5))), min_size=1, max_size=5))
def test_any_logic_of_comparisons(drawn):
    def rule(b, h, q, kv, x, y):
        found = q >= 0
        for left, right, op, join in drawn:
            m = [q, q + 4, q - kv, kv - q, q + x[kv]][left]
            n = [kv, x[kv], y[kv] - kv, 3][right]
            other = [m < n, m <= n, m > n, m >= n, m == n, m != n][op]
            found = [found & other, found | other, found ^ other, ~found & other, found == other][join]
        return found

    made = mf.mask(lambda b, h, q, kv, *, x, y: rule(b, h, q, kv, x, y))
    assert_shown(made, x=NEAR, y=NEAR.flip(0))


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, kv, x: x[q] == x[kv],  # what rows look up
        lambda b, h, q, kv, x: (q ^ kv) % 3 == 0,
        lambda b, h, q, kv, x: abs(q - kv) < 4,
        lambda b, h, q, kv, x: q + q > kv,
        lambda b, h, q, kv, x: q // 4 >= kv,
        lambda b, h, q, kv, x: q * 1.0 > kv,
    ],
)
def test_what_has_no_bits(rule):
    made = mf.mask(lambda b, h, q, kv, *, x: rule(b, h, q, kv, x))
    assert shown(made.at(80, 80, x=torch.arange(80)).tiled((128, 64))) is None


def test_wide_numbers_have_none():
    expr = mf.causal().at(8, 8).tiled((128, 64)).expr
    assert emit_shown(expr, (), narrow=True, negative_kv=False)
    assert emit_shown(expr, (), narrow=False, negative_kv=False) == []
