"""Any mask -> a mask_mod of FlashAttention 4, as text in CuTe's Python dialect, with the tensors and numbers it reads.

The function is of one pair: every node of the mask becomes one assignment, `x<position> = ...`, of a number in a
register. Integers of up to 32 bits are Int32, wrapped where torch wraps; 64-bit ones are Int64, or Int32 where none of
the mask's needs more. Numbers of the mask are aux_scalars, so that another window or length is no other text. Look-ups
are clamped to their tables: what a guard excludes, or lies past the lengths, may be out of range.

The dialect, as nvidia-cutlass-dsl 4.8.1 has it: `//` rounds down, `%` is C's, Int8(x) keeps the low bits, an i1 is
signed in comparisons. Source of the signature: call_mask_mod in flash_attn/cute/mask.py of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.errors import BackendError, UnsupportedMask
from maskflash.expr.nodes import Expr, Node, Scalar, operand_dtype
from maskflash.expr.ops import COMPARISONS, ON_TRUTH, OPERATIONS

NAME: Final = "mask_mod"
_INDICES: Final = {"b": "batch", "h": "head", "q": "m_idx", "kv": "n_idx"}
_SMALL: Final = {torch.int8: "Int8", torch.int16: "Int16", torch.uint8: "Uint8"}  # computed in Int32, and wrapped
_REAL: Final = {torch.float32: "Float32", torch.float64: "Float64"}
_HALF: Final = {torch.float16: "Float16", torch.bfloat16: "BFloat16"}  # looked up, compared and cast, no more
_LIMIT: Final = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class CuteMask:
    """A mask as FlashAttention 4 takes one: `flash_attn_func(..., mask_mod=form.function(), ...)`.

    Attributes:
        text: a Python module with the function `mask_mod`, decorated with `cute.jit`; it takes (batch, head, m_idx,
            n_idx, seqlen_info, aux_tensors), and aux_scalars where there are any.
        aux_tensors: the tables that it looks up, on the device of the call; bools as bytes. They are the mask's own
            where they can be: what is written to them is seen, and block-sparse tensors made before are not.
        scalars: a type of CuTe's and a number for each of its aux_scalars.
    """

    text: str
    aux_tensors: tuple[Tensor, ...]
    scalars: tuple[tuple[str, Scalar], ...]

    def function(self) -> Callable[..., Any]:
        """The function, made by CuTe's own decorator; of one text it is the same code.

        Raises:
            BackendError: nvidia-cutlass-dsl isn't installed.
        """
        _cutlass()
        file = f"<maskflash {NAME} {hash(self.text):x}>"
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(keepends=True), file)  # CuTe reads it
        names: dict[str, Any] = {"__name__": NAME}
        exec(compile(self.text, file, "exec"), names)
        made: Callable[..., Any] = names[NAME]
        return made

    def aux_scalars(self) -> tuple[Any, ...] | None:
        """The numbers as CuTe's, which are no part of what is compiled; None where there are none.

        Raises:
            BackendError: nvidia-cutlass-dsl isn't installed.
        """
        cutlass = _cutlass()
        return tuple([getattr(cutlass, kind)(value) for kind, value in self.scalars]) or None


def _cutlass() -> Any:
    try:
        import_module("cutlass.cute")
        return import_module("cutlass")
    except ImportError as error:
        raise BackendError(
            f"to_cute: nvidia-cutlass-dsl can't be imported ({error}); pip install nvidia-cutlass-dsl"
        ) from error


def to_cute(problem: Problem) -> CuteMask:
    """The function of a problem's mask, and what it reads.

    Raises:
        UnsupportedMask: an operation that has no exact counterpart in CuTe, by name and place.
    """
    writer = _CuteWriter(problem)
    result = writer.written()
    given = "batch, head, m_idx, n_idx, seqlen_info, aux_tensors" + ", aux_scalars" * bool(writer.scalars)
    lines = [
        *("import cutlass", "import cutlass.cute as cute", "", "", "@cute.jit", f"def {NAME}({given}):"),
        *(f"    {line}" for line in writer.lines),
        "    visible = cute.make_rmem_tensor(1, cutlass.Boolean)",
        f"    visible[0] = {result}",
        "    return visible.load()",
    ]
    return CuteMask("\n".join(lines) + "\n", tuple(writer.tables), tuple(writer.scalars))


def aux_tensors(problem: Problem) -> tuple[Tensor, ...]:
    """What the function of a problem's mask reads, in order: its tables, and the offsets of each batch row."""
    tables = [_as_aux(table) for table in problem.inputs.tables]
    offsets = (("q", problem.q_offset), ("kv", problem.kv_offset))
    read = [x.to(torch.int64) for index, x in offsets if index in problem.expr.reads and isinstance(x, Tensor)]
    return *tables, *read


