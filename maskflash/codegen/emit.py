"""A mask expression -> Triton statements, grouped by what they depend on, so that a template can hoist them.

    once      b and h alone, params, 0-dim tables     scalars
    rows      q                                       vectors over the tile's queries
    columns   kv                                      vectors over the tile's keys
    pairs     both                                    the tile

Every node becomes one assignment, `x<position> = ...`, with torch's dtypes written out. Look-ups load under a range
mask: what a guard excludes may be out of range and reads as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from maskflash.errors import BackendError
from maskflash.expr.nodes import COMPARISONS, Expr, Node, operand_dtype

Group = Literal["once", "rows", "columns", "pairs"]
GROUPS: Final[tuple[Group, ...]] = ("once", "rows", "columns", "pairs")

_INFIX: Final = {
    **{"add": "+", "sub": "-", "mul": "*", "bitand": "&", "bitor": "|", "bitxor": "^"},
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
}


@dataclass(frozen=True, slots=True)
class TableKind:
    """What a kernel must know of a table: its dtype and number of dimensions; sizes and strides are arguments."""

    dtype: torch.dtype
    ndim: int


@dataclass(frozen=True, slots=True)
class Emitted:
    """Triton text of a mask.

    Attributes:
        once: statements on scalars.
        rows: statements on vectors over the tile's queries; `q` holds the row numbers, offset included.
        columns: statements on vectors over the tile's keys; `kv` holds the column numbers.
        pairs: statements on the tile.
        visible: an expression, broadcastable to the tile: whether the pair is visible.
    """

    once: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    pairs: tuple[str, ...]
    visible: str


def emit(expr: Expr, tables: Sequence[TableKind], *, narrow: bool, transposed: bool = False) -> Emitted:
    """Write an expression in Triton.

    Args:
        expr: the mask.
        tables: the kind of each table slot.
        narrow: compute 64-bit integers in 32 bits; only where no value of the mask needs more.
        transposed: the tile is keys x queries instead of queries x keys.

    Raises:
        BackendError: an operation that has no exact counterpart in Triton.
    """
    writer = _Writer(expr, tables, narrow, transposed)
    if narrow:  # numbers arrive in 64 bits, whatever their value, so that none is compiled in
        sizes = (f"t{slot}_size{axis}" for slot, kind in enumerate(tables) for axis in range(kind.ndim))
        numbers = [*(f"p{slot}" for slot in range(expr.slots("param"))), *sizes]
        writer.lines["once"] += [f"{name}_32 = {name}.to(tl.int32)" for name in numbers]
    for position in range(len(expr.nodes)):
        writer.write(position)
    root = len(expr.nodes) - 1
    once, rows, columns, pairs = (tuple(writer.lines[group]) for group in GROUPS)
    return Emitted(once, rows, columns, pairs, writer.value(root, torch.bool, "pairs"))


def signature(expr: Expr, tables: Sequence[TableKind]) -> tuple[str, ...]:
    """What a mask adds to a kernel's arguments, in order: params, then each table's pointer, sizes and strides."""
    names = [f"p{slot}" for slot in range(expr.slots("param"))]
    for slot, kind in enumerate(tables):
        names += [f"t{slot}", *(f"t{slot}_{what}{axis}" for what in ("size", "stride") for axis in range(kind.ndim))]
    return tuple(names)


class _Writer:
    def __init__(self, expr: Expr, tables: Sequence[TableKind], narrow: bool, transposed: bool) -> None:
        self.expr = expr
        self.tables = tables
        self.narrow = narrow
        self.expand: dict[Group, str] = (
            {"rows": "[None, :]", "columns": "[:, None]"}
            if transposed
            else {
                "rows": "[:, None]",
                "columns": "[None, :]",
            }
        )
        self.lines: dict[Group, list[str]] = {group: [] for group in GROUPS}
        self.groups: list[Group] = []
        self.names: list[str] = []
        self._said: dict[Group, str] = {}

    def write(self, position: int) -> None:
        """Append the statement of one node; constants and indices need none."""
        node = self.expr.nodes[position]
        group = self._group(node)
        self.groups.append(group)
        if node.op in ("b", "h", "q", "kv"):
            self.names.append(node.op)
        elif node.op == "const":
            self.names.append(_literal(node))
        elif node.op == "param":
            self.names.append(self._number(f"p{node.value}"))
        else:
            name = f"x{position}"
            text = self._lookup(node, name, group) if node.op == "lookup" else self._computed(node, group)
            self._comment(position, group)
            self.lines[group].append(f"{name} = {text}")
            self.names.append(name)

    def value(self, position: int, dtype: torch.dtype, group: Group) -> str:
        """A node's value in a dtype, shaped for use in a group."""
        node, name, own = self.expr.nodes[position], self.names[position], self.groups[position]
        if node.op != "const" and self._type(node.dtype) != self._type(dtype):
            name = f"({name} != 0)" if dtype == torch.bool else f"{name}.to({self._type(dtype)})"
        elif node.op == "const" and dtype.is_floating_point:
            name = repr(float(node.value or 0))
        return name + self.expand[own] if group == "pairs" and own in self.expand else name

    def _group(self, node: Node) -> Group:
        if node.op in ("q", "kv"):
            return "rows" if node.op == "q" else "columns"
        found = {self.groups[arg] for arg in node.args} - {"once"}
        if not found:
            return "once"
        return found.pop() if len(found) == 1 else "pairs"

    def _computed(self, node: Node, group: Group) -> str:
        kinds = [self.expr.nodes[arg] for arg in node.args]
        dtype = operand_dtype(node, kinds)
        if node.op in ("and", "or", "not"):
            dtype = torch.bool
        if node.op == "cast":
            return self._cast(node, group)
        if node.op == "select":
            condition = self.value(node.args[0], torch.bool, group)
            x, y = (self.value(arg, node.dtype, group) for arg in node.args[1:])
            return self._wrapped(node, f"tl.where({condition}, {x}, {y})")
        x, *others = (self.value(arg, dtype, group) for arg in node.args)
        if all(kind.op == "const" for kind in kinds):
            x = f"tl.full((), {x}, {self._type(dtype)})"
        return self._wrapped(node, self._operation(node, dtype, x, others[0] if others else ""))

    def _operation(self, node: Node, dtype: torch.dtype, x: str, y: str) -> str:
        op, whole = node.op, not dtype.is_floating_point
        if op in ("and", "or"):
            return f"{x} & {y}" if op == "and" else f"{x} | {y}"
        if op in _INFIX and not (dtype == torch.bool and op in ("add", "sub", "mul")):
            return f"{x} {_INFIX[op]} {y}"
        if dtype == torch.bool and op in ("add", "mul", "max", "min"):
            return f"{x} | {y}" if op in ("add", "max") else f"{x} & {y}"
        match op:
            case "not":
                return f"{x} == 0"
            case "bitnot":
                return f"{x} == 0" if dtype == torch.bool else f"~{x}"
            case "neg":
                return f"-{x}"
            case "abs":
                return f"tl.abs({x})"
            case "min" | "max":
                nan = "" if whole else ", propagate_nan=tl.PropagateNan.ALL"
                return f"tl.{op}imum({x}, {y}{nan})"
            case "shl" | "shr" if whole:
                return self._shift(node, dtype, x)
            case "floordiv" | "mod" | "truncdiv" | "fmod" if whole:
                return self._division(node, dtype, x, y)
            case "truediv":
                return f"tl.div_rn({x}, {y})" if dtype == torch.float32 else f"{x} / {y}"
            case "floor" | "ceil":
                return x if whole else f"tl.{op}({x})"
            case "trunc":
                return x if whole else f"tl.where({x} < 0, tl.ceil({x}), tl.floor({x}))"
            case "round" if whole:
                return x
            case "sqrt":
                return f"tl.sqrt_rn({x})" if dtype == torch.float32 else f"tl.sqrt({x})"
        kind = str(dtype).removeprefix("torch.")
        raise BackendError(
            f"the triton backend has no exact `{op}` for {kind}; compute it outside the mask, into a table that the "
            "mask looks up"
        )

    def _shift(self, node: Node, dtype: torch.dtype, x: str) -> str:
        count = self.expr.nodes[node.args[1]]
        bits = 8 * dtype.itemsize
        sign = self.expr.nodes[node.args[0]].dtype.is_signed
        if count.op != "const":
            y = self.value(node.args[1], dtype, self._group(node))
            inside = f"({y} >= 0) & ({y} < {bits})"
            beyond = "0" if node.op == "shl" or not sign else f"tl.where({x} < 0, -1, 0)"
            shifted = f"{x} {'<<' if node.op == 'shl' else '>>'} ({y} & {bits - 1})"
            return f"tl.where({inside}, {shifted}, {beyond})"
        amount = int(count.value or 0)
        width = 32 if self.narrow and bits == 64 else bits
        if not 0 <= amount < bits or amount >= width:
            # torch: everything is shifted out
            return f"{x} * 0" if node.op == "shl" or not sign else f"tl.where({x} < 0, -1, 0)"
        return f"{x} {'<<' if node.op == 'shl' else '>>'} {amount}"

    def _division(self, node: Node, dtype: torch.dtype, x: str, y: str) -> str:
        """Triton divides as C does, towards zero; floor semantics correct the remainder's sign."""
        divisor = self.expr.nodes[node.args[1]]
        positive = divisor.op == "const" and int(divisor.value or 0) > 0
        if positive and node.op in ("floordiv", "mod"):
            d = int(divisor.value or 0)
            if d & (d - 1) == 0:  # an arithmetic shift and a mask round down by themselves
                return f"{x} >> {d.bit_length() - 1}" if node.op == "floordiv" else f"{x} & {d - 1}"
        # Where a guard excludes it, a divisor may be 0.
        safe = y if divisor.op == "const" else f"tl.where({y} == 0, 1, {y})"
        if node.op in ("floordiv", "mod"):
            return f"{'floor_divide' if node.op == 'floordiv' else 'floor_remainder'}({x}, {safe})"
        return f"{x} // {safe}" if node.op == "truncdiv" else f"{x} % {safe}"

    def _cast(self, node: Node, group: Group) -> str:
        source = self.expr.nodes[node.args[0]]
        if source.op == "const":
            return f"tl.full((), {self.value(node.args[0], node.dtype, group)}, {self._type(node.dtype)})"
        return self.value(node.args[0], node.dtype, group)

    def _wrapped(self, node: Node, text: str) -> str:
        """The value in its own dtype: small integers wrap, half types round."""
        if node.op in COMPARISONS or node.dtype in (torch.bool, torch.int64, torch.int32, torch.float32, torch.float64):
            return text
        return f"({text}).to({self._type(node.dtype)})"

    def _lookup(self, node: Node, name: str, group: Group) -> str:
        slot = int(node.value or 0)
        kind = self.tables[slot]
        places, inside = [], []
        for axis, arg in enumerate(node.args):
            size = self._number(f"t{slot}_size{axis}")
            index = self.value(arg, torch.int64, group)
            if self.expr.nodes[arg].op not in ("b", "h", "kv"):  # these are never negative
                self.lines[group].append(f"{name}_{axis} = tl.where({index} < 0, {index} + {size}, {index})")
                index = f"{name}_{axis}"
            places.append(f" + {index}.to(tl.int64) * t{slot}_stride{axis}")
            inside.append(f"({index} >= 0) & ({index} < {size})")
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        text = f"tl.load(t{slot}{''.join(places)}{mask})"
        if kind.dtype == torch.bool:  # bytes in memory
            return f"{text} != 0"
        return f"{text}.to({self._type(torch.int64)})" if kind.dtype == torch.int64 and self.narrow else text

    def _comment(self, position: int, group: Group) -> None:
        """Name the user's line above the first statement that comes from it."""
        source = self.expr.source(position)
        if source is None:
            return
        line = f"{source.function} ({Path(source.filename).name}:{source.line})"
        if self._said.get(group) != line:
            self._said[group] = line
            self.lines[group].append(f"# {line}: {source.text}" if source.text else f"# {line}")

    def _number(self, argument: str) -> str:
        """A number of the signature, in the width that the mask computes in."""
        return f"{argument}_32" if self.narrow else argument

    def _type(self, dtype: torch.dtype) -> str:
        if dtype == torch.int64 and self.narrow:
            return "tl.int32"
        return _TYPES[dtype]


_TYPES: Final = {
    torch.bool: "tl.int1",
    **{getattr(torch, name): f"tl.{name}" for name in ("int8", "int16", "int32", "int64")},
    **{getattr(torch, name): f"tl.{name}" for name in ("uint8", "uint16", "uint32", "uint64")},
    **{getattr(torch, name): f"tl.{name}" for name in ("float16", "bfloat16", "float32", "float64")},
}


def _literal(node: Node) -> str:
    if node.dtype == torch.bool:
        return str(int(bool(node.value)))
    value = node.value
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return f'float("{value}")'
    return repr(value) if not (isinstance(value, int) and value < 0) else f"({value})"
