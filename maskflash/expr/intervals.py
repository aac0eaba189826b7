"""Operations on intervals of values, box by box: the arithmetic under `bounds`.

Integers are bounded in int64 and given their dtype's whole range where they could wrap; floats are bounded in their
own dtype, since correctly rounded operations are monotone. NaN bounds mean "unknown", and every comparison with them
is a maybe. Truth is an interval too: (False, True) is a maybe.

Source: interval arithmetic (Moore, Interval Analysis, 1966).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskflash.expr.nodes import COMPARISONS, Node

SAFE = 2.0**62  # integers that stay below this in magnitude cannot have wrapped in int64
_INT64 = torch.iinfo(torch.int64)


class Interval(NamedTuple):
    """Inclusive bounds; tensors of shapes that broadcast to the boxes'."""

    lo: Tensor
    hi: Tensor


def operation(node: Node, args: list[Interval], dtype: torch.dtype, magnitude: float) -> tuple[Interval, Tensor | None]:
    """The interval of a computed node, and where its divisor may be zero."""
    op = "square" if node.op == "mul" and node.args[0] == node.args[1] and dtype != torch.bool else node.op
    if op in _CONNECTIVES:
        return _CONNECTIVES[op](*map(truth, args)), None
    if op == "select":
        return _select(truth(args[0]), *(_convert(arg, node.dtype) for arg in args[1:])), None
    if op == "cast":
        return _convert(args[0], node.dtype), None
    args = [_convert(arg, dtype) for arg in args]
    if op in COMPARISONS:
        return _COMPARISONS[op](*map(widen, args)), None
    if dtype.is_floating_point:
        return _FLOAT[op](*args) if op in _FLOAT else unknown(args, dtype), None
    if dtype == torch.bool and op in _BOOLEAN:
        return _BOOLEAN[op](*args), None
    args = [widen(arg) for arg in args]
    fault = (args[1].lo <= 0) & (args[1].hi >= 0) if op in ("floordiv", "mod", "truncdiv", "fmod") else None
    if magnitude >= SAFE:
        return (_unless_far(op, args, dtype) if op in _ORDER else unknown(args, dtype)), fault
    return _narrow(_INTEGER[op](*args), dtype), fault


def truth(x: Interval) -> Interval:
    """Bounds of the truth of a value (zero is false, anything else true)."""
    if x.lo.dtype == torch.bool:
        return x
    zero = (x.lo == 0) & (x.hi == 0)
    return Interval((x.lo > 0) | (x.hi < 0), ~zero)


# Conversions


def widen(x: Interval) -> Interval:
    """Integers (and bools) in int64, floats as they are."""
    if x.lo.dtype.is_floating_point or x.lo.dtype == torch.int64:
        return x
    return Interval(x.lo.to(torch.int64), x.hi.to(torch.int64))


def _narrow(x: Interval, dtype: torch.dtype) -> Interval:
    """int64 bounds as bounds of `dtype`, which may have wrapped."""
    if dtype == torch.int64:
        return x
    if dtype == torch.bool:
        return truth(x)
    info = torch.iinfo(dtype)
    fits = (x.lo >= info.min) & (x.hi <= info.max)
    return Interval(torch.where(fits, x.lo, info.min).to(dtype), torch.where(fits, x.hi, info.max).to(dtype))


def _convert(x: Interval, dtype: torch.dtype) -> Interval:
    if x.lo.dtype == dtype:
        return x
    if dtype == torch.bool:
        return truth(x)
    if dtype.is_floating_point:  # rounding is monotone
        return Interval(x.lo.to(dtype), x.hi.to(dtype))
    if not x.lo.dtype.is_floating_point:
        return _narrow(widen(x), dtype)
    info = torch.iinfo(dtype)
    fits = (x.lo.to(torch.float64) > info.min) & (x.hi.to(torch.float64) < info.max)  # False for NaN
    lo, hi = (torch.where(fits, bound, 0).to(torch.int64) for bound in x)
    return _narrow(Interval(torch.where(fits, lo, _INT64.min), torch.where(fits, hi, _INT64.max)), dtype)


