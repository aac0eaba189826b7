"""A score's program -> Triton statements: what becomes of a scaled product, and how that changes with what it reads.

    s_x2 = score * s_x1            a mask's statements (`emit.py`), under names of their own
    s_x3 = _tanh(s_x2)             and operations whose last bits depend on who computes them
    value, slope, lookups          what a kernel does with them

Sums may be fused and quotients be a unit off: a score is a product of tensor cores anyway. But what decides an integer
or a truth must be the same everywhere, unless the score itself has a part in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from maskflash.backends.triton.emit import Group, Writer, handed_on
from maskflash.backends.triton.signature import SCORE, ScoreKind
from maskflash.errors import BackendError
from maskflash.expr.derivative import differentiate
from maskflash.expr.nodes import Expr, Node
from maskflash.expr.ops import OPERATIONS

FUNCTIONS: Final = ("tanh", "expm1", "log1p", "tan", "atan", "pow")
"""What `functions.jinja` has, since Triton lacks it or has it in libraries of some devices."""
_TRITONS: Final = ("exp", "exp2", "log", "log2", "erf", "rsqrt", "sin", "cos")


@dataclass(frozen=True, slots=True)
class Lookup:
    """A look-up whose table learns.

    Attributes:
        slot: of the table.
        derivative: of the value in what is read, an expression that broadcasts to the tile.
        group: what the index depends on, and so its shape.
        pointer: to where a dense table `sums*` has what is read: an expression.
        inside: whether the index is in range: an expression; empty for a table without dimensions.
    """

    slot: int
    derivative: str
    group: Group
    pointer: str
    inside: str


@dataclass(frozen=True, slots=True)
class EmittedScore:
    """Triton text of a score.

    Attributes:
        lines: statements by group. They find the scaled product in `score`, and the pair's numbers in `s_b`, `s_h`,
            `s_q` and `s_kv`, offsets included.
        value: an expression, of the tile's shape.
        slope: its derivative in the score, an expression that broadcasts to the tile.
        lookups: those whose derivatives are wanted.
        functions: names of FUNCTIONS that the statements call.
    """

    lines: Mapping[Group, list[str]]
    value: str
    slope: str
    lookups: tuple[Lookup, ...]
    functions: tuple[str, ...]

    @property
    def handed_on(self) -> list[str]:
        """What columns have and pairs use, by name."""
        return handed_on(self.lines, self.value)


def emit_score(
    kind: ScoreKind,
    *,
    backward: bool = False,
    transposed: bool = False,
    packed: bool = False,
    remarks: bool = False,
) -> EmittedScore:
    """Write a score in Triton.

    Args:
        kind: the score; the derivatives of its `learned` tables are written too.
        backward: write its slope, unless tables learn: a kernel has the one or the other.
        transposed: the tile is keys x queries instead of queries x keys.
        packed: the tile's rows are of several heads.
        remarks: name the user's lines above what comes of them.

    Raises:
        BackendError: an operation that Triton doesn't have, or one that is inexact and decides what must be exact.
    """
    derivatives = differentiate(kind.expr)
    value, learned = derivatives.value, kind.learned
    nodes = derivatives.expr.nodes
    slope = derivatives.slope if backward and not learned else None
    read = [(at, _uncast(derivatives.expr, d)) for at, d in derivatives.lookups if nodes[at].slot in learned]
    # Derivatives are found by text: the lines may be those of another function that says the same.
    own = kind.expr.sources and (*kind.expr.sources, *derivatives.expr.sources[len(kind.expr.nodes) :])
    writer = _Writer(kind, Expr(nodes, own), transposed, remarks)
    if packed:
        writer.alone = {**writer.alone, "h": "rows"}
    writer.write_all((value, *(() if slope is None else (slope,)), *(root for pair in read for root in pair)))
    text = writer.value(value, torch.float32, "pairs", typed=True)
    if writer.groups[value] != "pairs":
        text = f"tl.zeros_like(score) + {text}"
    return EmittedScore(
        writer.lines,
        text,
        "0.0" if slope is None else writer.value(slope, torch.float32, "pairs"),
        tuple(writer.lookup(at, derivative) for at, derivative in read),
        tuple(name for name in FUNCTIONS if name in writer.functions),
    )


class _Index(NamedTuple):
    """An index of a look-up, in the shape of its own group."""

    group: Group
    text: str
    inside: str


class _Writer(Writer):
    """Attributes of its own: `functions`, those that were called."""

    what = "score"
    prefix = SCORE

    def __init__(self, kind: ScoreKind, expr: Expr, transposed: bool, remarks: bool) -> None:
        super().__init__(expr, kind.tables, kind.narrow, transposed, kind.negative_kv, remarks)
        self.functions: set[str] = set()
        self._exact = deciding(kind.expr)  # derivatives follow, at positions of their own
        self._summed &= self._exact
        self._near = kind.near
        self._indices: dict[int, list[_Index]] = {}
        self._written_once: set[str] = set()

    def write_all(self, roots: Iterable[int]) -> None:
        """Append the statements of what these nodes need."""
        needed, stack = set(roots), list(roots)
        while stack:
            fresh = set(self.expr.nodes[stack.pop()].args) - needed
            needed |= fresh
            stack += fresh
        for position, node in enumerate(self.expr.nodes):
            if position not in needed or node.op == "score":
                self.groups.append("pairs")
                self.names.append("score")
            else:
                self.write(position)

    def value(self, position: int, dtype: torch.dtype, group: Group, *, typed: bool = False) -> str:
        """As a mask's; what loops need in another dtype is converted before them."""
        node, name = self.expr.nodes[position], self.names[position]
        if node.op == "const" or self.groups[position] != "once" or group == "once":
            return super().value(position, dtype, group, typed=typed)
        converted = super().value(position, dtype, "once")
        if converted == name:
            return name
        return self._once(f"{name}_{str(dtype).removeprefix('torch.')}", converted)

    def lookup(self, position: int, derivative: int) -> Lookup:
        """A look-up that was written, and its derivative."""
        node, group = self.expr.nodes[position], self.groups[position]
        sizes = [f"{SCORE}t{node.slot}_size{axis}" for axis in range(len(node.args))]
        steps = [" * ".join(sizes[axis + 1 :]) or "tl.full((), 1, tl.int64)" for axis in range(len(sizes))]
        pointer = self._pointer(f"{SCORE}x{position}_g", f"sums{node.slot}", steps, self._indices[position], group)
        inside = " & ".join(self._shaped(index.inside, index.group, group) for index in self._indices[position])
        return Lookup(node.slot, self.value(derivative, torch.float32, "pairs"), group, pointer, inside)

    def _lookup(self, node: Node, name: str, group: Group) -> str:
        """As a mask's; but what rows and columns have to do with the place is found once for each of them."""
        table = f"{self.prefix}t{node.slot}"
        indices = self._indices[self._place] = [
            self._index(arg, f"{name}_{axis}", self._number(f"{table}_size{axis}"))
            for axis, arg in enumerate(node.args)
        ]
        steps = [f"{table}_stride{axis}" for axis in range(len(indices))]
        inside = " & ".join(self._shaped(index.inside, index.group, group) for index in indices)
        pointer = self._pointer(f"{name}_t", table, steps, indices, group)
        mask = f", mask={inside}, other=0" if inside else ""
        return self._loaded(self.tables[node.slot], f"tl.load({pointer}{mask})")

    def _index(self, arg: int, name: str, size: str) -> _Index:
        """An index that counts from a table's start, and whether it is in range."""
        group = self.groups[arg]
        index = self.value(arg, torch.int64, group, typed=True)
        if self.expr.nodes[arg].op in self.natural:
            return _Index(group, index, f"({index} < {size})")
        self.lines[group].append(f"{name} = tl.where({index} < 0, {index} + {size}, {index})")
        return _Index(group, name, f"(({name} >= 0) & ({name} < {size}))")

    def _pointer(self, name: str, table: str, steps: list[str], indices: list[_Index], group: Group) -> str:
        """Where a look-up's elements are: one address for the kernel, and offsets in as few bits as hold them."""
        wide, offsets = f".to(tl.int{32 if self._near else 64})", []
        for axis, (index, step) in enumerate(zip(indices, steps, strict=True)):
            if index.group == "once":
                table = self._once(f"{name}{axis}", f"{table} + {index.text}.to(tl.int64) * {step}")
                continue
            if self._near:
                step = self._once(f"{name}{axis}_32", f"({step}).to(tl.int32)")
            self.lines[index.group].append(f"{name}{axis} = {index.text}{wide} * {step}")
            offsets.append(self._shaped(f"{name}{axis}", index.group, group))
        return f"{table} + ({' + '.join(offsets)})" if offsets else table

    def _shaped(self, text: str, own: Group, group: Group) -> str:
        return text + self.expand[own] if group == "pairs" and own in self.expand else text

    def _once(self, name: str, text: str) -> str:
        """A name for what is computed once in a kernel."""
        if name not in self._written_once:
            self._written_once.add(name)
            self.lines["once"].append(f"{name} = {text}")
        return name

    def _real(self, position: int, name: str, group: Group, dtype: torch.dtype, x: str, y: str) -> str:
        node = self.expr.nodes[position]
        exact, inexact = position in self._exact, OPERATIONS[node.op].inexact
        if exact and inexact:
            raise self._undecided(node.op)
        if exact:
            return super()._real(position, name, group, dtype, x, y)
        half = dtype.itemsize == 2
        if half and (inexact or node.op in ("floordiv", "mod", "fmod")):
            x, y = (f"{text}.to(tl.float32)" if text else "" for text in (x, y))
        match node.op:
            case "truediv" if not half:
                return self._quotient(node, name, group, x, y)
            case "sqrt" if not half:
                return f"tl.sqrt({x})"
            case "floordiv":
                return f"tl.floor({x} / {y})"
            case "mod":
                return f"{x} - tl.floor({x} / {y}) * {y}"
            case "fmod":
                self.lines[group].append(f"{name}_d = {x} / {y}")
                return f"{x} - tl.where({name}_d < 0, tl.ceil({name}_d), tl.floor({name}_d)) * {y}"
        return self._smooth(node, x, y) if inexact else super()._real(position, name, group, dtype, x, y)

    def _quotient(self, node: Node, name: str, group: Group, x: str, y: str) -> str:
        """A division; by what a whole kernel divides by, a product with its inverse."""
        if self.groups[node.args[1]] != "once" or group == "once":
            return f"{x} / {y}"
        self.lines["once"].append(f"{name}_i = 1.0 / {y}")
        return f"{x} * {name}_i"

    def _smooth(self, node: Node, x: str, y: str) -> str:
        """An operation whose last bits are Triton's own."""
        if node.op in _TRITONS:
            return f"tl.{node.op}({x})"
        if node.op == "sigmoid":
            return f"1.0 / (1.0 + tl.exp({x} * -1.0))"
        if node.op == "pow":
            exponent = self.expr.nodes[node.args[1]]
            if exponent.op == "const" and exponent.value in (2, 3):
                return " * ".join([x] * int(exponent.value))
        if node.op not in FUNCTIONS:
            raise self._unsupported(node.op, node.dtype)
        self.functions.add(node.op)
        return f"_{node.op}({x}, {y})" if y else f"_{node.op}({x})"

    def _undecided(self, op: str) -> BackendError:
        source = self.expr.source(self._place)
        where = f", in {source}" if source else ""
        return BackendError(
            f"the triton backend rounds `{op}` as the device does, which may be to either side, and here it decides an "
            f"index or a comparison{where}; compute it with torch outside the score, into a table that the score looks "
            "up"
        )


def deciding(expr: Expr) -> set[int]:
    """The real numbers that integers, look-ups or truths are made of, but for those that depend on the score."""
    found: set[int] = set()
    for position in range(len(expr.nodes) - 1, -1, -1):
        node = expr.nodes[position]
        if position in found or (node.args and not node.dtype.is_floating_point):
            found.update(arg for arg in node.args if expr.nodes[arg].dtype.is_floating_point)
    scored: set[int] = set()
    for position, node in enumerate(expr.nodes):
        if node.op == "score" or scored.intersection(node.args):
            scored.add(position)
    return found - scored


def _uncast(expr: Expr, position: int) -> int:
    """A derivative before it is rounded to its table's dtype: sums of it are rounded once, in the end."""
    while (node := expr.nodes[position]).op == "cast" and expr.nodes[node.args[0]].dtype.is_floating_point:
        position = node.args[0]
    return position
