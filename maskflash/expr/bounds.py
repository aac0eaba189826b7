"""An expression over boxes of pairs -> always / never / maybe visible, on whole tensors of boxes at once.

Sound: never says always or never wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.expr.evaluate import Inputs, reached
from maskflash.expr.intervals import (
    SAFE,
    Interval,
    both,
    convert,
    finite,
    narrow,
    select,
    spans_zero,
    square,
    truth,
    unknown,
    unless_far,
    widen,
)
from maskflash.expr.nodes import Expr, Node, operand_dtype
from maskflash.expr.ops import COMPARISONS, INDEX_VARIABLES, OPERATIONS, Bounds
from maskflash.expr.ranges import RangeMinima, Unread

Reach = tuple[int, int]
"""The least and the greatest value of an integer, over all that is asked: exactly, since differences are taken."""

_FAR: Final = 1 << 64  # as far as anything beyond
_SQUARE: Final = Bounds(square, finite(square), both)  # of a number times itself


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of each box, as bool tensors that broadcast to the boxes' shape."""

    always: Tensor
    maybe: Tensor  # False: never
    faulty: Tensor  # a look-up out of range or a division by zero could not be ruled out
    largest: float  # a cap on the absolute values of its 64-bit integers, before any wrapping


def bounds(
    expr: Expr,
    inputs: Inputs,
    boxes: Mapping[str, Interval],
    ranges: RangeMinima | None = None,
    known: Mapping[int, Interval] | None = None,
) -> Verdict:
    """Bound the mask over boxes of pairs.

    Args:
        expr: the mask.
        inputs: values of its params and tables.
        boxes: for `b`, `h`, `q`, `kv` the first and last index, int64 tensors of shapes that broadcast together.
        ranges: range minima of the tables, to be shared between calls while the tables' contents stay the same.
        known: bounds of the truth of some nodes, by position, from elsewhere.

    Returns:
        What holds for every pair of each box.
    """
    intervals, reaches, faults = _bounded(expr, inputs, boxes, ranges or RangeMinima(), known or {})
    truths = [truth(interval) for interval in intervals]
    faulty = torch.zeros((), dtype=torch.bool, device=truths[-1].lo.device)
    if any(fault is not None for fault in faults):
        within = reached(expr, [truth.lo for truth in truths], [truth.hi for truth in truths])
        for fault, here in zip(faults, within, strict=True):
            if fault is not None:
                faulty = faulty | (fault & here)
    return Verdict(truths[-1].lo, truths[-1].hi, faulty, _largest(expr, reaches))


def interval(expr: Expr, inputs: Inputs, boxes: Mapping[str, Interval]) -> Interval:
    """Bounds of an expression over boxes of pairs, NaN where they are unknown.

    Args:
        expr: a score function's program, or a mask.
        inputs: values of its params and tables.
        boxes: as for `bounds`, and of the `score`, in its dtype.
    """
    return _bounded(expr, inputs, boxes, RangeMinima(), {})[0][-1]


def _bounded(
    expr: Expr, inputs: Inputs, boxes: Mapping[str, Interval], ranges: RangeMinima, known: Mapping[int, Interval]
) -> tuple[list[Interval], list[Reach], list[Tensor | None]]:
    """For each node its interval, where it reaches as an integer, and where it may have no value."""
    intervals: list[Interval] = []
    reaches: list[Reach] = []
    faults: list[Tensor | None] = []
    for position, node in enumerate(expr.nodes):
        operands = [intervals[arg] for arg in node.args]
        kinds = [expr.nodes[arg] for arg in node.args]
        measured = node.op in boxes or node.op == "cast"  # its reach is read off its bounds
        reach = (0, 0) if measured else _reach(node, [reaches[arg] for arg in node.args], inputs, ranges)
        fault: Tensor | None = None
        if node.op in boxes:
            found = boxes[node.op]
        elif node.op in ("const", "param"):
            found = Interval(*[torch.tensor(node.number(inputs.params), dtype=node.dtype)] * 2)
        elif node.op == "lookup":
            found, fault = ranges.lookup(inputs.tables[node.slot], operands)
        else:
            found, fault = operation(node, operands, operand_dtype(node, kinds), _size(reach))
        if measured and not node.dtype.is_floating_point:
            reach = _extent(found)
        if position in known:
            least, most = known[position]
            found = Interval((found.lo | least) & most, (found.hi & most) | least)
        intervals.append(found)
        reaches.append(reach)
        faults.append(fault)
    return intervals, reaches, faults


def operation(node: Node, args: list[Interval], dtype: torch.dtype, magnitude: float) -> tuple[Interval, Tensor | None]:
    """The interval of a computed node, and where its divisor may be zero.

    Args:
        node: of any kind but indices, numbers and look-ups.
        args: the intervals of its operands.
        dtype: what these are converted to.
        magnitude: a cap on the absolute values of the node and its operands, before any wrapping.
    """
    if node.op == "select":
        condition, x, y = args
        return select(truth(condition), convert(x, node.dtype), convert(y, node.dtype)), None
    if node.op == "cast":
        return convert(args[0], node.dtype), None
    squared = node.op == "mul" and node.args[0] == node.args[1]
    rules = _SQUARE if squared else OPERATIONS[node.op].bounds
    args = [convert(arg, dtype) for arg in args]
    if dtype == torch.bool and rules.truths:
        return rules.truths(*args), None
    if dtype.is_floating_point:
        return rules.reals(*args) if rules.reals else unknown(args, dtype), None
    assert rules.integers is not None
    args = [widen(arg) for arg in args]
    if node.op in COMPARISONS:
        return rules.integers(*args), None
    fault = spans_zero(args[1]) if OPERATIONS[node.op].faults else None
    if magnitude < SAFE:
        return narrow(rules.integers(*args), dtype), fault
    if rules.reals:
        return narrow(unless_far(rules.integers, args), dtype), fault
    return unknown(args, dtype), fault