def unknown(args: list[Interval], dtype: torch.dtype) -> Interval:
    """Every value of the dtype, on the arguments' device."""
    like = args[0].lo
    if dtype.is_floating_point:
        return Interval(*[torch.full((), torch.nan, dtype=dtype, device=like.device)] * 2)
    low, high = (False, True) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return Interval(*(torch.tensor(bound, dtype=dtype, device=like.device) for bound in (low, high)))


def _unless_far(op: str, args: list[Interval], dtype: torch.dtype) -> Interval:
    """Bounds of sums and the like in the boxes where they stay far from the ends of int64; unknown in the others."""
    near = torch.ones((), dtype=torch.bool, device=args[0].lo.device)
    for bound in _ORDER[op](*(Interval(x.lo.to(torch.float64), x.hi.to(torch.float64)) for x in args)):
        near = near & (bound.abs() < SAFE)
    every = unknown(args, torch.int64)
    kept = (torch.where(near, *ends) for ends in zip(_ORDER[op](*args), every, strict=True))
    return _narrow(Interval(*kept), dtype)


# Rules, by kind of operand


def _corners(op: Callable[[Tensor, Tensor], Tensor], x: Interval, y: Interval) -> Interval:
    """Bounds of an operation that is monotone in each operand while the other is held."""
    values = [op(a, b) for a, b in itertools.product(x, y)]
    return Interval(
        torch.minimum(torch.minimum(values[0], values[1]), torch.minimum(values[2], values[3])),
        torch.maximum(torch.maximum(values[0], values[1]), torch.maximum(values[2], values[3])),
    )


def _monotone(op: Callable[[Tensor], Tensor]) -> Callable[[Interval], Interval]:
    return lambda x: Interval(op(x.lo), op(x.hi))


def _pairwise(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Interval, Interval], Interval]:
    return lambda x, y: Interval(op(x.lo, y.lo), op(x.hi, y.hi))


def _sub(x: Interval, y: Interval) -> Interval:
    return Interval(x.lo - y.hi, x.hi - y.lo)


def _square(x: Interval, _: Interval) -> Interval:
    """A number times itself, which is never negative; NaN where unknown."""
    ends = x.lo * x.lo, x.hi * x.hi
    low = torch.where((x.lo <= 0) & (x.hi >= 0), 0, torch.minimum(*ends))
    return Interval(low, torch.maximum(*ends))


def _neg(x: Interval) -> Interval:
    return Interval(-x.hi, -x.lo)


def _abs(x: Interval) -> Interval:
    """max(lo, -hi, 0) .. max(-lo, hi), kept NaN where unknown."""
    return Interval(torch.maximum(x.lo, -x.hi).clamp(min=0), torch.maximum(-x.lo, x.hi))


def _select(c: Interval, x: Interval, y: Interval) -> Interval:
    if x.lo.dtype == torch.bool:
        both = Interval(x.lo & y.lo, x.hi | y.hi)
    else:
        both = Interval(torch.minimum(x.lo, y.lo), torch.maximum(x.hi, y.hi))
    return Interval(*(torch.where(c.lo, a, torch.where(c.hi, m, b)) for a, m, b in zip(x, both, y, strict=True)))


def _without_zero(y: Interval) -> Interval:
    """The divisor with zero moved out; boxes where it was inside are overwritten by the caller."""
    spans = (y.lo <= 0) & (y.hi >= 0)
    return Interval(torch.where(spans, 1, y.lo), torch.where(spans, 1, y.hi))


def _spans_zero(x: Interval, y: Interval, quotient: Interval) -> Interval:
    """A quotient whose divisor may be zero is at most the dividend in magnitude (floor adds one)."""
    spans = (y.lo <= 0) & (y.hi >= 0)
    most = torch.maximum(x.lo.abs(), x.hi.abs()) + 1
    return Interval(torch.where(spans, -most, quotient.lo), torch.where(spans, most, quotient.hi))


