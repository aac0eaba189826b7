"""Intervals of operands -> the interval of a result, box by box: the arithmetic under `bounds`.

Integers are bounded in int64 and given their dtype's whole range where they could wrap; floats are bounded in their
own dtype, since correctly rounded operations are monotone. NaN bounds mean "unknown", and every comparison with them
is a maybe. Truth is an interval too: (False, True) is a maybe. `ops.py` says which operation has which rules.

Source: interval arithmetic (Moore, Interval Analysis, 1966).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SAFE = 2.0**62  # integers that stay below this in magnitude cannot have wrapped in int64
_INT64 = torch.iinfo(torch.int64)


class Interval(NamedTuple):
    """Inclusive bounds; tensors of shapes that broadcast to the boxes'."""

    lo: Tensor
    hi: Tensor


Rule = Callable[..., Interval]
"""The intervals of an operation's operands, all of one dtype -> the interval of its result."""


# Conversions


def truth(x: Interval) -> Interval:
    """Bounds of the truth of a value (zero is false, anything else true)."""
    if x.lo.dtype == torch.bool:
        return x
    zero = (x.lo == 0) & (x.hi == 0)
    return Interval((x.lo > 0) | (x.hi < 0), ~zero)


def widen(x: Interval) -> Interval:
    """Integers (and bools) in int64, floats as they are."""
    if x.lo.dtype.is_floating_point or x.lo.dtype == torch.int64:
        return x
    return Interval(x.lo.to(torch.int64), x.hi.to(torch.int64))


def narrow(x: Interval, dtype: torch.dtype) -> Interval:
    """int64 bounds as bounds of `dtype`, which may have wrapped."""
    if dtype == torch.int64:
        return x
    if dtype == torch.bool:
        return truth(x)
    info = torch.iinfo(dtype)
    fits = (x.lo >= info.min) & (x.hi <= info.max)
    return Interval(torch.where(fits, x.lo, info.min).to(dtype), torch.where(fits, x.hi, info.max).to(dtype))


def convert(x: Interval, dtype: torch.dtype) -> Interval:
    """Bounds of a value that is cast to a dtype."""
    if x.lo.dtype == dtype:
        return x
    if dtype == torch.bool:
        return truth(x)
    if dtype.is_floating_point:  # rounding is monotone
        return Interval(x.lo.to(dtype), x.hi.to(dtype))
    if not x.lo.dtype.is_floating_point:
        return narrow(widen(x), dtype)
    info = torch.iinfo(dtype)
    fits = (x.lo.to(torch.float64) > info.min) & (x.hi.to(torch.float64) < info.max)  # False for NaN
    lo, hi = (torch.where(fits, bound, 0).to(torch.int64) for bound in x)
    return narrow(Interval(torch.where(fits, lo, _INT64.min), torch.where(fits, hi, _INT64.max)), dtype)


def unknown(args: list[Interval], dtype: torch.dtype) -> Interval:
    """Every value of the dtype, on the arguments' device."""
    like = args[0].lo
    if dtype.is_floating_point:
        return Interval(*[torch.full((), torch.nan, dtype=dtype, device=like.device)] * 2)
    low, high = (False, True) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return Interval(*(torch.tensor(bound, dtype=dtype, device=like.device) for bound in (low, high)))


def unless_far(rule: Rule, args: list[Interval]) -> Interval:
    """Bounds of int64 by a rule that serves floats too, where a box stays far from int64's ends; unknown elsewhere."""
    near = torch.ones((), dtype=torch.bool, device=args[0].lo.device)
    for bound in rule(*(Interval(x.lo.to(torch.float64), x.hi.to(torch.float64)) for x in args)):
        near = near & (bound.abs() < SAFE)
    every = unknown(args, torch.int64)
    return Interval(*(torch.where(near, *ends) for ends in zip(rule(*args), every, strict=True)))


def spans_zero(x: Interval) -> Tensor:
    """Where a divisor may be zero."""
    return (x.lo <= 0) & (x.hi >= 0)


# Rules of numbers, integers and floats alike


