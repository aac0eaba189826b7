"""The name of an operation -> what is known of it: one row for each, which every pass reads.

Passes that give operations a meaning of their own have their own tables: linear forms (`analysis/ways/cuts`), how far
integers reach (`bounds`), derivatives (`derivative`), Triton text (`backends/triton/emit`), CuTe text (`forms/cute`).
Tests hold those against this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from maskflash.expr import intervals as on
from maskflash.expr.intervals import Rule

INDEX_VARIABLES: Final = ("b", "h", "q", "kv")


class Bounds(NamedTuple):
    """The rules by which an operation is bounded, by what its operands are; without one its result is unknown."""

    integers: Rule | None = None
    reals: Rule | None = None
    truths: Rule | None = None


_UNKNOWN = Bounds()


@dataclass(frozen=True, slots=True)
class Operation:
    """What is known of an operation.

    Attributes:
        name: its name in expressions.
        arity: how many operands it has; None: any number.
        compute: torch's function, of operands that were converted to one dtype; None where evaluation has its own way.
        symbol: how Python writes it between its operands.
        method: Python's method for it, without underscores.
        called: names of torch's functions and methods for it.
        gives: a "truth", a "real" (also of integers), or the "same" dtype as its operands are promoted to.
        counts: Python's True and False are the numbers 1 and 0 to it.
        of_truths: torch takes bools as operands.
        of_reals: torch takes floats as operands.
        fixes: what a number on its right is, that becomes part of the structure (a bit mask's on either side).
        faults: it has no value for some operands: an index out of range, an integer divisor of zero.
        opposite: the comparison that holds where this one doesn't, but beside NaN.
        mirrored: the comparison that says the same of swapped operands.
        settled: the truth of one operand that settles it, whatever the other is.
        bounds: the rules of its result.
        inexact: its last bit depends on who computes it. Scores may use it; masks are the same everywhere.
    """

    name: str
    arity: int | None
    compute: Callable[..., Tensor] | None = None
    symbol: str = ""
    method: str = ""
    called: tuple[str, ...] = ()
    gives: Literal["same", "real", "truth"] = "same"
    counts: bool = False
    of_truths: bool = True
    of_reals: bool = True
    fixes: Literal["", "divisor", "count", "mask"] = ""
    faults: bool = False
    opposite: str = ""
    mirrored: str = ""
    settled: bool | None = None
    bounds: Bounds = _UNKNOWN
    inexact: bool = False


def _row(
    arity: int, name: str, compute: Callable[..., Tensor], bounds: Bounds, *also: str, symbol: str = "", **facts: Any
) -> Operation:
    """An operation under torch's name, and also under others; Python's method for a symbol is mostly our own name."""
    facts = {"method": name if symbol else "", "called": (compute.__name__, *also), **facts}
    return Operation(name, arity, compute, symbol, bounds=bounds, **facts)


_one, _two = partial(_row, 1), partial(_row, 2)
_number = partial(_one, of_truths=False, counts=True)
_division = partial(_two, of_truths=False, fixes="divisor", faults=True)
_shift = partial(_two, of_truths=False, of_reals=False, counts=True, fixes="count")
_bits = partial(_two, of_reals=False, fixes="mask")
_left, _right = torch.bitwise_left_shift, torch.bitwise_right_shift
_sum, _least, _most = (on.rising(compute) for compute in (torch.add, torch.minimum, torch.maximum))
_root = on.rising(torch.sqrt)


def _truncated(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="trunc")


def _rounding(compute: Callable[..., Tensor], *also: str) -> Operation:
    return _one(compute.__name__, compute, Bounds(on.same, on.rising(compute)), *also, of_truths=False)


def _smooth(compute: Callable[..., Tensor], bounds: Bounds = _UNKNOWN) -> Operation:
    return _one(compute.__name__, compute, bounds, gives="real", inexact=True)


def _comparison(
    compute: Callable[..., Tensor], symbol: str, opposite: str, mirrored: str, rule: Rule, *also: str
) -> Operation:
    facts = {"gives": "truth", "opposite": opposite, "mirrored": mirrored}
    return _two(compute.__name__, compute, Bounds(rule, rule), *also, symbol=symbol, **facts)


_TABLE = (
    *(Operation(name, 0) for name in (*INDEX_VARIABLES, "score", "const", "param")),
    Operation("lookup", None, faults=True),
    Operation("cast", 1),
    Operation("select", 3),
    # arithmetic
    _two("add", torch.add, Bounds(_sum, on.finite(_sum), on.either), symbol="+", counts=True),
    _two("sub", torch.sub, Bounds(on.sub, on.finite(on.sub)), "subtract", symbol="-", counts=True, of_truths=False),
    _two("mul", torch.mul, Bounds(on.mul, on.finite(on.mul), on.both), "multiply", symbol="*", counts=True),
    _two("truediv", torch.true_divide, Bounds(reals=on.finite(on.quotient)), symbol="/", gives="real", fixes="divisor"),
    _number("neg", torch.neg, Bounds(on.neg, on.neg), "negative", method="neg"),
    _number("abs", torch.abs, Bounds(on.absolute, on.absolute), "absolute", method="abs"),
    _two("min", torch.minimum, Bounds(_least, _least, on.both), "min"),
    _two("max", torch.maximum, Bounds(_most, _most, on.either), "max"),
    _one("sqrt", torch.sqrt, Bounds(reals=on.finite(_root)), gives="real"),
    *(_rounding(compute) for compute in (torch.floor, torch.ceil, torch.round)),
    _rounding(torch.trunc, "fix"),
    # what no two machines compute to the same bit
    *map(_smooth, (torch.exp, torch.exp2, torch.expm1, torch.log, torch.log2, torch.log1p, torch.rsqrt, torch.tan)),
    *(_smooth(fn, Bounds(reals=on.rising_nearly(fn))) for fn in (torch.tanh, torch.sigmoid, torch.erf, torch.atan)),
    *(_smooth(compute, Bounds(reals=on.waving)) for compute in (torch.sin, torch.cos)),
    Operation("pow", 2, torch.pow, inexact=True, of_truths=False),
    # division, rounded down or towards zero, and what it leaves
    _division("floordiv", torch.floor_divide, Bounds(on.division("floor")), symbol="//", counts=True),
    _division("mod", torch.remainder, Bounds(on.mod), symbol="%", counts=True),
    _division("fmod", torch.fmod, Bounds(on.fmod)),
    _division("truncdiv", _truncated, Bounds(on.division("trunc")), called=()),
    # bits
    _shift("shl", _left, Bounds(on.shift(_left)), symbol="<<", method="lshift"),
    _shift("shr", _right, Bounds(on.shift(_right)), symbol=">>", method="rshift"),
    _bits("bitand", torch.bitwise_and, Bounds(on.bitand, None, on.both), symbol="&", method="and", settled=False),
    _bits("bitor", torch.bitwise_or, Bounds(on.bitor, None, on.either), symbol="|", method="or", settled=True),
    _bits("bitxor", torch.bitwise_xor, Bounds(on.bitxor, None, on.differing), symbol="^", method="xor"),
    Operation("bitnot", 1, torch.bitwise_not, counts=True, of_reals=False, bounds=Bounds(on.invert, None, on.invert)),
    # truths
    _comparison(torch.eq, "==", "ne", "eq", on.equal),
    _comparison(torch.ne, "!=", "eq", "ne", on.unequal, "not_equal"),
    _comparison(torch.lt, "<", "ge", "gt", on.less, "less"),
    _comparison(torch.le, "<=", "gt", "ge", on.less_equal, "less_equal"),
    _comparison(torch.gt, ">", "le", "lt", on.swapped(on.less), "greater"),
    _comparison(torch.ge, ">=", "lt", "le", on.swapped(on.less_equal), "greater_equal"),
    Operation("and", 2, torch.logical_and, "and", gives="truth", settled=False, bounds=Bounds(truths=on.both)),
    Operation("or", 2, torch.logical_or, "or", gives="truth", settled=True, bounds=Bounds(truths=on.either)),
    Operation("not", 1, torch.logical_not, gives="truth", bounds=Bounds(truths=on.invert)),
)

OPERATIONS: Final = {operation.name: operation for operation in _TABLE}
COMPARISONS: Final = frozenset(name for name, operation in OPERATIONS.items() if operation.opposite)

# On truth values arithmetic is logic; torch refuses what is missing here.
ON_TRUTH: Final = {"add": "bitor", "max": "bitor", "mul": "bitand", "min": "bitand", "bitnot": "not"}