def cannot_fault(expr: Expr, inputs: Inputs, extents: Mapping[str, Reach]) -> bool:
    """Whether no look-up is out of range and no divisor is 0, whatever tables hold: they are not read.

    Args:
        expr: a mask, or a score function.
        inputs: values of its params; of its tables the shapes and dtypes count.
        extents: for `b`, `h`, `q`, `kv` the first and the last index.
    """
    plain = True
    for node in expr.nodes:
        if node.op == "lookup":
            for arg, size in zip(node.args, inputs.tables[node.slot].shape, strict=True):
                low, high = extents.get(expr.nodes[arg].op, (0, size))
                plain &= -size <= low and high < size
        else:
            plain &= not OPERATIONS[node.op].faults
    if plain:
        return True
    boxes = {name: Interval(*(torch.tensor(end) for end in ends)) for name, ends in extents.items()}
    if all(node.op != "score" for node in expr.nodes):
        return not bool(bounds(expr, inputs, boxes, Unread()).faulty.any())
    parts = (expr.part(place) for place, node in enumerate(expr.nodes) if OPERATIONS[node.op].faults and node.args)
    return all(
        all(node.op != "score" for node in part.nodes) and not bool(bounds(part, inputs, boxes, Unread()).faulty.any())
        for part in parts
    )


def largest(
    expr: Expr, inputs: Inputs, extents: Mapping[str, Reach], ranges: RangeMinima | None = None
) -> float | None:
    """A cap on the absolute values of an expression's 64-bit integers, before any wrapping, without bounding anything.

    Args:
        expr: the mask, or a part of it.
        inputs: values of its params and tables.
        extents: for `b`, `h`, `q`, `kv` the first and the last index.
        ranges: what is known of the tables; None to read them.

    Returns:
        The cap, at least that of `bounds`; None where a real number is made an integer, which only its bounds tell.
    """
    ranges = ranges or RangeMinima()
    reaches: list[Reach] = []
    for node in expr.nodes:
        if node.op in INDEX_VARIABLES:
            reaches.append(extents[node.op])
        elif node.op == "cast" and expr.nodes[node.args[0]].dtype.is_floating_point:
            return None
        else:
            reaches.append(_reach(node, [reaches[arg] for arg in node.args], inputs, ranges))
    return _largest(expr, reaches)


def _largest(expr: Expr, reaches: list[Reach]) -> int:
    wide = (_size(reach) for reach, node in zip(reaches, expr.nodes, strict=True) if node.dtype == torch.int64)
    return max(wide, default=0)


def _extent(x: Interval) -> Reach:
    """The least and the greatest value in any box."""
    if not x.lo.numel() or not x.hi.numel():
        return 0, 0
    return int(x.lo.min()), int(x.hi.max())


def _size(reach: Reach) -> int:
    return max(-reach[0], reach[1])


def _reach(node: Node, args: list[Reach], inputs: Inputs, ranges: RangeMinima) -> Reach:
    """Where an integer node's values lie in any box, before wrapping: where int64 may overflow.

    What is not safe from overflow stays so, whatever is made of it.
    """
    match node.op:
        case "const" | "param":
            number = node.number(inputs.params)
            return (0, 1) if isinstance(number, float) else (int(number), int(number))
        case "lookup":
            return ranges.extremes(inputs.tables[node.slot])
    if node.dtype == torch.bool or not args:
        return 0, 1
    sizes = list(map(_size, args))
    if node.dtype == torch.int64 and max(sizes) < SAFE:  # a narrower one may have wrapped, to the other side of zero
        match node.op, args:
            case "add", [x, y]:
                return x[0] + y[0], x[1] + y[1]
            case "sub", [x, y]:
                return x[0] - y[1], x[1] - y[0]
            case "neg", [x]:
                return -x[1], -x[0]
            case ("min" | "max", [x, y]) | ("select", [_, x, y]):
                return min(x[0], y[0]), max(x[1], y[1])
    size = min(_wide_size(node, sizes), _FAR)
    return -size, size


def _wide_size(node: Node, sizes: list[int]) -> int:
    """A cap on an integer node's absolute value, and on its operands', from those of its operands."""
    match node.op:
        case "add" | "sub":
            return sum(sizes)
        case "mul":
            return max(sizes[0], sizes[1], sizes[0] * sizes[1])
        case "shl":
            return max(sizes[0], sizes[1], sizes[0] << min(sizes[1], 64))
        case "bitand" | "bitor" | "bitxor" | "bitnot":
            return 2 * max(sizes) + 1
        case "select":
            return max(sizes[1:])
        case "cast" if not node.dtype.is_signed:
            return max(*sizes, torch.iinfo(node.dtype).max)  # negative numbers wrap to larger ones
    return max(sizes)
