"""A score's expression -> its class, by which backends choose how to compute it.

    folded      factor * score          the factor belongs to rows or to columns alone: it goes into q, or into k
    additive    factor * score + bias   likewise, and a bias of the pair
    general     anything else           cap * tanh(score / cap)

The class is found by carrying `factor` and `bias` through the program, node by node, as long as it is linear in the
score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import torch

from maskflash.expr.nodes import Builder, Expr, Node

Kind = Literal["folded", "additive", "general"]

_OF_ROWS: Final = frozenset(("b", "h", "q"))
_OF_COLUMNS: Final = frozenset(("b", "h", "kv"))


@dataclass(frozen=True, slots=True)
class Form:
    """A score's class, and its parts; slots are those of the score itself.

    Attributes:
        kind: the class.
        factor: what the score is multiplied by, an expression of b, h and q alone, or of b, h and kv alone; None for 1,
            and in the general class.
        bias: what is added, an expression of the pair; None for 0, and in the general class.
        obstacle: in the general class, the position of the first node that isn't linear in the score; None where the
            factor depends on rows and columns.
    """

    kind: Kind
    factor: Expr | None = None
    bias: Expr | None = None
    obstacle: int | None = None

    @property
    def of_columns(self) -> bool:
        """Whether the factor belongs to columns, so that it goes into k."""
        return self.factor is not None and "kv" in self.factor.reads


class _Linear(NamedTuple):
    """factor * score + bias, by positions; None stands for 1 and for 0."""

    factor: int | None
    bias: int | None


@lru_cache(maxsize=256)
def form_of(expr: Expr) -> Form:
    """The class of a score's expression."""
    parts = _LinearParts(expr)
    found = parts.linear()
    if found is None:
        return Form("general", obstacle=parts.reached)
    builder, (factor, bias) = found
    of_factor = None if factor is None else builder.finish(factor)
    if of_factor is not None and not (of_factor.reads <= _OF_ROWS or of_factor.reads <= _OF_COLUMNS):
        return Form("general")
    of_bias = None if bias is None else builder.finish(bias)
    return Form("folded" if of_bias is None else "additive", of_factor, of_bias)


class _LinearParts(Builder):
    """Rewrites a program as factor * score + bias."""

    def __init__(self, expr: Expr) -> None:
        super().__init__()
        self._expr = expr
        self._places: list[int] = []  # of nodes without the score; -1 for others
        self._linear: list[_Linear | None] = []  # of nodes with it; None for others

    @property
    def reached(self) -> int:
        """How many nodes have been rewritten: where they stop being linear."""
        return len(self._linear)

    def linear(self) -> tuple[Builder, _Linear] | None:
        """The whole, and what its positions are in; None if it isn't linear in the score."""
        for position, node in enumerate(self._expr.nodes):
            parts = [self._linear[arg] for arg in node.args]
            if node.op == "score" or any(parts):
                found = self._of(node, parts)
                if found is None:
                    return None
                self._places.append(-1)
                self._linear.append(found)
                continue
            args = (self._places[arg] for arg in node.args)
            source = self._expr.source(position)
            self._places.append(
                self.add(node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=source)
            )
            self._linear.append(None)
        last = self._linear[-1]
        if last is None:  # the score is not looked at
            zero = self.add("const", dtype=self._expr.nodes[-1].dtype, weak=False, value=0.0)
            return self, _Linear(zero, self._places[-1])
        return self, last

    def _of(self, node: Node, parts: list[_Linear | None]) -> _Linear | None:
        places = [self._places[arg] for arg in node.args]
        match node.op, parts:
            case "score", _:
                return _Linear(None, None)
            case "cast", [_Linear() as x] if node.dtype.is_floating_point and node.dtype.itemsize >= 4:
                return x
            case "neg", [_Linear() as x]:
                return _Linear(self._minus(x.factor, node), None if x.bias is None else self.add("neg", x.bias))
            case (("add" | "sub"), [x, y]):
                return self._sum(node, places, x, y)
            case "mul", [_Linear() as x, None]:
                return self._scaled(node, "mul", x, places[1])
            case "mul", [None, _Linear() as y]:
                return self._scaled(node, "mul", y, places[0])
            case "truediv", [_Linear() as x, None]:
                return self._scaled(node, "truediv", x, places[1])
            case "select", [None, x, y]:
                return self._chosen(node, places, x, y)
        return None

    def _scaled(self, node: Node, op: str, x: _Linear, y: int) -> _Linear:
        y = self._wide(y, node)
        factor = self.add(op, self._number(1.0, node) if x.factor is None else self._wide(x.factor, node), y)
        return _Linear(factor, None if x.bias is None else self.add(op, self._wide(x.bias, node), y))

    def _sum(self, node: Node, places: list[int], x: _Linear | None, y: _Linear | None) -> _Linear:
        minus = node.op == "sub"
        bias_x = places[0] if x is None else x.bias
        bias_y = places[1] if y is None else y.bias
        if bias_x is None:
            bias = self.add("neg", bias_y) if minus and bias_y is not None else bias_y
        else:
            bias = bias_x
            if bias_y is not None:
                bias = self.add(node.op, self._wide(bias_x, node), self._wide(bias_y, node))
        if x is None or y is None:
            only = y if x is None else x
            assert only is not None, "one of the two has the score in it"
            return _Linear(self._minus(only.factor, node) if minus and x is None else only.factor, bias)
        one = self._number(1.0, node)
        factors = (one if part.factor is None else part.factor for part in (x, y))
        return _Linear(self.add(node.op, *factors), bias)

    def _chosen(self, node: Node, places: list[int], x: _Linear | None, y: _Linear | None) -> _Linear:
        one, zero = self._number(1.0, node), self._number(0.0, node)
        factors, biases = [], []
        for place, part in zip(places[1:], (x, y), strict=True):
            factors.append(zero if part is None else one if part.factor is None else part.factor)
            biases.append(place if part is None else zero if part.bias is None else part.bias)
        factor = None if factors == [one, one] else self.add("select", places[0], *factors)
        bias = None if biases == [zero, zero] else self.add("select", places[0], *biases)
        return _Linear(factor, bias)

    def _minus(self, factor: int | None, node: Node) -> int:
        return self._number(-1.0, node) if factor is None else self.add("neg", factor)

    def _wide(self, place: int, node: Node) -> int:
        """An operand in the dtype of the node that it had its part in: on its own it may be of a narrower one."""
        dtype = self.nodes[place].dtype
        if not dtype.is_floating_point or dtype.itemsize >= node.dtype.itemsize:
            return place
        return self.add("cast", place, dtype=node.dtype, weak=False)

    def _number(self, value: float, node: Node) -> int:
        dtype = node.dtype if node.dtype.is_floating_point else torch.float32
        return self.add("const", dtype=dtype, weak=False, value=value)