def corners(op: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """The rule of an operation that is monotone in each operand while the other is held."""

    def rule(x: Interval, y: Interval) -> Interval:
        values = [op(a, b) for a, b in itertools.product(x, y)]
        return Interval(
            torch.minimum(torch.minimum(values[0], values[1]), torch.minimum(values[2], values[3])),
            torch.maximum(torch.maximum(values[0], values[1]), torch.maximum(values[2], values[3])),
        )

    return rule


def rising(op: Callable[..., Tensor]) -> Rule:
    """The rule of an operation that grows with each operand."""
    return lambda *args: Interval(op(*(x.lo for x in args)), op(*(x.hi for x in args)))


def sub(x: Interval, y: Interval) -> Interval:
    """`x - y`, which falls as y grows."""
    return Interval(x.lo - y.hi, x.hi - y.lo)


mul = corners(torch.mul)


def square(x: Interval, _: Interval) -> Interval:
    """A number times itself, which is never negative; NaN where unknown."""
    ends = x.lo * x.lo, x.hi * x.hi
    low = torch.where(spans_zero(x), 0, torch.minimum(*ends))
    return Interval(low, torch.maximum(*ends))


def neg(x: Interval) -> Interval:
    """`-x`."""
    return Interval(-x.hi, -x.lo)


def absolute(x: Interval) -> Interval:
    """max(lo, -hi, 0) .. max(-lo, hi), kept NaN where unknown."""
    return Interval(torch.maximum(x.lo, -x.hi).clamp(min=0), torch.maximum(-x.lo, x.hi))


def select(c: Interval, x: Interval, y: Interval) -> Interval:
    """`x if c else y`: where c is a maybe, whatever either may be."""
    if x.lo.dtype == torch.bool:
        both = Interval(x.lo & y.lo, x.hi | y.hi)
    else:
        both = Interval(torch.minimum(x.lo, y.lo), torch.maximum(x.hi, y.hi))
    return Interval(*(torch.where(c.lo, a, torch.where(c.hi, m, b)) for a, m, b in zip(x, both, y, strict=True)))


# Rules of integers


def same(x: Interval) -> Interval:
    """The operand itself: an integer is round already."""
    return x


def division(rounding: str) -> Rule:
    """A quotient that is rounded "floor" or "trunc"."""
    divide = corners(lambda a, b: torch.div(a, b, rounding_mode=rounding))

    def rule(x: Interval, y: Interval) -> Interval:
        quotient = divide(x, _without_zero(y))
        most = torch.maximum(x.lo.abs(), x.hi.abs()) + 1  # whatever the divisor, floor adding one
        spans = spans_zero(y)
        return Interval(torch.where(spans, -most, quotient.lo), torch.where(spans, most, quotient.hi))

    return rule


def _without_zero(y: Interval) -> Interval:
    """The divisor with zero moved out; boxes where it was inside are overwritten by the caller."""
    spans = spans_zero(y)
    return Interval(torch.where(spans, 1, y.lo), torch.where(spans, 1, y.hi))


def mod(x: Interval, y: Interval) -> Interval:
    """Python's remainder: the divisor's sign; exact where the divisor is one number and the quotient too."""
    n = _without_zero(y)
    low, high = x.lo.div(n.lo, rounding_mode="floor"), x.hi.div(n.lo, rounding_mode="floor")
    exact = (y.lo == y.hi) & (n.lo == y.lo) & (low == high)
    lo = torch.where(y.lo < 0, torch.minimum(y.lo + 1, torch.zeros_like(y.lo)), 0)
    hi = torch.where(y.hi > 0, torch.maximum(y.hi - 1, torch.zeros_like(y.hi)), 0)
    hi = torch.where((x.lo >= 0) & (y.lo > 0), torch.minimum(hi, x.hi), hi)
    # A fault's value is arbitrary: evaluation divides by one there, which leaves 0.
    return Interval(torch.where(exact, x.lo - low * n.lo, lo), torch.where(exact, x.hi - low * n.lo, hi))


def fmod(x: Interval, y: Interval) -> Interval:
    """C's remainder: the dividend's sign, magnitude below the divisor's and at most the dividend's."""
    most = (torch.maximum(y.lo.abs(), y.hi.abs()) - 1).clamp(min=0)
    return Interval(torch.maximum(x.lo, -most).clamp(max=0), torch.minimum(x.hi, most).clamp(min=0))


def shift(op: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Shifts as torch does: everything out, leaving 0 or -1, where the count is negative or not below the width."""
    move = corners(op)

    def rule(x: Interval, y: Interval) -> Interval:
        strange = (y.lo < 0) | (y.hi > 62)
        moved = move(x, Interval(y.lo.clamp(0, 62), y.hi.clamp(0, 62)))
        lo = torch.where(strange, moved.lo.clamp(max=-1), moved.lo)
        return Interval(lo, torch.where(strange, moved.hi.clamp(min=0), moved.hi))

    return rule


def _bits(x: Interval, y: Interval) -> Interval:
    """Any bit operation stays within the signed width of its operands."""
    ones = torch.maximum(torch.maximum(x.lo.abs(), x.hi.abs()), torch.maximum(y.lo.abs(), y.hi.abs()))
    for step in (1, 2, 4, 8, 16, 32):  # to the least 2**k - 1 that is at least as much
        ones = ones | (ones >> step)
    return Interval(-ones - 1, ones)


def bitand(x: Interval, y: Interval) -> Interval:
    """Non-negative operands cap the result; below a mask of low ones it is a remainder."""
    general = _bits(x, y)
    lo = torch.where((x.lo >= 0) | (y.lo >= 0), 0, general.lo)
    hi = torch.where(x.lo >= 0, x.hi, general.hi)
    hi = torch.where(y.lo >= 0, torch.minimum(hi, y.hi), hi)
    low_ones = (y.lo == y.hi) & (y.lo >= 0) & ((y.lo & (y.lo + 1)) == 0)
    rest = mod(x, Interval(y.lo.clamp(min=0) + 1, y.hi.clamp(min=0) + 1))
    return Interval(torch.where(low_ones, rest.lo, lo), torch.where(low_ones, rest.hi, hi))


def bitor(x: Interval, y: Interval) -> Interval:
    """Of non-negative operands at least the larger one."""
    general = _bits(x, y)
    plain = (x.lo >= 0) & (y.lo >= 0)
    return Interval(torch.where(plain, torch.maximum(x.lo, y.lo), general.lo), general.hi)


def bitxor(x: Interval, y: Interval) -> Interval:
    """Of non-negative operands not negative."""
    general = _bits(x, y)
    return Interval(torch.where((x.lo >= 0) & (y.lo >= 0), 0, general.lo), general.hi)


def invert(x: Interval) -> Interval:
    """`~x`, of integers and truths."""
    return Interval(~x.hi, ~x.lo)


# Rules of floats


def finite(rule: Rule) -> Rule:
    """Unknown where an operand or the result may be infinite: inf - inf and 0 * inf are NaN, which no bound shows."""

    def careful(*args: Interval) -> Interval:
        result = rule(*args)
        finite = result.lo.isfinite() & result.hi.isfinite()
        for x in args:
            finite = finite & x.lo.isfinite() & x.hi.isfinite()
        return Interval(*(torch.where(finite, bound, torch.nan) for bound in result))

    return careful


def quotient(x: Interval, y: Interval) -> Interval:
    """`x / y`; NaN where the divisor may be zero, or NaN."""
    found = corners(torch.true_divide)(x, y)
    known = (y.lo > 0) | (y.hi < 0)
    return Interval(*(torch.where(known, bound, torch.nan) for bound in found))


def rising_nearly(op: Callable[[Tensor], Tensor]) -> Rule:
    """The rule of a function that grows, whose last bits depend on who computes it."""

    def rule(x: Interval) -> Interval:
        lo, hi = op(x.lo), op(x.hi)
        room, tiny = 8 * torch.finfo(lo.dtype).eps, torch.finfo(lo.dtype).tiny  # what is below it may be 0
        return Interval(lo - room * lo.abs() - tiny, hi + room * hi.abs() + tiny)

    return rule


def waving(x: Interval) -> Interval:
    """A sine or cosine, from -1 to 1; unknown where the operand may be infinite."""
    known = x.lo.isfinite() & x.hi.isfinite()
    return Interval(*(torch.where(known, end, torch.nan).to(x.lo.dtype) for end in (-1.0, 1.0)))


# Rules of truths, and of comparisons of whatever


def both(x: Interval, y: Interval) -> Interval:
    """`x and y`."""
    return Interval(x.lo & y.lo, x.hi & y.hi)


def either(x: Interval, y: Interval) -> Interval:
    """`x or y`."""
    return Interval(x.lo | y.lo, x.hi | y.hi)


def differing(x: Interval, y: Interval) -> Interval:
    """`x ^ y`."""
    return Interval((x.lo & ~y.hi) | (~x.hi & y.lo), ~((x.lo & y.lo) | (~x.hi & ~y.hi)))


def less(x: Interval, y: Interval) -> Interval:
    """`x < y`."""
    return Interval(x.hi < y.lo, ~(x.lo >= y.hi))


def less_equal(x: Interval, y: Interval) -> Interval:
    """`x <= y`."""
    return Interval(x.hi <= y.lo, ~(x.lo > y.hi))


def equal(x: Interval, y: Interval) -> Interval:
    """`x == y`."""
    points = (x.lo == x.hi) & (y.lo == y.hi)
    return Interval(points & (x.lo == y.lo), ~((x.hi < y.lo) | (y.hi < x.lo)))


def unequal(x: Interval, y: Interval) -> Interval:
    """`x != y`."""
    return invert(equal(x, y))


def swapped(rule: Rule) -> Rule:
    """The rule for operands that are swapped."""
    return lambda x, y: rule(y, x)
