"""Immutable expression nodes in evaluation order, and the canonical text that stands for them.

The grammar (every operand precedes its user, the last node is the mask):

    expr    = node*
    node    = b | h | q | kv                          int64 indices of the pair
            | const value                             part of the structure (divisors, moduli, shifts, bit masks)
            | param slot                              a number given at run time (windows, offsets, lengths, radii)
            | lookup slot (index*)                    an element of a run-time table; no index for a 0-dim tensor
            | cast x | neg x | abs x | not x | bitnot x | floor x | ceil x | trunc x | round x | sqrt x
            | add x y | sub | mul | truediv | floordiv | mod | truncdiv | fmod | min | max
            | shl x y | shr | bitand | bitor | bitxor
            | eq x y | ne | lt | le | gt | ge
            | and x y | or x y | select c x y         guarded: y (or a branch) matters only where x (or c) lets it

Every node has a torch dtype. `weak` marks Python numbers, which yield to a tensor's dtype under torch's promotion
rules; lengths, windows, table contents and offsets are never part of the text, so a kernel made from it serves all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

INDEX_VARIABLES = ("b", "h", "q", "kv")
OPPOSITES = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
COMPARISONS = frozenset(OPPOSITES)
CONNECTIVES = frozenset(("and", "or", "not"))
ARITY = {
    **dict.fromkeys((*INDEX_VARIABLES, "const", "param"), 0),
    **dict.fromkeys(("cast", "neg", "abs", "not", "bitnot", "floor", "ceil", "trunc", "round", "sqrt"), 1),
    **dict.fromkeys(("add", "sub", "mul", "truediv", "floordiv", "mod", "truncdiv", "fmod", "min", "max"), 2),
    **dict.fromkeys(("shl", "shr", "bitand", "bitor", "bitxor", *COMPARISONS, "and", "or"), 2),
    "select": 3,
}  # "lookup" takes any number

Scalar = int | float | bool
_OF_INTEGERS = frozenset(("neg", "abs", "bitnot", "add", "sub", "mul", "floordiv", "mod", "shl", "shr"))

_REAL, _INTEGER = struct.Struct("<d"), struct.Struct("<q")


class Source(NamedTuple):
    """Where the user wrote an operation."""

    function: str
    filename: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.function} ({self.filename}:{self.line})"


@dataclass(frozen=True, slots=True)
class Node:
    """One operation; `args` are positions of earlier nodes, `value` a constant or the slot of a param or table."""

    op: str
    args: tuple[int, ...]
    dtype: torch.dtype
    weak: bool = False
    value: Scalar | None = None

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("~" if self.weak else "")
        value = "" if self.value is None else f"={self.value!r}"
        return f"{self.op}{value}:{kind}({','.join(map(str, self.args))})"


@dataclass(frozen=True)
class Expr:
    """A mask as a straight-line program. Equal structure means equal expressions; source lines don't count."""

    nodes: tuple[Node, ...]
    sources: tuple[Source | None, ...] = field(compare=False, repr=False, default=())

    @cached_property
    def text(self) -> str:
        """Canonical text: the key of kernels, and what pickles and crosses the op's boundary. Node per `;`."""
        return ";".join(map(str, self.nodes))

    @cached_property
    def reads(self) -> frozenset[str]:
        """The index variables the mask looks at, of b, h, q, kv."""
        return frozenset(node.op for node in self.nodes if node.op in INDEX_VARIABLES)

    @cached_property
    def real_params(self) -> frozenset[int]:
        """The slots of params that are floating-point numbers."""
        params = (node for node in self.nodes if node.op == "param" and node.dtype.is_floating_point)
        return frozenset(int(node.value or 0) for node in params)

    def coded(self, params: Sequence[Scalar]) -> list[int]:
        """Params as integers, which is how they leave this process: of a float its 64 bits, NaN and -0.0 too."""
        return [bits_of(value) if isinstance(value, float) else int(value) for value in params]

    def decoded(self, params: Sequence[int]) -> tuple[Scalar, ...]:
        """What `coded` made integers of."""
        real = self.real_params
        return tuple([_float(value) if slot in real else value for slot, value in enumerate(params)])

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each node the position of its last user, so that evaluation can free what is spent."""
        last = list(range(len(self.nodes)))
        for position, node in enumerate(self.nodes):
            for arg in node.args:
                last[arg] = position
        last[-1] = len(self.nodes)
        return tuple(last)

    def slots(self, op: str) -> int:
        """How many run-time values of this kind ("param" or "lookup") the expression numbers."""
        return 1 + max((int(node.value or 0) for node in self.nodes if node.op == op), default=-1)

    def source(self, position: int) -> Source | None:
        """Where the user wrote this node, if known."""
        return self.sources[position] if self.sources else None

    def part(self, root: int) -> Expr:
        """A node as an expression of its own, at the cost of what it is made of."""
        needed, stack = {root}, [root]
        while stack:
            fresh = set(self.nodes[stack.pop()].args) - needed
            needed |= fresh
            stack += fresh
        order = sorted(needed)
        place = {old: new for new, old in enumerate(order)}
        nodes = (self.nodes[old] for old in order)
        kept = tuple(Node(n.op, tuple(place[a] for a in n.args), n.dtype, n.weak, n.value) for n in nodes)
        return Expr(kept, tuple(self.source(old) for old in order))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.text, self.sources)

    def __deepcopy__(self, memo: dict[int, Any]) -> Expr:
        return self

    def __str__(self) -> str:
        from maskflash.expr.format import format_expr

        return format_expr(self)


def parse(text: str) -> Expr:
    """The expression of a canonical text (the inverse of `Expr.text`)."""
    nodes = []
    for item in text.split(";"):
        head, _, rest = item.partition(":")
        op, _, value = head.partition("=")
        kind, _, args = rest.rstrip(")").partition("(")
        dtype = getattr(torch, kind.rstrip("~"))
        operands = tuple(int(arg) for arg in args.split(",") if arg)
        nodes.append(Node(op, operands, dtype, kind.endswith("~"), _parse_scalar(value, dtype) if value else None))
    return Expr(tuple(nodes))


def bits_of(number: float) -> int:
    """The 64 bits of a float, as an integer."""
    bits: int = _INTEGER.unpack(_REAL.pack(number))[0]
    return bits


def _float(bits: int) -> float:
    number: float = _REAL.unpack(_INTEGER.pack(bits))[0]
    return number


def _restore(text: str, sources: tuple[Source | None, ...]) -> Expr:
    return Expr(parse(text).nodes, sources)


def _parse_scalar(text: str, dtype: torch.dtype) -> Scalar:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return float(text)


class Builder:
    """Grows an expression; a node that exists already is shared, not repeated."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.sources: list[Source | None] = []
        self._positions: dict[tuple[Node, str], int] = {}

    def add(
        self,
        op: str,
        *args: int,
        dtype: torch.dtype | None = None,
        weak: bool | None = None,
        value: Scalar | None = None,
        source: Source | None = None,
    ) -> int:
        """The position of this operation; dtype and weakness follow from the operands unless given."""
        if dtype is None:
            dtype, inferred = result_type(op, [self.nodes[arg] for arg in args])
            weak = inferred if weak is None else weak
        if value != value:
            value = math.nan  # one object: others are no keys
        node = Node(op, args, dtype, bool(weak), value)
        key = (node, repr(value) if isinstance(value, float) else "")  # 0.0 == -0.0, yet they divide differently
        position = self._positions.get(key)
        if position is None:
            position = self._positions[key] = len(self.nodes)
            self.nodes.append(node)
            self.sources.append(source)
        return position

    def const(self, value: Scalar) -> int:
        """The position of a Python number that is part of the structure."""
        return self.add("const", dtype=scalar_dtype(value), weak=True, value=value)

    def finish(self, root: int) -> Expr:
        """The part of what was built that `root` needs, in order."""
        return Expr(tuple(self.nodes), tuple(self.sources)).part(root)

    def append(self, expr: Expr, rename: Callable[[Node], Node] = lambda node: node) -> int:
        """Copy an expression in (its slots renamed) and return its root's position here."""
        places: list[int] = []
        for position, node in enumerate(expr.nodes):
            node = rename(node)
            args = (places[arg] for arg in node.args)
            places.append(
                self.add(
                    node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=expr.source(position)
                )
            )
        return places[-1]


