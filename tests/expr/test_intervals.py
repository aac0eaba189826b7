"""Each interval rule encloses its operation, over every small interval of integers and over corner cases of floats."""

import itertools
import math

import pytest
import torch

from maskflash.expr.bounds import _reach, _size, _wide_size, operation
from maskflash.expr.evaluate import Inputs
from maskflash.expr.intervals import Interval, truth
from maskflash.expr.nodes import Node, operand_dtype, result_type
from maskflash.expr.ops import OPERATIONS
from maskflash.expr.ranges import RangeMinima

ENDS = [-9, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 7]
SPANS = [(lo, hi) for lo, hi in itertools.product(ENDS, ENDS) if lo <= hi]
INTEGER_BINARY = ["add", "sub", "mul", "floordiv", "mod", "truncdiv", "fmod", "min", "max"]
INTEGER_BINARY += ["shl", "shr", "bitand", "bitor", "bitxor", "eq", "ne", "lt", "le", "gt", "ge"]
LAX = {"shl", "shr", "bitor", "bitxor", "bitand", "fmod", "mod", "truncdiv", "floordiv"}  # not tight on every interval


def bound(op, dtype, spans):
    """Interval of an operation on operands of these spans, each a tensor (n, 2)."""
    kinds = [Node("lookup", (), dtype)] * len(spans)
    result, weak = result_type(op, kinds)
    node = Node(op, tuple(range(len(spans))), result, weak)
    reaches = [(0, 1) if dtype.is_floating_point else (int(span.min()), int(span.max())) for span in spans]
    magnitude = _size(_reach(node, reaches, Inputs(), RangeMinima()))
    args = [Interval(span[:, 0], span[:, 1]) for span in spans]
    return operation(node, args, operand_dtype(node, kinds), magnitude)


def apply(op, dtype, *values):
    """The operation on elements, as `evaluate` computes it where nothing is faulty."""
    kinds = [Node("lookup", (), dtype)] * len(values)
    node = Node(op, (), *result_type(op, kinds))
    return OPERATIONS[op].compute(*(value.to(operand_dtype(node, kinds)) for value in values))


@pytest.mark.parametrize("op", INTEGER_BINARY)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_binary_rules_on_integers(op, dtype):
    pairs = list(itertools.product(SPANS, SPANS))
    spans = torch.tensor(pairs, dtype=dtype)
    result, fault = bound(op, dtype, [spans[:, 0], spans[:, 1]])
    lo, hi = (end.expand(len(pairs)).tolist() for end in result)
    values = torch.arange(-9, 8, dtype=dtype)
    x, y = values.view(-1, 1), values.view(1, -1)
    divides = fault is not None
    table = apply(op, dtype, x, torch.where(y == 0, 1, y) if divides else y)
    tight = 0
    for place, ((x_lo, x_hi), (y_lo, y_hi)) in enumerate(pairs):
        part = table[x_lo + 9 : x_hi + 10, y_lo + 9 : y_hi + 10]
        if divides:
            assert bool(fault[place]) == (y_lo <= 0 <= y_hi)
            part = part[:, [y != 0 for y in range(y_lo, y_hi + 1)]]
            if not part.numel():
                continue
        low, high = part.min().item(), part.max().item()
        assert lo[place] <= low, (pairs[place], lo[place], low)
        assert high <= hi[place], (pairs[place], hi[place], high)
        tight += lo[place] == low and hi[place] == high
    assert op in LAX or dtype != torch.int64 or tight == len(pairs)


@pytest.mark.parametrize("op", ["neg", "abs", "bitnot", "floor", "ceil", "trunc", "round"])
def test_unary_rules_on_integers(op):
    spans = torch.tensor(SPANS)
    result, _ = bound(op, torch.int64, [spans])
    for place, (lo, hi) in enumerate(SPANS):
        values = torch.arange(lo, hi + 1)
        exact = values if op in ("floor", "ceil", "trunc", "round") else apply(op, torch.int64, values)
        assert (result.lo[place], result.hi[place]) == (exact.min(), exact.max())


def squared(spans):
    """Interval of a number times itself."""
    node = Node("mul", (0, 0), spans.dtype)
    size = 0 if spans.is_floating_point() else max(map(abs, spans.flatten().tolist()))
    magnitude = _wide_size(node, [size] * 2)
    result, _ = operation(node, [Interval(spans[:, 0], spans[:, 1])] * 2, spans.dtype, magnitude)
    return (end.expand(len(spans)) for end in result)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_squares_are_exact_and_never_negative(dtype):
    spans = torch.tensor([span for span in SPANS if dtype.is_signed or span[0] >= 0], dtype=dtype)
    for place, (lo, hi) in enumerate(zip(*(end.tolist() for end in squared(spans)), strict=True)):
        first, last = spans[place].tolist()
        values = torch.arange(first, last + 1) ** 2
        assert (lo, hi) == (0 if first <= 0 <= last else values.min(), values.max())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_squares_that_may_wrap_are_unknown_or_right(dtype):
    info = torch.iinfo(dtype)
    root = math.isqrt(info.max)
    ends = sorted({max(e, info.min) for e in (info.min, -root - 1, -root, -1, 0, 1, root, root + 1, info.max)})
    spans = torch.tensor([(lo, hi) for lo in ends for hi in ends if lo <= hi], dtype=dtype)
    lo, hi = squared(spans)
    for value in (spans[:, 0], spans[:, 1], torch.zeros_like(lo).clamp(spans[:, 0], spans[:, 1])):
        assert (lo <= value * value).all() and (value * value <= hi).all()


