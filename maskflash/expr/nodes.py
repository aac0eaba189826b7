"""Immutable expression nodes in evaluation order, and the canonical text that stands for them.

The grammar (every operand precedes its user, the last node is the mask, or what a score becomes):

    expr    = node*
    node    = b | h | q | kv                          int64 indices of the pair
            | score                                   the pair's scaled product of q and k, in score functions alone
            | const value                             part of the structure (divisors, moduli, shifts, bit masks)
            | param slot                              a number given at run time (windows, offsets, lengths, radii)
            | lookup slot (index*)                    an element of a run-time table; no index for a 0-dim tensor
            | cast x | neg x | abs x | not x | bitnot x | floor x | ceil x | trunc x | round x | sqrt x
            | add x y | sub | mul | truediv | floordiv | mod | truncdiv | fmod | min | max
            | shl x y | shr | bitand | bitor | bitxor
            | exp x | exp2 | expm1 | log | log2 | log1p | tanh | sigmoid | erf | rsqrt | sin | cos | tan | atan
            | pow x y
            | eq x y | ne | lt | le | gt | ge
            | and x y | or x y | select c x y         guarded: y (or a branch) matters only where x (or c) lets it

Every node has a torch dtype. `weak` marks Python numbers, which yield to a tensor's dtype under torch's promotion
rules; lengths, windows, table contents and offsets are never part of the text, so a kernel made from it serves all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from maskflash.expr.ops import COMPARISONS, INDEX_VARIABLES, OPERATIONS

Scalar = int | float | bool
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

    @property
    def slot(self) -> int:
        """Of a param or a look-up: which run-time value it is."""
        return int(self.value or 0)

    def number(self, params: Sequence[Any]) -> Any:
        """The value of a const, or of a param among these."""
        return params[self.slot] if self.op == "param" else self.value

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("~" if self.weak else "")
        value = "" if self.value is None else f"={self.value!r}"
        return f"{self.op}{value}:{kind}({','.join(map(str, self.args))})"


@dataclass(frozen=True, eq=False)
class Expr:
    """A mask as a straight-line program. Equal structure means equal expressions; source lines don't count."""

    nodes: tuple[Node, ...]
    sources: tuple[Source | None, ...] = field(repr=False, default=())

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Expr) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    @cached_property
    def text(self) -> str:
        """Canonical text: the key of kernels, and what pickles and crosses the op's boundary. Node per `;`."""
        return ";".join(map(str, self.nodes))

    @cached_property
    def reads(self) -> frozenset[str]:
        """The index variables the mask looks at, of b, h, q, kv."""
        return frozenset(node.op for node in self.nodes if node.op in INDEX_VARIABLES)

    @property
    def is_score(self) -> bool:
        """Whether it is the score as it is."""
        return self.nodes[-1].op == "score"

    @cached_property
    def real_params(self) -> frozenset[int]:
        """The slots of params that are floating-point numbers."""
        params = (node for node in self.nodes if node.op == "param" and node.dtype.is_floating_point)
        return frozenset(node.slot for node in params)

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

    @cached_property
    def summed(self) -> frozenset[int]:
        """Floating-point nodes whose value goes, perhaps through others that pass it on, into a sum or a difference."""
        found: set[int] = set()
        for position in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[position]
            passes = position in found and node.op in ("neg", "abs", "cast", "select", "min", "max")
            if node.dtype.is_floating_point and (node.op in ("add", "sub") or passes):
                found.update(node.args)
        return frozenset(found)

    def slots(self, op: str) -> int:
        """How many run-time values of this kind ("param" or "lookup") the expression numbers."""
        return 1 + max((node.slot for node in self.nodes if node.op == op), default=-1)

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
        self._positions: dict[tuple[Any, ...], int] = {}

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
        weak = bool(weak)
        key = (op, args, dtype, weak, repr(value) if isinstance(value, float) else value)  # 0.0 == -0.0, but in text
        position = self._positions.get(key)
        if position is None:
            position = self._positions[key] = len(self.nodes)
            self.nodes.append(Node(op, args, dtype, weak, value))
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
    operation = OPERATIONS[op]
    if operation.gives == "truth":
        return torch.bool, all(arg.weak for arg in args)
    if op == "select":
        return promote(args[1], args[2])
    dtype, weak = promote(args[0], args[-1])
    if operation.gives == "real" and not dtype.is_floating_point:
        dtype = torch.float64 if weak else torch.get_default_dtype()
    if operation.counts and dtype == torch.bool and weak:
        dtype = torch.int64  # Python's True is the int 1
    return dtype, weak