def scalar_dtype(value: Scalar) -> torch.dtype:
    """The dtype a Python number has before it meets a tensor."""
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float64


def promote(x: Node, y: Node) -> tuple[torch.dtype, bool]:
    """Torch's promotion of two operands: (dtype, weak). A Python number changes a tensor's kind, never its width."""
    if x.weak == y.weak:
        return torch.promote_types(x.dtype, y.dtype), x.weak
    strong, weak = (y, x) if x.weak else (x, y)
    if weak.dtype == torch.float64 and not strong.dtype.is_floating_point:
        return torch.get_default_dtype(), False
    if weak.dtype == torch.int64 and strong.dtype == torch.bool:
        return torch.int64, False
    return strong.dtype, False


def operand_dtype(node: Node, args: list[Node]) -> torch.dtype:
    """The dtype a node's operands are converted to before it computes."""
    if node.op in COMPARISONS:
        return promote(args[0], args[1])[0]
    return node.dtype


def result_type(op: str, args: list[Node]) -> tuple[torch.dtype, bool]:
    """Dtype and weakness of an operation on these operands."""
    weak = all(arg.weak for arg in args)
    if op in COMPARISONS or op in CONNECTIVES:
        return torch.bool, weak
    if op == "select":
        return promote(args[1], args[2])
    dtype, weak = promote(args[0], args[-1])
    if op in ("truediv", "sqrt") and not dtype.is_floating_point:
        dtype = torch.float64 if weak else torch.get_default_dtype()
    if op in _OF_INTEGERS and dtype == torch.bool and weak:
        dtype = torch.int64  # Python's True is the int 1
    return dtype, weak
