"""An expression over boxes of pairs -> always / never / maybe visible, on whole tensors of boxes at once.

Sound: never says always or never wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskflash.expr.evaluate import Inputs, reached
from maskflash.expr.intervals import Interval, operation, truth
from maskflash.expr.nodes import INDEX_VARIABLES, Expr, Node, Scalar, operand_dtype
from maskflash.expr.ranges import RangeMinima


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
    ranges = ranges or RangeMinima()
    intervals: list[Interval] = []
    magnitudes: list[float] = []
    faults: list[Tensor | None] = []
    for position, node in enumerate(expr.nodes):
        operands = [intervals[arg] for arg in node.args]
        kinds = [expr.nodes[arg] for arg in node.args]
        measured = node.op in INDEX_VARIABLES or node.op == "cast"  # its cap is read off its bounds
        magnitude = 0.0 if measured else _magnitude(node, [magnitudes[arg] for arg in node.args], inputs, ranges)
        fault: Tensor | None = None
        if node.op in INDEX_VARIABLES:
            interval = boxes[node.op]
        elif node.op in ("const", "param"):
            interval = Interval(*[torch.tensor(_number(node, inputs), dtype=node.dtype)] * 2)
        elif node.op == "lookup":
            interval, fault = ranges.lookup(inputs.tables[int(node.value or 0)], operands)
        else:
            interval, fault = operation(node, operands, operand_dtype(node, kinds), magnitude)
        if measured and not node.dtype.is_floating_point:
            magnitude = _extent(interval)
        if known and position in known:
            least, most = known[position]
            interval = Interval((interval.lo | least) & most, (interval.hi & most) | least)
        intervals.append(interval)
        magnitudes.append(magnitude)
        faults.append(fault)
    truths = [truth(interval) for interval in intervals]
    faulty = torch.zeros((), dtype=torch.bool, device=truths[-1].lo.device)
    if any(fault is not None for fault in faults):
        reach = reached(expr, [truth.lo for truth in truths], [truth.hi for truth in truths])
        for fault, here in zip(faults, reach, strict=True):
            if fault is not None:
                faulty = faulty | (fault & here)
    return Verdict(truths[-1].lo, truths[-1].hi, faulty, _largest(expr, magnitudes))


def largest(expr: Expr, inputs: Inputs, extents: Mapping[str, float]) -> float | None:
    """A cap on the absolute values of the mask's 64-bit integers, before any wrapping, without bounding anything.

    Args:
        expr: the mask.
        inputs: values of its params and tables.
        extents: for `b`, `h`, `q`, `kv` the largest absolute index.

    Returns:
        The cap, at least that of `bounds`; None where a real number is made an integer, which only its bounds tell.
    """
    ranges = RangeMinima()
    magnitudes: list[float] = []
    for node in expr.nodes:
        sizes = [magnitudes[arg] for arg in node.args]
        if node.op in INDEX_VARIABLES:
            magnitudes.append(extents[node.op])
        elif node.op == "cast" and expr.nodes[node.args[0]].dtype.is_floating_point:
            return None
        else:
            magnitudes.append(_magnitude(node, sizes, inputs, ranges))
    return _largest(expr, magnitudes)


def _largest(expr: Expr, magnitudes: list[float]) -> float:
    wide = (size for size, node in zip(magnitudes, expr.nodes, strict=True) if node.dtype == torch.int64)
    return max(wide, default=0.0)


def _number(node: Node, inputs: Inputs) -> Scalar:
    """The value of a const or a param."""
    if node.op == "param":
        return inputs.params[int(node.value or 0)]
    assert node.value is not None
    return node.value


def _extent(x: Interval) -> float:
    """The greatest absolute value in any box."""
    ends = [bound.to(torch.float64).abs().max() for bound in x if bound.numel()]
    return float(torch.stack(ends).max()) if ends else 0.0


def _magnitude(node: Node, sizes: list[float], inputs: Inputs, ranges: RangeMinima) -> float:
    """A cap on an integer node's absolute value before wrapping, and on its operands': where int64 may overflow."""
    match node.op:
        case "const" | "param":
            return abs(float(_number(node, inputs)))
        case "lookup":
            return ranges.magnitude(inputs.tables[int(node.value or 0)])
    if node.dtype == torch.bool or not sizes:
        return 1.0
    match node.op:
        case "add" | "sub":
            return sum(sizes)
        case "mul":
            return max(sizes[0], sizes[1], sizes[0] * sizes[1])
        case "shl":
            return max(sizes[0], sizes[1], sizes[0] * float(2 ** int(min(sizes[1], 64))))
        case "bitand" | "bitor" | "bitxor" | "bitnot":
            return 2 * max(sizes) + 1
        case "select":
            return max(sizes[1:])
        case "cast" if not node.dtype.is_signed:
            return max(*sizes, float(torch.iinfo(node.dtype).max))  # negative numbers wrap to larger ones
    return max(sizes)
