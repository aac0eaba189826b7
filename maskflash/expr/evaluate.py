"""An expression at given pairs -> a bool tensor: the element-wise meaning that everything else must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import MaskIndexError
from maskflash.expr.nodes import Expr, Node, Scalar, operand_dtype
from maskflash.expr.ops import INDEX_VARIABLES, OPERATIONS

_KEPT: Final = 1 << 18  # pairs, up to which every value is kept: so a fault costs no second evaluation
_SHARED: Final = {"b": "batch", "h": "heads"}  # of what a dimension of 1 might be meant to serve all

LookUp = Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor | None]]
"""A table and int64 indices into it -> what they read, and where they lie outside (None: nowhere)."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The run-time values an expression's slots stand for."""

    params: tuple[Scalar, ...] = ()
    tables: tuple[Tensor, ...] = ()


def evaluate(expr: Expr, inputs: Inputs, pairs: Mapping[str, Tensor]) -> Tensor:
    """Whether each pair is visible.

    Args:
        expr: the mask.
        inputs: values of its params and tables.
        pairs: `b`, `h`, `q`, `kv` as int64 tensors of shapes that broadcast together.

    Returns:
        bool tensor of the broadcast shape.

    Raises:
        MaskIndexError: a look-up out of range or a division by zero that no guard excludes.
    """
    shapes = {pairs[name].shape for name in INDEX_VARIABLES}
    shape = np.broadcast_shapes(*shapes)
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.bool, device=pairs["q"].device)
    if math.prod(shape) <= _KEPT:
        values, places = every_value(expr, inputs, pairs)
        if any(fault is not None and bool(fault.any()) for fault in places):
            _raise_if_reached(expr, inputs, pairs, values, places)
        value = values[-1]
    else:
        value, faults = compute(expr, inputs, pairs)
        if any(bool(fault.any()) for fault in faults):
            raise_if_reached(expr, inputs, pairs)
    value = value if value.dtype == torch.bool else value.to(torch.bool)
    return value if value.shape == shape else value.expand(shape)


