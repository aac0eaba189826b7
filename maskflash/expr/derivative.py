"""A score's expression -> the same with its derivatives: in the score, and in each real number that it looks up.

    value = cap * tanh(score / cap) + bias[h, q]        the nodes that were there
    d value / d score     = 1 - tanh(score / cap)**2    more nodes, which use those
    d value / d bias[...] = 1

Reverse accumulation over the straight-line program (Linnainmaa, 1976): each node hands its derivative on to its
operands, by the rule of its operation. What is decided by comparing has no derivative, and what is rounded has zero, as
in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

from maskflash.expr.nodes import Builder, Expr, operand_dtype
from maskflash.expr.ops import OPERATIONS

_TIES: Final = {
    op: (f"select {op} x y 1 select eq x y 0.5 0", f"select {op} y x 1 select eq x y 0.5 0") for op in ("lt", "gt")
}

DERIVATIVES: Final[dict[str, tuple[str, ...]]] = {
    "cast": ("1",),
    "add": ("1", "1"),
    "sub": ("1", "-1"),
    "mul": ("y", "x"),
    "truediv": ("truediv 1 y", "neg truediv r y"),
    "neg": ("-1",),
    "abs": ("select gt x 0 1 select lt x 0 -1 0",),
    "min": _TIES["lt"],
    "max": _TIES["gt"],
    "mod": ("1", "neg round truediv sub x r y"),
    "fmod": ("1", "neg round truediv sub x r y"),
    "sqrt": ("truediv 0.5 r",),
    "rsqrt": ("mul -0.5 mul r mul r r",),
    "exp": ("r",),
    "exp2": ("mul r 0.6931471805599453",),
    "expm1": ("add r 1",),
    "log": ("truediv 1 x",),
    "log2": ("truediv 1.4426950408889634 x",),
    "log1p": ("truediv 1 add x 1",),
    "tanh": ("sub 1 mul r r",),
    "sigmoid": ("mul r sub 1 r",),
    "erf": ("mul 1.1283791670955126 exp neg mul x x",),
    "sin": ("cos x",),
    "cos": ("neg sin x",),
    "tan": ("add 1 mul r r",),
    "atan": ("truediv 1 add 1 mul x x",),
    "pow": ("select eq y 0 0 mul y pow x sub y 1", "select eq x 0 0 mul r log x"),
}
"""For each operand the derivative of the result, in the words of `nodes.py`: x and y are the operands, r the result."""

ZERO: Final = frozenset(("floor", "ceil", "trunc", "round", "floordiv", "truncdiv"))
"""What has a derivative of zero wherever it has one."""


@dataclass(frozen=True, slots=True)
class Derivatives:
    """A score's program with its derivatives.

    Attributes:
        expr: all of their nodes; those of the value come first, at the positions that they have without derivatives.
        value: position of the value.
        slope: position of its derivative in the score; None where that is zero.
        lookups: for each real look-up that it depends on its position, and that of the derivative in what it reads.
    """

    expr: Expr
    value: int
    slope: int | None
    lookups: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def differentiate(expr: Expr) -> Derivatives:
    """The derivatives of a score's expression, whose value is a real number."""
    writer = _Differentiator(expr)
    nodes, value = expr.nodes, len(expr.nodes) - 1
    learned = _learned(expr)
    adjoints: dict[int, int] = {value: writer.number(1.0, value)}
    for position in range(value, -1, -1):
        adjoint, node = adjoints.get(position), nodes[position]
        if adjoint is None or node.op == "lookup":
            continue
        for place, arg in enumerate(node.args):
            if not learned[arg]:
                continue
            part = writer.handed_on(position, place, adjoint)
            if part is not None:
                known = adjoints.get(arg)
                adjoints[arg] = part if known is None else writer.add("add", known, part)
    slopes = [adjoints[n] for n, node in enumerate(nodes) if node.op == "score" and n in adjoints]
    lookups = tuple((n, adjoints[n]) for n, node in enumerate(nodes) if node.op == "lookup" and n in adjoints)
    whole = Expr(tuple(writer.nodes), tuple(writer.sources))
    return Derivatives(whole, value, slopes[0] if slopes else None, lookups)


def _learned(expr: Expr) -> list[bool]:
    """For each node whether it is a real number that depends on the score or on what is looked up."""
    learned: list[bool] = []
    for node in expr.nodes:
        depends = node.op in ("score", "lookup") or any([learned[arg] for arg in node.args])
        learned.append(depends and node.dtype.is_floating_point)
    return learned


class _Differentiator(Builder):
    """Appends derivatives to a program."""

    def __init__(self, expr: Expr) -> None:
        super().__init__()
        for position, node in enumerate(expr.nodes):
            place = self.add(
                node.op, *node.args, dtype=node.dtype, weak=node.weak, value=node.value, source=expr.source(position)
            )
            assert place == position, "an expression has no node twice"

    def number(self, value: float, like: int) -> int:
        """A number of the dtype of a node."""
        return self.add("const", dtype=self.nodes[like].dtype, weak=False, value=value)

    def handed_on(self, position: int, place: int, adjoint: int) -> int | None:
        """The derivative that a node hands on to one of its operands, in that one's dtype; None if it is zero."""
        node = self.nodes[position]
        arg = node.args[place]
        if node.op == "select":
            zero = self.number(0.0, adjoint)
            ways = (adjoint, zero) if place == 1 else (zero, adjoint)
            found = self.add("select", node.args[0], *ways, dtype=self.nodes[adjoint].dtype, weak=False)
            return self._cast(found, arg) if place else None
        if node.op in ZERO or node.op not in DERIVATIVES:
            return None
        self._names = {"r": position}
        dtype = operand_dtype(node, [self.nodes[n] for n in node.args])
        for name, operand in zip("xy", node.args, strict=False):
            self._names[name] = operand if node.op == "cast" else self._of_dtype(operand, dtype)
        self._like = position
        factor = self._built(iter(DERIVATIVES[node.op][place].split()))
        return self._cast(self._product(adjoint, factor), arg)

    def _built(self, words: Iterator[str]) -> int:
        word = next(words)
        if word in self._names:
            return self._names[word]
        if word in OPERATIONS:
            return self.add(word, *(self._built(words) for _ in range(OPERATIONS[word].arity or 0)))
        return self.number(float(word), self._like)

    def _product(self, x: int, y: int) -> int:
        for this, other in ((x, y), (y, x)):
            value = self.nodes[this].value if self.nodes[this].op == "const" else None
            if value == 1.0:
                return other
            if value == -1.0:
                return self.add("neg", other)
        return self.add("mul", x, y)

    def _cast(self, position: int, arg: int) -> int:
        return self._of_dtype(position, self.nodes[arg].dtype)

    def _of_dtype(self, position: int, dtype: torch.dtype) -> int:
        node = self.nodes[position]
        if node.dtype == dtype and not node.weak:
            return position
        if node.op == "const":
            return self.add("const", dtype=dtype, weak=False, value=node.value)
        return self.add("cast", position, dtype=dtype, weak=False)
