"""A mask expression -> Triton statements, grouped by what they depend on, so that a template can hoist them.

    once      b and h alone, params, 0-dim tables     scalars
    rows      q                                       vectors over the tile's queries
    columns   kv                                      vectors over the tile's keys
    pairs     both                                    the tile

Every node becomes one assignment, `x<position> = ...`, with torch's dtypes written out and every result rounded where
torch rounds it. Look-ups load under a range mask: what a guard excludes may be out of range and reads as 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, get_args

import torch

from maskflash.backends.triton.signature import TableKind
from maskflash.errors import BackendError
from maskflash.expr.nodes import Expr, Node, Scalar, operand_dtype
from maskflash.expr.ops import COMPARISONS, ON_TRUTH

Group = Literal["once", "rows", "columns", "pairs"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)

_INFIX: Final = {
    **{"add": "+", "sub": "-", "mul": "*", "bitand": "&", "bitor": "|", "bitxor": "^"},
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"and": "&", "or": "|"},
}


@dataclass(frozen=True, slots=True)
class Emitted:
    """Triton text of a mask.

    Attributes:
        lines: statements by group. Those of "rows" find the row numbers in `q`, those of "columns" the column numbers
            in `kv`, offsets included.
        visible: an expression, broadcastable to the tile: whether the pair is visible.
    """

    lines: Mapping[Group, list[str]]
    visible: str

    @property
    def handed_on(self) -> list[str]:
        """What columns have and pairs use, by name."""
        return handed_on(self.lines, self.visible)


def handed_on(lines: Mapping[Group, list[str]], result: str) -> list[str]:
    """The names that statements of columns give, and those of pairs or the result use."""
    given = (line.partition(" = ")[0] for line in lines["columns"] if not line.startswith("#"))
    used = set(re.findall(r"\w+", " ".join((*(line for line in lines["pairs"] if not line.startswith("#")), result))))
    return [name for name in given if name in used]


def emit(
    expr: Expr,
    tables: Sequence[TableKind],
    *,
    narrow: bool,
    transposed: bool = False,
    negative_kv: bool = False,
    remarks: bool = False,
) -> Emitted:
    """Write an expression in Triton.

    Args:
        expr: the mask.
        tables: the kind of each table slot.
        narrow: compute 64-bit integers in 32 bits; only where no value of the mask needs more.
        transposed: the tile is keys x queries instead of queries x keys.
        negative_kv: column numbers may be below 0, where look-ups count from a table's end. To ask costs dK and dV 3
            to 9 registers with four look-ups of FlashMask's, and a spill on sm_80 at head dim 128.
        remarks: name the user's lines above what comes of them.

    Raises:
        BackendError: an operation that has no exact counterpart in Triton.
    """
    writer = Writer(expr, tables, narrow, transposed, negative_kv, remarks)
    for position in range(len(expr.nodes)):
        writer.write(position)
    return Emitted(writer.lines, writer.value(len(expr.nodes) - 1, torch.bool, "pairs"))


class Writer:
    """Writes a program's nodes in order.

    Attributes:
        what: it is, for people.
        prefix: of its names.
        alone: what indices differ in, of those that do within a tile.
        lines: statements by group.
        groups: of each node.
        names: of each node's value.
    """

    what = "mask"
    prefix = ""
    alone: Mapping[str, Group] = MappingProxyType({"q": "rows", "kv": "columns"})

    def __init__(
        self,
        expr: Expr,
        tables: Sequence[TableKind],
        narrow: bool,
        transposed: bool,
        negative_kv: bool,
        remarks: bool,
    ) -> None:
        self.expr = expr
        self.tables = tables
        self.narrow = narrow
        self.remarks = remarks
        # Indices that are never negative.
        self.natural: tuple[str, ...] = ("b", "h") if negative_kv else ("b", "h", "kv")
        own, other = "[:, None]", "[None, :]"
        self.expand: dict[Group, str] = {"rows": other if transposed else own, "columns": own if transposed else other}
        self.lines: dict[Group, list[str]] = {group: [] for group in GROUPS}
        self.groups: list[Group] = []
        self.names: list[str] = []
        self._summed = expr.summed
        self._divides = any(node.op in ("truediv", "truncdiv") for node in expr.nodes)
        self._said: dict[Group, str] = {}
        self._place = 0  # of the node that is being written
        self._numbers()

    def _numbers(self) -> None:
        """Numbers arrive in 64 bits, whatever their value, so that none is compiled in."""
        own, expr, once = self.prefix, self.expr, self.lines["once"]
        if self.narrow:
            sizes = (f"{own}t{slot}_size{axis}" for slot, kind in enumerate(self.tables) for axis in range(kind.ndim))
            whole = (slot for slot in range(expr.slots("param")) if slot not in expr.real_params)
            numbers = [*(f"{own}p{slot}" for slot in whole), *sizes]
            once += [f"{name}_32 = {name}.to(tl.int32)" for name in numbers]
        for slot in sorted(expr.real_params):
            param = f"{own}p{slot}"
            once.append(f"{param}_real = {param}.to(tl.int64).to(tl.float64, bitcast=True)")

    def write(self, position: int) -> None:
        """Append the statements of one node; constants and indices need none."""
        node, self._place = self.expr.nodes[position], position
        group = self._group(node)
        self.groups.append(group)
        if node.op in ("b", "h", "q", "kv"):
            self.names.append(self.prefix + node.op)
        elif node.op == "const":
            self.names.append("")  # written where it is used, in the dtype it is used in
        elif node.op == "param":
            real = node.dtype.is_floating_point
            param = f"{self.prefix}p{node.value}"
            self.names.append(f"{param}_real" if real else self._number(param))
        else:
            name = f"{self.prefix}x{position}"
            if self.remarks:
                self._remark(position, group)
            text = self._lookup(node, name, group) if node.op == "lookup" else self._computed(position, name, group)
            self.lines[group].append(f"{name} = {text}")
            self.names.append(name)

    def value(self, position: int, dtype: torch.dtype, group: Group, *, typed: bool = False) -> str:
        """A node's value in a dtype, shaped for use in a group; `typed` where a bare number would be misread."""
        node, own = self.expr.nodes[position], self.groups[position]
        if node.op == "const":
            return self._constant(node.value or 0, dtype, typed)
        name = self._converted(self.names[position], node.dtype, dtype)
        return name + self.expand[own] if group == "pairs" and own in self.expand else name

    def _converted(self, name: str, source: torch.dtype, dtype: torch.dtype) -> str:
        if self._type(source) == self._type(dtype):
            return name
        if dtype == torch.bool:
            return f"({name} != 0)"
        if source.is_floating_point and dtype == torch.uint8:
            name += ".to(tl.int64)"  # as torch does, so that negative numbers wrap
        elif dtype.is_floating_point and dtype.itemsize == 2 and source != torch.float32:
            name += ".to(tl.float32)"  # torch goes through float32, rounding twice
        return f"{name}.to({self._type(dtype)})"

    def _constant(self, value: Scalar, dtype: torch.dtype, typed: bool) -> str:
        """A number as Python writes it, wrapped or rounded to a dtype."""
        stored = torch.int32 if dtype == torch.int64 and self.narrow else dtype
        number = torch.tensor(value).to(stored).item()
        if not dtype.is_floating_point:
            text = f"({number})" if number < 0 else str(number)
        elif number == 0 and math.copysign(1, number) < 0:
            return f"(tl.full((), -1.0, {self._type(dtype)}) * 0.0)"  # Triton reads -0.0 as 0.0
        elif not math.isfinite(number):
            text = f'float("{number}")'
        else:
            text = repr(number if dtype.itemsize == 2 else float(value))
            typed = typed or dtype != torch.float32 or 0 < abs(number) < torch.finfo(torch.float32).tiny
        return f"tl.full((), {text}, {self._type(dtype)})" if typed else text

    def _group(self, node: Node) -> Group:
        if node.op in self.alone:
            return self.alone[node.op]
        found = {self.groups[arg] for arg in node.args} - {"once"}
        if not found:
            return "once"
        return found.pop() if len(found) == 1 else "pairs"

    def _computed(self, position: int, name: str, group: Group) -> str:
        node = self.expr.nodes[position]
        kinds = [self.expr.nodes[arg] for arg in node.args]
        bare = all(kind.op == "const" for kind in kinds)
        if node.op == "cast":
            return self.value(node.args[0], node.dtype, group, typed=True)
        if node.op == "select":
            condition = self.value(node.args[0], torch.bool, group)
            typed = node.dtype.is_floating_point or all(kind.op == "const" for kind in kinds[1:])
            x, y = (self.value(arg, node.dtype, group, typed=typed) for arg in node.args[1:])
            return f"tl.where({condition}, {x}, {y})"
        dtype = operand_dtype(node, kinds)
        typed = dtype.is_floating_point and node.op not in _INFIX
        x, *others = (
            self.value(arg, dtype, group, typed=typed or (bare and nth == 0)) for nth, arg in enumerate(node.args)
        )
        y = others[0] if others else ""
        if dtype.is_floating_point:
            return self._rounded(node, self._real(position, name, group, dtype, x, y))
        return self._rounded(node, self._whole(node, name, group, dtype, x, y))

    def _whole(self, node: Node, name: str, group: Group, dtype: torch.dtype, x: str, y: str) -> str:
        """An operation on integers or truth values."""
        op = ON_TRUTH.get(node.op, node.op) if dtype == torch.bool else node.op
        if op in _INFIX:
            return f"{x} {_INFIX[op]} {y}"
        match op:
            case "not":
                return f"{x} == 0"
            case "bitnot":
                return f"~{x}"
            case "neg":
                return f"-{x}"
            case "abs":
                return f"tl.abs({x})"
            case "min" | "max":
                return f"tl.{op}imum({x}, {y})"
            case "shl" | "shr":
                return self._shift(node, dtype, x, y)
            case "floordiv" | "mod" | "truncdiv" | "fmod":
                return self._division(node, name, group, dtype, x, y)
            case "floor" | "ceil" | "trunc" | "round":
                return x
        raise self._unsupported(op, dtype)

    def _real(self, position: int, name: str, group: Group, dtype: torch.dtype, x: str, y: str) -> str:
        """An operation on floating-point numbers, rounded as IEEE 754 says."""
        op, half = self.expr.nodes[position].op, dtype.itemsize == 2
        if op == "mul" and position in self._summed:
            # A product that meets a sum would be fused with it, and not be rounded. Adding 0.0 loses a zero's sign.
            if not self._divides:
                return f"tl.fma({x}, {y}, 0.0)"
            self.lines[group].append(f"{name}_p = tl.fma({x}, {y}, 0.0)")
            return f"tl.where({name}_p == 0, {x} * {y}, {name}_p)"
        if op in _INFIX:
            return f"{x} {_INFIX[op]} {y}"
        if half and op in ("truediv", "sqrt", "floor", "ceil", "trunc", "round"):  # Triton's want 32 bits
            x, y = (f"{text}.to(tl.float32)" if text else "" for text in (x, y))
        match op:
            case "neg":
                return f"{x} * -1.0"  # `-x` is 0 - x, which loses the sign of a zero
            case "abs":
                return f"tl.abs({x})"
            case "min" | "max":
                return f"tl.{op}imum({x}, {y}, propagate_nan=triton.language.PropagateNan.ALL)"
            case "truediv":
                return f"{x} / {y}" if dtype == torch.float64 else f"tl.div_rn({x}, {y})"
            case "truncdiv" if not half:
                quotient = f"{x} / {y}" if dtype == torch.float64 else f"tl.div_rn({x}, {y})"
                self.lines[group].append(f"{name}_d = {quotient}")
                return f"tl.where({name}_d < 0, tl.ceil({name}_d), tl.floor({name}_d))"
            case "sqrt":
                return f"tl.sqrt({x})" if dtype == torch.float64 else f"tl.sqrt_rn({x})"
            case "floor" | "ceil":
                return f"tl.{op}({x})"
            case "trunc":
                return f"tl.where({x} < 0, tl.ceil({x}), tl.floor({x}))"
            case "round":  # to the nearest, to the even one of two
                down, over = f"{name}_f", f"{name}_d"
                self.lines[group] += [f"{down} = tl.floor({x})", f"{over} = {x} - {down}"]
                odd = f"tl.floor({down} * 0.5) * 2 != {down}"
                return f"tl.where(({over} > 0.5) | (({over} == 0.5) & ({odd})), {down} + 1, {down})"
        raise self._unsupported(op, dtype)

    def _unsupported(self, op: str, dtype: torch.dtype) -> BackendError:
        kind, source = str(dtype).removeprefix("torch."), self.expr.source(self._place)
        where = f", in {source}" if source else ""
        return BackendError(
            f"the triton backend has no exact `{op}` for {kind}{where}; compute it outside the {self.what}, into a "
            f"table that the {self.what} looks up"
        )

    def _shift(self, node: Node, dtype: torch.dtype, x: str, y: str) -> str:
        """Shifts by less than 0, or by all the bits there are, leave the sign, as in torch."""
        bits = 32 if self.narrow and dtype == torch.int64 else 8 * dtype.itemsize
        left, sign = node.op == "shl", f"tl.where({x} < 0, -1, 0)" if dtype.is_signed else f"{x} * 0"
        beyond = f"{x} * 0" if left else sign
        shifted, count = f"{x} {'<<' if left else '>>'} ", self.expr.nodes[node.args[1]]
        if count.op == "const":
            return f"{shifted}{y}" if 0 <= int(count.value or 0) < bits else beyond
        return f"tl.where(({y} >= 0) & ({y} < {bits}), {shifted}({y} & {bits - 1}), {beyond})"

    def _division(self, node: Node, name: str, group: Group, dtype: torch.dtype, x: str, y: str) -> str:
        """Triton divides as C does, towards zero; where torch rounds down, the remainder's sign tells."""
        divisor, dividend = (self.expr.nodes[arg] for arg in node.args[::-1])
        fixed = divisor.op == "const"
        d = int(torch.tensor(divisor.value).to(dtype)) if fixed else 0
        if not fixed:
            self.lines[group].append(f"{name}_d = tl.where({y} == 0, 1, {y})")  # a guard may exclude 0
            y = f"{name}_d"
        elif d == 0:
            y = "1"
        op = {"floordiv": "//", "truncdiv": "//", "mod": "%", "fmod": "%"}[node.op]
        floored = node.op in ("floordiv", "mod") and dtype.is_signed
        if floored and d > 0 and d & (d - 1) == 0:  # an arithmetic shift and a mask round down by themselves
            return f"{x} >> {d.bit_length() - 1}" if op == "//" else f"{x} & {d - 1}"
        if not floored or (d > 0 and dividend.op in self.natural):  # these are never negative
            return f"{x} {op} {y}"
        remainder = f"{name}_r"
        self.lines[group].append(f"{remainder} = {x} % {y}")
        wrong = f"({remainder} < 0)" if d > 0 else f"({remainder} != 0) & (({remainder} < 0) != ({y} < 0))"
        if op == "//":
            return f"{x} // {y} - {wrong if d > 0 else f'({wrong})'}"
        return f"tl.where({wrong}, {remainder} + {y}, {remainder})"

    def _rounded(self, node: Node, text: str) -> str:
        """The value in its own dtype: small integers wrap, half types round."""
        wide = (torch.bool, torch.int64, torch.int32, torch.float32, torch.float64)
        return text if node.op in COMPARISONS or node.dtype in wide else f"({text}).to({self._type(node.dtype)})"

    def _lookup(self, node: Node, name: str, group: Group) -> str:
        kind, table = self.tables[node.slot], f"{self.prefix}t{node.slot}"
        places, inside = [], []
        for axis, arg in enumerate(node.args):
            size = self._number(f"{table}_size{axis}")
            index = self.value(arg, torch.int64, group, typed=True)
            if self.expr.nodes[arg].op in self.natural:  # these are never negative
                inside.append(f"({index} < {size})")
            else:
                self.lines[group].append(f"{name}_{axis} = tl.where({index} < 0, {index} + {size}, {index})")
                index = f"{name}_{axis}"
                inside.append(f"({index} >= 0) & ({index} < {size})")
            places.append(f" + {index}.to(tl.int64) * {table}_stride{axis}")
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        return self._loaded(kind, f"tl.load({table}{''.join(places)}{mask})")

    def _loaded(self, kind: TableKind, text: str) -> str:
        """What a table has in memory, as the program has it."""
        if kind.dtype == torch.bool:  # bytes in memory
            return f"{text} != 0"
        return f"{text}.to({self._type(torch.int64)})" if kind.dtype == torch.int64 and self.narrow else text

    def _remark(self, position: int, group: Group) -> None:
        """Name the user's line above the first statement that comes from it."""
        source = self.expr.source(position)
        if source is None:
            return
        line = f"{source.function} ({Path(source.filename).name}:{source.line})"
        text = f"# {line}: {source.text}" if source.text else f"# {line}"
        if self._said.get(group) != line:
            self._said[group] = line
            self.lines[group].append(" ".join(text.split()))  # whatever it holds, it stays one line

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
