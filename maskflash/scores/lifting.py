"""A score function that hides pairs -> a mask of the pairs that it leaves, and a score function for those.

    where(doc[q] == doc[kv], score + slope * (kv - q), -inf)

    mask    doc[q] == doc[kv]               whole tiles are skipped
    score   score + slope * (kv - q)        an additive score

A pair whose score is -inf gets no weight, as one that a mask hides. So -inf is followed through the program, from where
it is written to where it ends up, as long as the conditions on its way don't look at the score. It may be read from a
table too: such a table is looked up by the mask, if it has holes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash.expr.nodes import Builder, Expr, Node, parse
from maskflash.expr.ops import OPERATIONS
from maskflash.expr.simplify import simplify
from maskflash.functions.derived import Derived
from maskflash.functions.function import Function
from maskflash.ground import arguments
from maskflash.ground.identity import Watch, owner
from maskflash.masks.combination import Combination
from maskflash.masks.mask import Mask
from maskflash.trace.trace import Traced, compact

ALWAYS: Final = parse("const=True:bool~()")


class Split(NamedTuple):
    """A score's program in two; slots are those of the whole.

    Attributes:
        mask: where it is not -inf; None where that takes no look at the pair.
        rest: equal to the whole wherever the mask shows the pair.
    """

    mask: Expr | None
    rest: Expr


class Lifted(Derived, Mask):
    """The pairs that a score function leaves.

    Attributes:
        holes: whether its tables may hold -inf.
    """

    def __init__(self, score: Function, *, holes: bool = False) -> None:
        super().__init__(f"what {score.name} leaves", score)
        self.holes = holes

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The condition, out of the score function's trace."""
        traced = self.trace_of(mask_args)
        found = lift(traced.expr, holes=self.holes).mask
        if found is None:
            found = ALWAYS
        return compact(found, traced.params, traced.tables, traced.names, traced.specialised)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Lifted, holes=self.holes), (self.of,)


def left_of(mask: Mask, score: Function) -> Mask:
    """The pairs of a mask that a score function leaves."""
    return Combination("and", mask, Lifted(score))


def left_with_holes(mask: Mask, score: Function) -> Mask:
    """The same where tables may hold -inf."""
    return Combination("and", mask, Lifted(score, holes=True))


@lru_cache(maxsize=256)
def lift(expr: Expr, *, holes: bool = False) -> Split:
    """What of a score's program is a mask; with `holes`, -inf in tables too, which then stays in the rest."""
    lifter = _Lifter(expr, holes)
    hidden, rest = lifter.found()
    if hidden is None:
        return Split(None, expr)
    return Split(simplify(lifter.finish(lifter.add("not", hidden))), simplify(lifter.finish(rest)))


def has_holes(tables: Sequence[Tensor]) -> bool:
    """Whether a table holds -inf; those that are learned are not looked into, nor what a graph has no values of."""
    if torch.compiler.is_compiling():
        return False
    return any([table.is_floating_point() and not table.requires_grad and _is_hollow(table) for table in tables])


def _is_hollow(table: Tensor) -> bool:
    """Whether a table holds -inf: looked into once for each state of it."""
    if arguments.without_data(table):
        return False
    if table.is_inference():
        return bool(torch.isneginf(table).any())
    place = table.untyped_storage()._cdata, table.storage_offset(), table.shape, table.stride(), table.dtype
    known = _known.get(place)
    if known is None or known[0] != table._version or known[2].expired():
        known = _known[place] = table._version, bool(torch.isneginf(table).any()), Watch([owner(table)])
        while len(_known) > _MOST:
            _known.pop(next(iter(_known)), None)
    return known[1]


_known: dict[tuple[Any, ...], tuple[int, bool, Watch]] = {}
"""By the place of a table in memory: its version then, whether it held -inf, and what tells that it is gone."""
_MOST: Final = 256


def remainder(traced: Traced) -> Traced | None:
    """The trace of a score function without what of it is a mask; None where nothing is."""
    mask, rest = lift(traced.expr)
    if mask is None:
        return None
    return compact(rest, traced.params, traced.tables, traced.names, traced.specialised)


class _Lifter(Builder):
    """Follows -inf through a program.

    Attributes:
        whole: for each node, the node itself.
        rest: for each node, what it is where nothing is hidden.
        hidden: for each node, the truth of its being -inf; None where it never is as far as this can tell.
    """

    def __init__(self, expr: Expr, holes: bool) -> None:
        super().__init__()
        self._expr = expr
        self._holes = holes
        self.whole: list[int] = []
        self.rest: list[int] = []
        self.hidden: list[int | None] = []
        self._scored: list[bool] = []  # whether a node depends on the score, or is inexact

    def found(self) -> tuple[int | None, int]:
        """Where the whole is -inf, and what it is elsewhere."""
        for position, node in enumerate(self._expr.nodes):
            self.whole.append(self._copied(position, node, [self.whole[arg] for arg in node.args]))
            inexact = node.op == "score" or OPERATIONS[node.op].inexact
            self._scored.append(inexact or any([self._scored[arg] for arg in node.args]))
            hidden, rest = self._followed(position, node)
            self.hidden.append(hidden)
            self.rest.append(self.whole[-1] if hidden is None else rest)
        return self.hidden[-1], self.rest[-1]

    def _followed(self, position: int, node: Node) -> tuple[int | None, int]:
        """Where a node is -inf, and what it is elsewhere."""
        hidden = [self.hidden[arg] for arg in node.args]
        rest = [self.rest[arg] for arg in node.args]
        nowhere = None, self.whole[-1]
        if node.op == "const" and node.value == -math.inf:
            return self.const(True), self.whole[-1]
        if node.op == "lookup" and self._holes and node.dtype.is_floating_point:
            return self.add("eq", self.whole[-1], self.const(-math.inf)), self.whole[-1]
        if not any(place is not None for place in hidden):
            return nowhere
        match node.op:
            case "select":
                return self._chosen(node, hidden, rest)
            case "add" | "min":
                return self._either(hidden), self._copied(position, node, rest)
            case "sub" if hidden[1] is None:
                return hidden[0], self._copied(position, node, rest)
            case "cast" if node.dtype.is_floating_point:
                return hidden[0], self._copied(position, node, rest)
            case "mul" | "truediv" if hidden[1] is None and self._positive(node.args[1]):
                return hidden[0], self._copied(position, node, rest)
            case "mul" if hidden[0] is None and self._positive(node.args[0]):
                return hidden[1], self._copied(position, node, rest)
        return nowhere

    def _chosen(self, node: Node, hidden: list[int | None], rest: list[int]) -> tuple[int | None, int]:
        condition = node.args[0]
        if self._scored[condition]:
            return None, self.whole[-1]
        test, never = self.whole[condition], self.const(False)
        ways = [never if place is None else place for place in hidden[1:]]
        found = self.add("select", test, *ways, dtype=torch.bool, weak=False)
        always = [self.nodes[place].op == "const" and self.nodes[place].value is True for place in ways]
        if always[0] or always[1]:
            return found, rest[2] if always[0] else rest[1]
        return found, self.add("select", test, *rest[1:], dtype=node.dtype, weak=node.weak)

    def _either(self, hidden: list[int | None]) -> int:
        places = [place for place in hidden if place is not None]
        return places[0] if len(places) == 1 else self.add("or", *places)

    def _positive(self, arg: int) -> bool:
        node = self._expr.nodes[arg]
        return node.op == "const" and 0 < float(node.value or 0) < math.inf

    def _copied(self, position: int, node: Node, args: list[int]) -> int:
        source = self._expr.source(position)
        return self.add(node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=source)
