"""An expression -> the comparisons of something of the row with something of the column that it is made of, if it is.

Most masks are: `q >= kv`, `doc[q] == doc[kv]`, `q - kv <= window`, `lts[kv] <= q`. Where what stands on the row's side
grows (or falls) with the row, a column turns visible or hidden only at the few rows where a comparison turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

from maskflash.expr.nodes import COMPARISONS, Builder, Expr, Node, operand_dtype

Side = Literal["neither", "rows", "columns", "both"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a comparison turns: between the rows with `rows` < `columns` and the others (<= and the others if `after`).

    Attributes:
        rows: an expression that doesn't read kv.
        columns: an expression that doesn't read q.
        after: the row that equals still belongs to the first kind.
    """

    rows: Expr
    columns: Expr
    after: bool


@dataclass(frozen=True, slots=True)
class Separated:
    """What an expression's truth depends on in a column, as the row moves.

    Attributes:
        thresholds: comparisons with the column.
        switches: what depends on the row alone; truth may turn wherever one changes.
        rearranged: terms were brought to other sides, which is the same only while nothing overflows.
    """

    thresholds: tuple[Threshold, ...]
    switches: tuple[Expr, ...]
    rearranged: bool


@lru_cache(maxsize=256)
def separate(expr: Expr) -> Separated | None:
    """Take an expression apart.

    Args:
        expr: the mask.

    Returns:
        What its truth depends on; None where rows and columns meet in anything but comparisons of integers, sums and
        distances.
    """
    parts = _Parts(expr, _sides(expr))
    if not parts.visit(len(expr.nodes) - 1):
        return None
    return Separated(tuple(dict.fromkeys(parts.thresholds)), tuple(dict.fromkeys(parts.switches)), parts.rearranged)


def _sides(expr: Expr) -> list[Side]:
    """What each node depends on."""
    sides: list[Side] = []
    for node in expr.nodes:
        if node.op in ("q", "kv"):
            sides.append("rows" if node.op == "q" else "columns")
            continue
        found = {sides[arg] for arg in node.args} - {"neither"}
        sides.append("both" if len(found) > 1 else found.pop() if found else "neither")
    return sides


@dataclass(slots=True)
class _Parts:
    expr: Expr
    sides: list[Side]
    thresholds: list[Threshold] = field(default_factory=list)
    switches: list[Expr] = field(default_factory=list)
    rearranged: bool = False

    def visit(self, root: int) -> bool:
        """Collect what the truth of a node depends on; False where it can't be taken apart."""
        stack, met = [root], set()
        while stack:
            position = stack.pop()
            if position in met:
                continue
            met.add(position)
            node = self.expr.nodes[position]
            if self.sides[position] == "rows":
                self.switches.append(_part(self.expr, position, node.dtype))
            elif self.sides[position] == "both":
                kinds = {self.expr.nodes[arg].dtype for arg in node.args}
                if node.dtype == torch.bool and kinds == {torch.bool}:
                    stack += node.args
                elif not (node.op in COMPARISONS and self._compare(node)):
                    return False
        return True

    def _compare(self, node: Node) -> bool:
        """The thresholds of a comparison; what is said of `<` and `==` holds of their opposites."""
        left, right = node.args
        dtype = operand_dtype(node, [self.expr.nodes[arg] for arg in node.args])
        if dtype.is_floating_point:  # NaN has no order
            return False
        if {self.sides[left], self.sides[right]} == {"rows", "columns"}:
            row, column = (left, right) if self.sides[left] == "rows" else (right, left)
            return self._turn(node.op, left == row, _part(self.expr, row, dtype), _part(self.expr, column, dtype))
        if dtype != torch.int64:
            return False
        self.rearranged = True
        for distance, limit in ((left, right), (right, left)):
            inner = self.expr.nodes[distance]
            if inner.op == "abs" and self.sides[limit] in ("neither", "columns"):
                terms = self._terms(inner.args[0], 1)
                if terms is None:
                    return False
                rows, columns = terms
                # |rows - columns| against limit: a turn on either side of columns.
                self._turn(node.op, left == distance, _sum(self.expr, rows), _sum(self.expr, [*columns, (1, limit)]))
                below = _sum(self.expr, [*columns, (-1, limit)])
                return self._turn(node.op, left != distance, _sum(self.expr, rows), below)
        terms, others = self._terms(left, 1), self._terms(right, -1)
        if terms is None or others is None:
            return False
        rows, columns = terms[0] + others[0], terms[1] + others[1]
        return self._turn(node.op, True, _sum(self.expr, rows), _sum(self.expr, columns))

    def _turn(self, op: str, rows_first: bool, rows: Expr, columns: Expr) -> bool:
        """Note where `rows op columns` (or `columns op rows`) turns."""
        after = {"lt": (False,), "ge": (False,), "le": (True,), "gt": (True,)}.get(op, (False, True))
        if not rows_first and len(after) == 1:
            after = (not after[0],)
        self.thresholds += [Threshold(rows, columns, each) for each in after]
        return True

    def _terms(self, position: int, sign: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]] | None:
        """A node as (terms of the row) - (terms of the column), each (sign, position); None where it is no such sum."""
        rows: list[tuple[int, int]] = []
        columns: list[tuple[int, int]] = []
        stack = [(position, sign)]
        while stack:
            position, sign = stack.pop()
            node = self.expr.nodes[position]
            if self.sides[position] == "rows":
                rows.append((sign, position))
            elif self.sides[position] != "both":
                columns.append((-sign, position))
            elif node.dtype != torch.int64 or len(rows) + len(columns) + len(stack) > _MOST_TERMS:
                return None
            elif node.op in ("add", "sub"):
                stack += [(node.args[0], sign), (node.args[1], sign if node.op == "add" else -sign)]
            elif node.op == "neg":
                stack.append((node.args[0], -sign))
            else:
                return None
        return rows, columns


_MOST_TERMS = 64  # of a sum; a shared sub-expression counts each time it is met


def _part(expr: Expr, position: int, dtype: torch.dtype) -> Expr:
    """A node of an expression, in a dtype, as an expression of its own."""
    builder = Builder()
    return builder.finish(_copy(builder, expr, position, dtype))


def _sum(expr: Expr, terms: list[tuple[int, int]]) -> Expr:
    """The sum of signed nodes of an expression."""
    builder = Builder()
    total = builder.add("const", dtype=torch.int64, weak=False, value=0)
    for sign, position in terms:
        term = _copy(builder, expr, position, torch.int64)
        total = builder.add("add" if sign > 0 else "sub", total, term, dtype=torch.int64, weak=False)
    return builder.finish(total)


def _copy(builder: Builder, expr: Expr, position: int, dtype: torch.dtype) -> int:
    place = builder.append(Expr(expr.nodes[: position + 1], expr.sources[: position + 1]))
    kept = builder.nodes[place].dtype == dtype
    return place if kept else builder.add("cast", place, dtype=dtype, weak=False)