def _division(rounding: str) -> Callable[[Interval, Interval], Interval]:
    def divide(x: Interval, y: Interval) -> Interval:
        quotient = _corners(lambda a, b: torch.div(a, b, rounding_mode=rounding), x, _without_zero(y))
        return _spans_zero(x, y, quotient)

    return divide


def _mod(x: Interval, y: Interval) -> Interval:
    """Python's remainder: the divisor's sign; exact where the divisor is one number and the quotient too."""
    n = _without_zero(y)
    low, high = x.lo.div(n.lo, rounding_mode="floor"), x.hi.div(n.lo, rounding_mode="floor")
    exact = (y.lo == y.hi) & (n.lo == y.lo) & (low == high)
    lo = torch.where(y.lo < 0, torch.minimum(y.lo + 1, torch.zeros_like(y.lo)), 0)
    hi = torch.where(y.hi > 0, torch.maximum(y.hi - 1, torch.zeros_like(y.hi)), 0)
    hi = torch.where((x.lo >= 0) & (y.lo > 0), torch.minimum(hi, x.hi), hi)
    # A fault's value is arbitrary: evaluation divides by one there, which leaves 0.
    return Interval(torch.where(exact, x.lo - low * n.lo, lo), torch.where(exact, x.hi - low * n.lo, hi))


def _fmod(x: Interval, y: Interval) -> Interval:
    """C's remainder: the dividend's sign, magnitude below the divisor's and at most the dividend's."""
    most = (torch.maximum(y.lo.abs(), y.hi.abs()) - 1).clamp(min=0)
    return Interval(torch.maximum(x.lo, -most).clamp(max=0), torch.minimum(x.hi, most).clamp(min=0))


def _shift(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Interval, Interval], Interval]:
    """Shifts as torch does: everything out, leaving 0 or -1, where the count is negative or not below the width."""

    def shift(x: Interval, y: Interval) -> Interval:
        strange = (y.lo < 0) | (y.hi > 62)
        moved = _corners(op, x, Interval(y.lo.clamp(0, 62), y.hi.clamp(0, 62)))
        lo = torch.where(strange, moved.lo.clamp(max=-1), moved.lo)
        return Interval(lo, torch.where(strange, moved.hi.clamp(min=0), moved.hi))

    return shift


def _ones_above(x: Tensor) -> Tensor:
    """The least 2**k - 1 that is at least x, for x >= 0."""
    for step in (1, 2, 4, 8, 16, 32):
        x = x | (x >> step)
    return x


def _bits(x: Interval, y: Interval) -> Interval:
    """Any bit operation stays within the signed width of its operands."""
    widest = torch.maximum(torch.maximum(x.lo.abs(), x.hi.abs()), torch.maximum(y.lo.abs(), y.hi.abs()))
    ones = _ones_above(widest)
    return Interval(-ones - 1, ones)


def _bitand(x: Interval, y: Interval) -> Interval:
    """Non-negative operands cap the result; below a mask of low ones it is a remainder."""
    general = _bits(x, y)
    lo = torch.where((x.lo >= 0) | (y.lo >= 0), 0, general.lo)
    hi = torch.where(x.lo >= 0, x.hi, general.hi)
    hi = torch.where(y.lo >= 0, torch.minimum(hi, y.hi), hi)
    low_ones = (y.lo == y.hi) & (y.lo >= 0) & ((y.lo & (y.lo + 1)) == 0)
    rest = _mod(x, Interval(y.lo.clamp(min=0) + 1, y.hi.clamp(min=0) + 1))
    return Interval(torch.where(low_ones, rest.lo, lo), torch.where(low_ones, rest.hi, hi))


def _bitor(x: Interval, y: Interval) -> Interval:
    general = _bits(x, y)
    plain = (x.lo >= 0) & (y.lo >= 0)
    lo = torch.where(plain, torch.maximum(x.lo, y.lo), general.lo)
    return Interval(lo, general.hi)


