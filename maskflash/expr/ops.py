"""The name of an operation -> what is known of it: one row for each, which every pass reads.

Passes that give operations a meaning of their own have their own tables: linear forms (`analysis/ways/cuts`), how far
integers reach (`bounds`), Triton text (`backends/triton/emit`). Tests hold those against this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, NamedTuple

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


def _rounding(name: str, compute: Callable[..., Tensor], *called: str) -> Operation:
    return Operation(
        name, 1, compute, called=(name, *called), of_truths=False, bounds=Bounds(on.same, on.rising(compute))
    )


def _comparison(
    name: str, compute: Callable[..., Tensor], symbol: str, opposite: str, mirrored: str, rule: Rule, *called: str
) -> Operation:
    names = (name, *called)
    bounds = Bounds(rule, rule)
    return Operation(
        name, 2, compute, symbol, name, names, gives="truth", opposite=opposite, mirrored=mirrored, bounds=bounds
    )


_division = partial(Operation, of_truths=False, fixes="divisor", faults=True)
_shift = partial(Operation, of_truths=False, of_reals=False, counts=True, fixes="count")
_bits = partial(Operation, of_reals=False, fixes="mask")
_left, _right = torch.bitwise_left_shift, torch.bitwise_right_shift
_sum, _least, _most = (on.rising(compute) for compute in (torch.add, torch.minimum, torch.maximum))

_TABLE = (
    *(Operation(name, 0) for name in (*INDEX_VARIABLES, "const", "param")),
    Operation("lookup", None, faults=True),
    Operation("cast", 1),
    Operation("select", 3),
    # arithmetic
    Operation("add", 2, torch.add, "+", "add", ("add",), counts=True, bounds=Bounds(_sum, on.finite(_sum), on.either)),
    Operation(
        "sub",
        2,
        torch.sub,
        "-",
        "sub",
        ("sub", "subtract"),
        counts=True,
        of_truths=False,
        bounds=Bounds(on.sub, on.finite(on.sub)),
    ),
    Operation(
        "mul",
        2,
        torch.mul,
        "*",
        "mul",
        ("mul", "multiply"),
        counts=True,
        bounds=Bounds(on.mul, on.finite(on.mul), on.both),
    ),
    Operation(
        "truediv",
        2,
        torch.true_divide,
        "/",
        "truediv",
        ("true_divide",),
        gives="real",
        fixes="divisor",
        bounds=Bounds(reals=on.finite(on.quotient)),
    ),
    Operation(
        "neg",
        1,
        torch.neg,
        method="neg",
        called=("neg", "negative"),
        counts=True,
        of_truths=False,
        bounds=Bounds(on.neg, on.neg),
    ),
    Operation(
        "abs",
        1,
        torch.abs,
        method="abs",
        called=("abs", "absolute"),
        counts=True,
        of_truths=False,
        bounds=Bounds(on.absolute, on.absolute),
    ),
    Operation("min", 2, torch.minimum, called=("min", "minimum"), bounds=Bounds(_least, _least, on.both)),
    Operation("max", 2, torch.maximum, called=("max", "maximum"), bounds=Bounds(_most, _most, on.either)),
    Operation(
        "sqrt", 1, torch.sqrt, called=("sqrt",), gives="real", bounds=Bounds(reals=on.finite(on.rising(torch.sqrt)))
    ),
    _rounding("floor", torch.floor),
    _rounding("ceil", torch.ceil),
    _rounding("trunc", torch.trunc, "fix"),
    _rounding("round", torch.round),
    # division, rounded down or towards zero, and what it leaves
    _division(
        "floordiv",
        2,
        torch.floor_divide,
        "//",
        "floordiv",
        ("floor_divide",),
        counts=True,
        bounds=Bounds(on.division("floor")),
    ),
    _division("mod", 2, torch.remainder, "%", "mod", ("remainder",), counts=True, bounds=Bounds(on.mod)),
    _division("truncdiv", 2, partial(torch.div, rounding_mode="trunc"), bounds=Bounds(on.division("trunc"))),
    _division("fmod", 2, torch.fmod, called=("fmod",), bounds=Bounds(on.fmod)),
    # bits
    _shift("shl", 2, _left, "<<", "lshift", ("bitwise_left_shift",), bounds=Bounds(on.shift(_left))),
    _shift("shr", 2, _right, ">>", "rshift", ("bitwise_right_shift",), bounds=Bounds(on.shift(_right))),
    _bits(
        "bitand",
        2,
        torch.bitwise_and,
        "&",
        "and",
        ("bitwise_and",),
        settled=False,
        bounds=Bounds(on.bitand, None, on.both),
    ),
    _bits(
        "bitor", 2, torch.bitwise_or, "|", "or", ("bitwise_or",), settled=True, bounds=Bounds(on.bitor, None, on.either)
    ),
    _bits("bitxor", 2, torch.bitwise_xor, "^", "xor", ("bitwise_xor",), bounds=Bounds(on.bitxor, None, on.differing)),
    Operation("bitnot", 1, torch.bitwise_not, counts=True, of_reals=False, bounds=Bounds(on.invert, None, on.invert)),
    # truths
    _comparison("eq", torch.eq, "==", "ne", "eq", on.equal),
    _comparison("ne", torch.ne, "!=", "eq", "ne", on.unequal, "not_equal"),
    _comparison("lt", torch.lt, "<", "ge", "gt", on.less, "less"),
    _comparison("le", torch.le, "<=", "gt", "ge", on.less_equal, "less_equal"),
    _comparison("gt", torch.gt, ">", "le", "lt", on.swapped(on.less), "greater"),
    _comparison("ge", torch.ge, ">=", "lt", "le", on.swapped(on.less_equal), "greater_equal"),
    Operation("and", 2, torch.logical_and, "and", gives="truth", settled=False, bounds=Bounds(truths=on.both)),
    Operation("or", 2, torch.logical_or, "or", gives="truth", settled=True, bounds=Bounds(truths=on.either)),
    Operation("not", 1, torch.logical_not, gives="truth", bounds=Bounds(truths=on.invert)),
)

OPERATIONS: Final = {operation.name: operation for operation in _TABLE}
COMPARISONS: Final = frozenset(name for name, operation in OPERATIONS.items() if operation.opposite)
