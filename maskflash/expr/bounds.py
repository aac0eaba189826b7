"""An expression over boxes of pairs -> always / never / maybe visible, on whole tensors of boxes at once.

Sound: never says always or never wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluate import Inputs, reached
from .intervals import Interval, operation, truth
from .nodes import INDEX_VARIABLES, Expr, Node, Scalar, operand_dtype
from .ranges import RangeMinima


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of each box, as bool tensors that broadcast to the boxes' shape."""

    always: Tensor
    maybe: Tensor  # False: never
    faulty: Tensor  # a look-up out of range or a division by zero could not be ruled out


def bounds(expr: Expr, inputs: Inputs, boxes: Mapping[str, Interval], ranges: RangeMinima | None = None) -> Verdict:
    """Bound the mask over boxes of pairs.

    Args:
        expr: the mask.
        inputs: values of its params and tables.
        boxes: for `b`, `h`, `q`, `kv` the first and last index, int64 tensors of shapes that broadcast together.
        ranges: range minima of the tables, to be shared between calls with the same `inputs`.
    """
    ranges = ranges or RangeMinima()
    intervals: list[Interval] = []
    magnitudes: list[float] = []
    faults: list[Tensor | None] = []
    for node in expr.nodes:
        operands = [intervals[arg] for arg in node.args]
        kinds = [expr.nodes[arg] for arg in node.args]
        magnitude = _magnitude(node, kinds, [magnitudes[arg] for arg in node.args], inputs, ranges)
        fault: Tensor | None = None
        if node.op in INDEX_VARIABLES:
            interval = boxes[node.op]
        elif node.op in ("const", "param"):
            interval = Interval(*[torch.tensor(_number(node, inputs), dtype=node.dtype)] * 2)
        elif node.op == "lookup":
            interval, fault = ranges.lookup(inputs.tables[int(node.value or 0)], operands)
        else:
            interval, fault = operation(node, operands, operand_dtype(node, kinds), magnitude)
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
    return Verdict(truths[-1].lo, truths[-1].hi, faulty)


def _number(node: Node, inputs: Inputs) -> Scalar:
    """The value of a const or a param."""
    if node.op == "param":
        return inputs.params[int(node.value or 0)]
    assert node.value is not None
    return node.value


def _magnitude(node: Node, kinds: list[Node], sizes: list[float], inputs: Inputs, ranges: RangeMinima) -> float:
    """A cap on an integer node's absolute value before wrapping, and on its operands': where int64 may overflow."""
    op = node.op
    if op in INDEX_VARIABLES:
        return 2.0**40
    if op in ("const", "param"):
        return abs(float(_number(node, inputs)))
    if op == "lookup":
        return ranges.magnitude(inputs.tables[int(node.value or 0)])
    if op == "cast" and kinds[0].dtype.is_floating_point:
        return 2.0**63
    if node.dtype == torch.bool:
        return 1.0
    match op:
        case "add" | "sub":
            return sum(sizes)
        case "mul":
            return max(*sizes, sizes[0] * sizes[1])
        case "shl":
            return max(*sizes, sizes[0] * 2.0 ** min(sizes[1], 64))
        case "bitand" | "bitor" | "bitxor" | "bitnot":
            return 2 * max(sizes) + 1
    return max(sizes)