class _CuteWriter:
    """Writes a program's nodes in order.

    Attributes:
        lines: statements.
        tables: what is looked up.
        scalars: types and numbers.
    """

    def __init__(self, problem: Problem) -> None:
        self.expr: Expr = problem.expr
        sizes = (size for table in problem.inputs.tables for size in table.shape)
        self.wide = max(problem.on_host().largest(), *sizes, 0) >= _LIMIT
        self.lines: list[str] = []
        self.tables: list[Tensor] = []
        self.scalars: list[tuple[str, Scalar]] = []
        self._problem = problem
        offsets = {"b": 0, "h": 0, "q": problem.q_offset, "kv": problem.kv_offset}
        self._natural = {name for name, x in offsets.items() if not isinstance(x, Tensor) and x >= 0}  # never negative
        self._names: list[str] = []
        self._place = 0  # of the node that is being written

    def written(self) -> str:
        """Write all; what says whether the pair is visible."""
        problem, expr = self._problem, self.expr
        self.tables += [_as_aux(table) for table in problem.inputs.tables]
        for index, argument in _INDICES.items():
            if index in expr.reads:
                self.lines.append(f"{index} = {self._to(torch.int64)}({argument}[0])")
        for index, offset in (("q", problem.q_offset), ("kv", problem.kv_offset)):
            if index in expr.reads and (isinstance(offset, Tensor) or offset):
                self.lines.append(f"{index} = {index} + {self._offset(offset)}")
        for position, node in enumerate(expr.nodes):
            self._place = position
            if node.op == "mul" and node.dtype.is_floating_point and position in expr.summed:
                raise self._unsupported("mul of a sum", node.dtype)  # ptxas may fuse them, and round once
            self._write(position, node)
        return self._value(len(expr.nodes) - 1, torch.bool)

    def _offset(self, offset: int | Tensor) -> str:
        """What is added to an index: a number, or the batch row's."""
        if not isinstance(offset, Tensor):
            return self._scalar(torch.int64, offset)
        self.tables.append(offset.to(torch.int64))
        return f"{self._to(torch.int64)}(aux_tensors[{len(self.tables) - 1}][batch[0]])"

    def _scalar(self, dtype: torch.dtype, value: Scalar) -> str:
        self.scalars.append((self._kind(dtype), value))
        return f"aux_scalars[{len(self.scalars) - 1}]"

    def _write(self, position: int, node: Node) -> None:
        if node.op in _INDICES:
            self._names.append(node.op)
            return
        if node.op == "const":
            self._names.append("")  # written where it is used, in the dtype it is used in
            return
        name = f"x{position}"
        if node.op == "param":
            text = self._scalar(node.dtype, self._problem.inputs.params[node.slot])
        elif node.op == "lookup":
            text = self._lookup(node, name)
        else:
            text = self._computed(node, name)
        self.lines.append(f"{name} = {text}")
        self._names.append(name)

    def _value(self, position: int, dtype: torch.dtype) -> str:
        """A node's value in a dtype."""
        node = self.expr.nodes[position]
        if node.op == "const":
            number = torch.tensor(node.value).to(dtype).item()
            text = repr(number) if abs(number) < float("inf") else f'float("{number}")'
            return f"{self._to(dtype)}({text})"
        name, source = self._names[position], node.dtype
        if source == dtype or (self._to(source) == self._to(dtype) and dtype not in _SMALL):
            return name
        if dtype == torch.bool:
            return f"({name} != {self._to(source)}(0))"
        if source.is_floating_point and not dtype.is_floating_point:
            raise self._unsupported("cast", source)
        if dtype in _HALF or (source in _HALF and dtype == torch.float64):
            raise self._unsupported("cast", dtype)
        return self._wrapped(f"{self._to(dtype)}({name})", dtype)

    def _wrapped(self, text: str, dtype: torch.dtype) -> str:
        """An Int32 as one of fewer bits, which stays an Int32."""
        return f"cutlass.Int32(cutlass.{_SMALL[dtype]}({text}))" if dtype in _SMALL else text

    def _computed(self, node: Node, name: str) -> str:
        kinds = [self.expr.nodes[arg] for arg in node.args]
        if node.op == "cast":
            return self._value(node.args[0], node.dtype)
        if node.op == "select":
            condition, (x, y) = (
                self._value(node.args[0], torch.bool),
                (self._value(a, node.dtype) for a in node.args[1:]),
            )
            return f"cutlass.select_({condition}, {x}, {y})"
        dtype = operand_dtype(node, kinds)
        if dtype == torch.bool and node.op in COMPARISONS:
            dtype = torch.int32  # True as an i1 is -1
        x, *others = (self._value(arg, dtype) for arg in node.args)
        y = others[0] if others else ""
        if dtype.is_floating_point:
            return self._real(node.op, dtype, x, y)
        return self._wrapped(self._whole(node, name, dtype, x, y), node.dtype)

    def _real(self, op: str, dtype: torch.dtype, x: str, y: str) -> str:
        """An operation on floating-point numbers, where it is rounded alike everywhere."""
        if op in COMPARISONS or (op in ("add", "sub", "mul") and dtype in _REAL):
            return f"{x} {OPERATIONS[op].symbol} {y}"
        if op == "neg" and dtype in _REAL:
            return f"{x} * {self._to(dtype)}(-1.0)"
        raise self._unsupported(op, dtype)

    def _whole(self, node: Node, name: str, dtype: torch.dtype, x: str, y: str) -> str:
        """An operation on integers or truth values."""
        op = ON_TRUTH.get(node.op, node.op) if dtype == torch.bool else node.op
        kind = self._to(dtype)
        match op:
            case "and" | "or":
                return f"{x} {'&' if op == 'and' else '|'} {y}"
            case "not":
                return f"{x} ^ cutlass.Boolean(True)"
            case "bitnot":
                return f"~{x}"
            case "neg":
                return f"-{x}"
            case "abs":
                return f"cutlass.select_({x} < {kind}(0), -{x}, {x})"
            case "min" | "max":
                return f"cutlass.{op}({x}, {y})"
            case "shl" | "shr":
                return self._shift(op == "shl", dtype, x, y)
            case "floordiv" | "mod" | "truncdiv" | "fmod":
                return self._division(op, name, kind, x, y)
            case "floor" | "ceil" | "trunc" | "round":
                return x
        if OPERATIONS[op].symbol:
            return f"{x} {OPERATIONS[op].symbol} {y}"
        raise self._unsupported(op, dtype)

    def _shift(self, left: bool, dtype: torch.dtype, x: str, y: str) -> str:
        """Shifts by less than 0, or by all the bits there are, leave the sign, as in torch."""
        bits, kind = 32 if dtype == torch.int64 and not self.wide else 8 * dtype.itemsize, self._to(dtype)
        beyond = (
            f"{kind}(0)" if left or not dtype.is_signed else f"cutlass.select_({x} < {kind}(0), {kind}(-1), {kind}(0))"
        )
        within = f"({y} >= {kind}(0)) & ({y} < {kind}({bits}))"
        return f"cutlass.select_({within}, {x} {'<<' if left else '>>'} ({y} & {kind}({bits - 1})), {beyond})"

    def _division(self, op: str, name: str, kind: str, x: str, y: str) -> str:
        """By the quotient rounded down; towards zero it is one more where signs differ and something is left."""
        self.lines.append(f"{name}_d = cutlass.select_({y} == {kind}(0), {kind}(1), {y})")  # a guard may exclude 0
        y = f"{name}_d"
        if op == "floordiv":
            return f"{x} // {y}"
        self.lines.append(f"{name}_q = {x} // {y}")
        if op != "mod":
            more = f"({name}_q < {kind}(0)) & ({name}_q * {y} != {x})"
            self.lines.append(f"{name}_q = cutlass.select_({more}, {name}_q + {kind}(1), {name}_q)")
        return f"{name}_q" if op == "truncdiv" else f"{x} - {name}_q * {y}"

    def _lookup(self, node: Node, name: str) -> str:
        table, kind = f"aux_tensors[{node.slot}]", self._to(torch.int64)
        shape = self._problem.inputs.tables[node.slot].shape
        if 0 in shape:
            return f"{self._to(node.dtype)}(0)"
        places = []
        for axis, arg in enumerate(node.args):
            place, size, value = f"{name}_{axis}", f"{table}.shape[{axis}]", self._value(arg, torch.int64)
            last = f"{kind}({size} - 1)"
            if self.expr.nodes[arg].op in self._natural:
                self.lines.append(f"{place} = cutlass.min({value}, {last})")
            else:
                self.lines += [
                    f"{place} = cutlass.select_({value} < {kind}(0), {value} + {kind}({size}), {value})",
                    f"{place} = cutlass.max(cutlass.min({place}, {last}), {kind}(0))",
                ]
            places.append(f"cutlass.Int32({place})" if self.wide else place)
        loaded = f"{table}[{', '.join(places) or '0'}]"
        return f"{loaded} != 0" if node.dtype == torch.bool else f"{self._to(node.dtype)}({loaded})"

    def _to(self, dtype: torch.dtype) -> str:
        return f"cutlass.{self._kind(dtype)}"

    def _kind(self, dtype: torch.dtype) -> str:
        """The type that a value of a dtype has in the function."""
        if dtype == torch.bool:
            return "Boolean"
        if dtype == torch.int64:
            return "Int64" if self.wide else "Int32"
        if dtype == torch.int32 or dtype in _SMALL:
            return "Int32"
        known = {**_REAL, **_HALF}
        if dtype not in known:
            raise self._unsupported("lookup", dtype)
        return known[dtype]

    def _unsupported(self, op: str, dtype: torch.dtype) -> UnsupportedMask:
        kind, source = str(dtype).removeprefix("torch."), self.expr.source(self._place)
        where = f", in {source}" if source else ""
        return UnsupportedMask(
            f"to_cute: CuTe has no exact `{op}` for {kind}{where}; compute it outside the mask, into a table that the "
            "mask looks up"
        )


def _as_aux(table: Tensor) -> Tensor:
    """A table as CuTe takes it: bools as bytes, at least one dimension."""
    table = table.view(torch.uint8) if table.dtype == torch.bool else table
    return table if table.ndim else table.view(1)