def test_squares_of_what_may_be_infinite_or_nan_are_unknown():
    spans = torch.tensor([(-INF, 1.0), (0.0, INF), (NAN, NAN), (-3e38, 2.0)])
    lo, hi = squared(spans)
    assert lo.isnan().all() and hi.isnan().all()


@pytest.mark.parametrize("op", ["add", "sub", "mul", "neg", "abs", "bitnot", "shl"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_what_may_wrap_is_unknown_or_right(op, dtype):
    info = torch.iinfo(dtype)
    ends = sorted({info.min, info.min // 2, 0, 1, 5, info.max // 2, info.max - 1, info.max})
    spans = torch.tensor([(lo, hi) for lo in ends for hi in ends if lo <= hi], dtype=dtype)
    pairs = list(itertools.product(range(len(spans)), repeat=OPERATIONS[op].arity))
    chosen = [spans[[pair[k] for pair in pairs]] for k in range(OPERATIONS[op].arity)]
    result, _ = bound(op, dtype, chosen)
    lo, hi = (end.expand(len(pairs)) for end in result)
    for corner in itertools.product((0, 1), repeat=OPERATIONS[op].arity):
        value = apply(op, dtype, *(span[:, end] for span, end in zip(chosen, corner, strict=True)))
        assert (lo <= value).all()
        assert (value <= hi).all()


INF, NAN = float("inf"), float("nan")
REALS = torch.tensor([-INF, -3e38, -2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3e38, INF])


@pytest.mark.parametrize("op", ["add", "sub", "mul", "truediv", "min", "max", "sqrt", "neg", "abs", "floor", "mod"])
def test_rules_on_floats_never_hide_a_nan(op):
    """Whatever a bounded value is compared with, the verdict holds for every element, NaN included."""
    places = [(i, j) for i in range(len(REALS)) for j in range(i, len(REALS))]
    pairs = list(itertools.product(places, repeat=OPERATIONS[op].arity))
    spans = [torch.stack([REALS[list(pair[k])] for pair in pairs]) for k in range(OPERATIONS[op].arity)]
    result, _ = bound(op, torch.float32, spans)
    lo, hi = (end.expand(len(pairs)) for end in result)
    values = apply(op, torch.float32, *(REALS.view(-1, 1), REALS.view(1, -1))[: OPERATIONS[op].arity])
    for place, pair in enumerate(pairs):
        part = values[tuple(slice(i, j + 1) for i, j in pair)]
        assert lo[place].isnan() == hi[place].isnan()  # half a bound decides comparisons
        if not lo[place].isnan():
            assert not part.isnan().any(), (op, pair, lo[place], hi[place])
            assert (part >= lo[place]).all()
            assert (part <= hi[place]).all()


def test_truths():
    spans = [(0, 0), (0, 3), (-2, 0), (1, 5), (-4, -1), (-1, 1)]
    found = truth(Interval(*torch.tensor(spans).T))
    assert found.lo.tolist() == [False, False, False, True, True, False]
    assert found.hi.tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("op", ["bitand", "bitor", "bitxor", "min", "max", "add", "mul", "and", "or", "eq", "lt", "le"])
def test_rules_on_truths_are_exact(op):
    spans = [(False, False), (False, True), (True, True)]
    pairs = torch.tensor(list(itertools.product(spans, spans)))
    result, _ = bound(op, torch.bool, [pairs[:, 0], pairs[:, 1]])
    for place, ((x_lo, x_hi), (y_lo, y_hi)) in enumerate(itertools.product(spans, spans)):
        x = torch.tensor([x_lo, x_hi]).view(-1, 1)
        y = torch.tensor([y_lo, y_hi]).view(1, -1)
        exact = apply(op, torch.bool, x, y)
        assert (result.lo[place], result.hi[place]) == (exact.all(), exact.any())


def test_conversions():
    wide = Interval(torch.tensor([-3, 0, 250, 300]), torch.tensor([4, 7, 260, 301]))
    node = Node("cast", (0,), torch.uint8)
    narrow, _ = operation(node, [wide], torch.uint8, 0.0)
    assert narrow.lo.tolist() == [0, 0, 0, 0]
    assert narrow.hi.tolist() == [255, 7, 255, 255]
    real = Interval(torch.tensor([-1.5, NAN, -1e30]), torch.tensor([2.9, NAN, 5.0]))
    whole, _ = operation(Node("cast", (0,), torch.int64), [real], torch.int64, 0.0)
    info = torch.iinfo(torch.int64)
    assert whole.lo.tolist() == [-1, info.min, info.min]
    assert whole.hi.tolist() == [2, info.max, info.max]


@pytest.mark.parametrize("op", ["tanh", "sigmoid", "erf", "atan", "sin", "cos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rules_of_limited_functions_hold_whoever_computes_them(op, dtype):
    ends = torch.tensor([-INF, -300.0, -7.0, -1.0, -1e-3, 0.0, 1e-30, 0.5, 2.0, 40.0, INF], dtype=dtype)
    spans = torch.stack([torch.stack((x, y)) for x in ends for y in ends if x <= y])
    lo, hi = bound(op, dtype, [spans])[0]
    assert hi[lo.isfinite()].abs().max() < 1.6
    for share in torch.linspace(0, 1, 17, dtype=dtype):
        values = torch.nan_to_num(spans[:, 0], neginf=-1e30) * (1 - share)
        values += torch.nan_to_num(spans[:, 1], posinf=1e30) * share
        exact = getattr(torch, op)(values.clamp(spans[:, 0], spans[:, 1]).double())
        assert not (exact < lo).any()  # NaN is never beyond
        assert not (exact > hi).any()
    assert bound(op, dtype, [torch.tensor([[NAN, NAN]], dtype=dtype)])[0].lo.isnan().all()