def compute(
    expr: Expr, inputs: Inputs, pairs: Mapping[str, Tensor], look_up: LookUp | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The value of an expression of any dtype, and where parts of it have none, reached or not.

    Faulty places hold what a table's first or last element, or a divisor of 1, would give. Shapes broadcast to that of
    the pairs. `look_up` reads tables in another way: ours looks at the indices first, which needs their values.
    """
    (root,), faults = compute_several(expr, inputs, pairs, (len(expr.nodes) - 1,), look_up)
    return root, faults


def compute_several(
    expr: Expr,
    inputs: Inputs,
    pairs: Mapping[str, Tensor],
    roots: Sequence[int],
    look_up: LookUp | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The values of several nodes of an expression, and faults: see `compute`."""
    values: list[Tensor | None] = []
    faults: list[Tensor] = []
    for position, node in enumerate(expr.nodes):
        value, fault = compute_node(node, expr, values, inputs, pairs, look_up or _lookup)
        if fault is not None:
            faults.append(fault)
        values.append(value)
        for arg in node.args:
            if expr.last_use[arg] == position and arg not in roots:
                values[arg] = None
    return [value for value in (values[root] for root in roots) if value is not None], faults


def reached(expr: Expr, always: Sequence[Tensor], maybe: Sequence[Tensor]) -> list[Tensor]:
    """Where each node's value can matter, given lower and upper truth of every node: guards cut what is below them.

    On elements `always` and `maybe` are the values themselves; on tiles they are bounds, and the answer an upper one.
    """
    true = torch.ones((), dtype=torch.bool, device=maybe[-1].device)
    reach: list[Tensor | None] = [None] * len(expr.nodes)
    reach[-1] = true
    for position in range(len(expr.nodes) - 1, -1, -1):
        here = reach[position]
        if here is None:
            continue
        node = expr.nodes[position]
        guards: list[Tensor] = [here] * len(node.args)
        if node.op in ("and", "or"):
            first = node.args[0]
            guards[1] = here & (maybe[first] if node.op == "and" else ~always[first])
        elif node.op == "select":
            guards[1:] = [here & maybe[node.args[0]], here & ~always[node.args[0]]]
        for arg, guard in zip(node.args, guards, strict=True):
            known = reach[arg]
            reach[arg] = guard if known is None else known | guard
    return [true if here is None else here for here in reach]


def compute_node(
    node: Node,
    expr: Expr,
    values: Sequence[Tensor | None],
    inputs: Inputs,
    pairs: Mapping[str, Tensor],
    look_up: LookUp,
) -> tuple[Tensor, Tensor | None]:
    """A node's value, and where it has none (None: nowhere); faulty places hold an arbitrary value."""
    if node.op in pairs:
        return pairs[node.op], None
    if node.op in ("const", "param"):
        return pairs["q"].new_full((), node.number(inputs.params), dtype=node.dtype), None
    operands = [value for value in (values[arg] for arg in node.args) if value is not None]
    if node.op == "lookup":
        return look_up(inputs.tables[node.slot], [index.to(torch.int64) for index in operands])
    if node.op == "select":
        condition, x, y = operands
        return torch.where(condition.to(torch.bool), x.to(node.dtype), y.to(node.dtype)), None
    if node.op == "cast":
        return operands[0].to(node.dtype), None
    dtype = operand_dtype(node, [expr.nodes[arg] for arg in node.args])
    operands = [x if x.dtype == dtype else x.to(dtype) for x in operands]  # `to` costs as much as adding few numbers
    operation, fault = OPERATIONS[node.op], None
    assert operation.compute is not None
    if operation.faults and not dtype.is_floating_point:
        fault = operands[1] == 0
        operands[1] = torch.where(fault, 1, operands[1])
    computed = operation.compute(*operands)
    return computed if fault is None else computed.to(dtype), fault


def _lookup(table: Tensor, indices: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    if not indices:
        return table, None
    fault: Tensor | None = None
    safe = []
    for index, size in zip(indices, table.shape, strict=True):
        index = index.to(table.device)
        if index.numel():
            low, high = torch.stack(torch.aminmax(index)).tolist()
            if low < 0:
                index = torch.where(index < 0, index + size, index)  # negative indices wrap, as in torch
            if low < -size or high >= size:
                outside = (index < 0) | (index >= size)
                fault = outside if fault is None else fault | outside
                index = index.clamp(0, max(size - 1, 0))
        safe.append(index)
    if 0 in table.shape:
        return torch.zeros((), dtype=table.dtype, device=table.device), torch.ones_like(safe[0], dtype=torch.bool)
    if len(safe) == 1:  # several times faster than an index
        return table.index_select(0, safe[0].reshape(-1)).view(safe[0].shape), fault
    return table[tuple(safe)], fault


def every_value(expr: Expr, inputs: Inputs, pairs: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The value of every node, and where it has none (None: nowhere); like `compute`, but keeping everything."""
    values: list[Tensor] = []
    faults: list[Tensor | None] = []
    for node in expr.nodes:
        value, fault = compute_node(node, expr, values, inputs, pairs, _lookup)
        values.append(value)
        faults.append(fault)
    return values, faults


def raise_if_reached(expr: Expr, inputs: Inputs, pairs: Mapping[str, Tensor]) -> None:
    """Evaluate once more, keeping everything, and report the first fault that no guard excludes.

    Raises:
        MaskIndexError: with the user's line, the index and the fix.
    """
    _raise_if_reached(expr, inputs, pairs, *every_value(expr, inputs, pairs))


def _raise_if_reached(
    expr: Expr, inputs: Inputs, pairs: Mapping[str, Tensor], values: list[Tensor], faults: list[Tensor | None]
) -> None:
    """The same, given every value."""
    truth = [value.to(torch.bool) for value in values]
    for position, (fault, reach) in enumerate(zip(faults, reached(expr, truth, truth), strict=True)):
        if fault is None:
            continue
        bad = fault & reach.to(fault.device)
        if bad.any():
            raise MaskIndexError(_describe_fault(expr, position, bad, values, inputs, pairs))


def _describe_fault(
    expr: Expr, position: int, bad: Tensor, values: list[Tensor], inputs: Inputs, pairs: Mapping[str, Tensor]
) -> str:
    node, source = expr.nodes[position], expr.source(position)
    shape = np.broadcast_shapes(bad.shape, *(pairs[name].shape for name in INDEX_VARIABLES))
    where = tuple(bad.expand(shape).nonzero()[0])
    at = ", ".join(f"{name}={int(pairs[name].expand(shape)[where])}" for name in INDEX_VARIABLES)
    place = f"{source}: " if source else ""
    code = f'"{source.text}" ' if source and source.text else ""
    if node.op != "lookup":
        return f"{place}{code}divides by zero at {at}. Guard it: `divisor != 0 and ...`."
    table = inputs.tables[node.slot]
    index = tuple(int(values[arg].expand(shape)[where]) for arg in node.args)
    fix = _fix([expr.nodes[arg].op for arg in node.args], index, tuple(table.shape))
    return (
        f"{place}{code}reads index {index if len(index) > 1 else index[0]} of a table of shape {tuple(table.shape)} "
        f"at {at}. {fix}"
    )


def _fix(indices: Sequence[str], index: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What to do about an index out of range.

    Args:
        indices: what each dimension is indexed by, where that is b or h.
        index: the values.
        shape: of the table.
    """
    lacking = [name in _SHARED and at >= size == 1 for name, at, size in zip(indices, index, shape, strict=True)]
    if any(lacking):
        sizes = ", ".join(_SHARED[name] if here else "-1" for name, here in zip(indices, lacking, strict=True))
        return f"A dimension of 1 doesn't serve all: expand it, without a copy: table.expand({sizes})."
    return (
        "Make the table longer, or guard the look-up: `q < n and table[q] == ...` (`&` does not guard: both of its "
        "sides are always read)."
    )