def _bitxor(x: Interval, y: Interval) -> Interval:
    general = _bits(x, y)
    return Interval(torch.where((x.lo >= 0) & (y.lo >= 0), 0, general.lo), general.hi)


def _finite(rule: Callable[..., Interval]) -> Callable[..., Interval]:
    """Unknown where an operand or the result may be infinite: inf - inf and 0 * inf are NaN, which no bound shows."""

    def careful(*args: Interval) -> Interval:
        result = rule(*args)
        finite = result.lo.isfinite() & result.hi.isfinite()
        for x in args:
            finite = finite & x.lo.isfinite() & x.hi.isfinite()
        return Interval(*(torch.where(finite, bound, torch.nan) for bound in result))

    return careful


def _float_division(x: Interval, y: Interval) -> Interval:
    quotient = _corners(torch.true_divide, x, y)
    spans = ~((y.lo > 0) | (y.hi < 0))
    return Interval(*(torch.where(spans, torch.nan, bound) for bound in quotient))


def _xor(x: Interval, y: Interval) -> Interval:
    return Interval((x.lo & ~y.hi) | (~x.hi & y.lo), ~((x.lo & y.lo) | (~x.hi & ~y.hi)))


def _both(x: Interval, y: Interval) -> Interval:
    return Interval(x.lo & y.lo, x.hi & y.hi)


def _either(x: Interval, y: Interval) -> Interval:
    return Interval(x.lo | y.lo, x.hi | y.hi)


def _not(x: Interval) -> Interval:
    return Interval(~x.hi, ~x.lo)


def _less(x: Interval, y: Interval) -> Interval:
    return Interval(x.hi < y.lo, ~(x.lo >= y.hi))


def _less_equal(x: Interval, y: Interval) -> Interval:
    return Interval(x.hi <= y.lo, ~(x.lo > y.hi))


def _equal(x: Interval, y: Interval) -> Interval:
    points = (x.lo == x.hi) & (y.lo == y.hi)
    return Interval(points & (x.lo == y.lo), ~((x.hi < y.lo) | (y.hi < x.lo)))


_Rule = Callable[..., Interval]
_CONNECTIVES: dict[str, _Rule] = {"and": _both, "or": _either, "not": _not}
_COMPARISONS: dict[str, _Rule] = {
    "lt": _less,
    "le": _less_equal,
    "gt": lambda x, y: _less(y, x),
    "ge": lambda x, y: _less_equal(y, x),
    "eq": _equal,
    "ne": lambda x, y: _not(_equal(x, y)),
}
_BOOLEAN: dict[str, _Rule] = {
    **{"bitand": _both, "mul": _both, "min": _both},
    **{"bitor": _either, "add": _either, "max": _either},
    **{"bitxor": _xor, "bitnot": _not},
}
_ORDER: dict[str, _Rule] = {
    "add": _pairwise(torch.add),
    "sub": _sub,
    "mul": lambda x, y: _corners(torch.mul, x, y),
    "square": _square,
    "neg": _neg,
    "abs": _abs,
    "min": _pairwise(torch.minimum),
    "max": _pairwise(torch.maximum),
}
_FLOAT: dict[str, _Rule] = {
    **_ORDER,
    **{name: _finite(_ORDER[name]) for name in ("add", "sub", "mul", "square")},
    **{name: _monotone(getattr(torch, name)) for name in ("floor", "ceil", "trunc", "round")},
    "sqrt": _finite(_monotone(torch.sqrt)),
    "truediv": _finite(_float_division),
}
_INTEGER: dict[str, _Rule] = {
    **_ORDER,
    **{name: lambda x: x for name in ("floor", "ceil", "trunc", "round")},
    "floordiv": _division("floor"),
    "truncdiv": _division("trunc"),
    "mod": _mod,
    "fmod": _fmod,
    "shl": _shift(torch.bitwise_left_shift),
    "shr": _shift(torch.bitwise_right_shift),
    "bitand": _bitand,
    "bitor": _bitor,
    "bitxor": _bitxor,
    "bitnot": lambda x: Interval(~x.hi, ~x.lo),
}
