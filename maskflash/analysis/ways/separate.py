"""An expression -> the comparisons of something of the row with something of the column that it is made of, if it is.

Most masks are: `q >= kv`, `doc[q] == doc[kv]`, `q - kv <= window`, `lts[kv] <= q`. Where what stands on the row's side
grows (or falls) with the row, a column turns visible or hidden only at the few rows where a comparison turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal

import torch

from maskflash.expr.nodes import Builder, Expr, Node, operand_dtype
from maskflash.expr.ops import COMPARISONS, OPERATIONS

Hides = Literal["above", "below"]
_Side = Literal["neither", "rows", "columns", "both"]
_Terms = list[tuple[int, int]]  # signs and positions of what is summed
_MOST_TERMS: Final = 64  # of a sum; a shared sub-expression counts each time it is met


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a comparison turns: between the rows with `rows` < `columns` and the others (<= and the others if `after`).

    Attributes:
        rows: an expression that doesn't read kv.
        columns: an expression that doesn't read q.
        after: the row that equals still belongs to the first kind.
        hides: what the comparison alone hides, rows "above" the turn or "below" it; None where it isn't as simple.
    """

    rows: Expr
    columns: Expr
    after: bool
    hides: Hides | None


@dataclass(frozen=True, slots=True)
class Separated:
    """What an expression's truth depends on in a column, as the row moves.

    Attributes:
        thresholds: comparisons with the column.
        switches: what depends on the row alone; truth may turn wherever one changes.
        rearranged: terms were brought to other sides, which is the same only while nothing overflows.
        joined: the mask is its comparisons, switches and conditions joined by `and`.
        conditions: what depends on the column alone.
    """

    thresholds: tuple[Threshold, ...]
    switches: tuple[Expr, ...]
    rearranged: bool
    joined: bool
    conditions: tuple[Expr, ...]


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
    if parts.visit(len(expr.nodes) - 1) is not None:
        return None
    return Separated(
        tuple(dict.fromkeys(parts.thresholds)),
        tuple(dict.fromkeys(parts.switches)),
        parts.rearranged,
        parts.joined,
        tuple(dict.fromkeys(parts.conditions)),
    )


@lru_cache(maxsize=256)
def one_sided(expr: Expr) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """The largest parts of an expression that depend on the row alone, and those that depend on the column alone."""
    sides = _sides(expr)
    parts: dict[_Side, dict[Expr, None]] = {"rows": {}, "columns": {}}
    met, stack = set[int](), [len(expr.nodes) - 1]
    while stack:
        position = stack.pop()
        if position in met:
            continue
        met.add(position)
        if sides[position] == "both":
            stack += expr.nodes[position].args
        elif sides[position] != "neither":
            parts[sides[position]][expr.part(position)] = None
    return tuple(parts["rows"]), tuple(parts["columns"])


def obstacle(expr: Expr) -> int | None:
    """The position of the condition that keeps an expression from being taken apart; None where nothing does."""
    return _Parts(expr, _sides(expr)).visit(len(expr.nodes) - 1)


@dataclass(frozen=True, slots=True)
class Matching:
    """A part of an expression that is True only where values of the row equal values of the column.

    Attributes:
        position: its node.
        parts: the nodes of the equalities and of what else has to hold, of the row or of the column alone.
        rows: expressions that don't read kv; each is equal to
        columns: one of these, which don't read q.
        of_rows: the conditions of the row.
        of_columns: of the column.
    """

    position: int
    parts: tuple[int, ...]
    rows: tuple[Expr, ...]
    columns: tuple[Expr, ...]
    of_rows: tuple[Expr, ...]
    of_columns: tuple[Expr, ...]


@lru_cache(maxsize=256)
def matchings(expr: Expr) -> tuple[Matching, ...]:
    """The parts of an expression that match rows with columns: equalities, each with all that `and` joins to it.

    Terms may have been brought to other sides: of an equality that is the same also where sums wrap.
    """
    sides = _sides(expr)
    found: list[Matching] = []
    stack, met = [len(expr.nodes) - 1], set()
    while stack:
        position = stack.pop()
        if position in met or sides[position] != "both" or expr.nodes[position].dtype != torch.bool:
            continue
        met.add(position)
        equal: list[tuple[Expr, Expr]] = []
        own: dict[_Side, list[Expr]] = {"rows": [], "columns": [], "neither": []}
        places: list[int] = []
        for part in _conjuncts(expr, position):
            compared = _Parts(expr, sides)
            if sides[part] != "both":
                own[sides[part]].append(_part(expr, part, expr.nodes[part].dtype))
            elif expr.nodes[part].op == "eq" and compared.equality(part):
                equal.append((compared.thresholds[0].rows, compared.thresholds[0].columns))
            else:
                stack += expr.nodes[part].args
                continue
            places.append(part)
        if equal:
            rows, columns = zip(*equal, strict=True)
            of_rows, of_columns = (tuple(own[side]) for side in ("rows", "columns"))
            of_columns += tuple(own["neither"])
            found.append(Matching(position, tuple(places), rows, columns, of_rows, of_columns))
    return tuple(found)


def _conjuncts(expr: Expr, root: int) -> list[int]:
    """The operands of the truth values that `and` joins here; of anything else itself."""
    found: list[int] = []
    stack = [root]
    while stack:
        position = stack.pop()
        node = expr.nodes[position]
        if node.op in ("and", "bitand") and {expr.nodes[arg].dtype for arg in node.args} == {torch.bool}:
            stack += reversed(node.args)
        else:
            found.append(position)
    return list(dict.fromkeys(found))


def _sides(expr: Expr) -> list[_Side]:
    """What each node depends on."""
    sides: list[_Side] = []
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
    sides: list[_Side]
    thresholds: list[Threshold] = field(default_factory=list)
    switches: list[Expr] = field(default_factory=list)
    conditions: list[Expr] = field(default_factory=list)
    rearranged: bool = False
    joined: bool = True

    def visit(self, root: int) -> int | None:
        """Collect what the truth of a node depends on; the place of a condition that can't be taken apart."""
        stack: list[tuple[int, bool]] = [(root, False)]
        met: dict[int, bool] = {}
        while stack:
            position, negated = stack.pop()
            if position in met:
                self.joined &= met[position] == negated
                continue
            met[position] = negated
            node = self.expr.nodes[position]
            if self.sides[position] != "both":
                kind = self.switches if self.sides[position] == "rows" else self.conditions
                kind.append(_part(self.expr, position, node.dtype))
                self.joined &= not negated
            elif node.dtype == torch.bool and {self.expr.nodes[arg].dtype for arg in node.args} == {torch.bool}:
                turned = negated ^ (node.op in ("not", "bitnot"))
                stack += [(arg, turned) for arg in node.args]
                self.joined &= turned != negated or OPERATIONS[node.op].settled is negated
            elif not (node.op in COMPARISONS and self._compare(node, negated)):
                return position
        return None

    def equality(self, position: int) -> bool:
        """Whether a comparison is an equality of one value of the row with one of the column: its two thresholds."""
        return self._compare(self.expr.nodes[position], False) and len(self.thresholds) == 2

    def _compare(self, node: Node, negated: bool) -> bool:
        """The thresholds of a comparison, or of its opposite; False where there are none."""
        left, right = node.args
        compares = OPERATIONS[node.op].opposite if negated else node.op
        dtype = operand_dtype(node, [self.expr.nodes[arg] for arg in node.args])
        if dtype.is_floating_point:  # NaN has no order
            return False
        if self.sides[left] == "rows" and self.sides[right] == "columns":
            return self._turn(compares, _part(self.expr, left, dtype), _part(self.expr, right, dtype))
        if self.sides[left] == "columns" and self.sides[right] == "rows":
            return self._turn(
                OPERATIONS[compares].mirrored, _part(self.expr, right, dtype), _part(self.expr, left, dtype)
            )
        if dtype != torch.int64:
            return False
        self.rearranged = True
        for op, distance, limit in ((compares, left, right), (OPERATIONS[compares].mirrored, right, left)):
            inner = self.expr.nodes[distance]
            if inner.op == "abs" and self.sides[limit] in ("neither", "columns"):
                terms = self._terms(inner.args[0], 1)
                return terms is not None and self._compare_distance(op, *terms, limit)
        terms, others = self._terms(left, 1), self._terms(right, -1)
        if terms is None or others is None:
            return False
        rows, columns = terms[0] + others[0], terms[1] + others[1]
        if all(sign < 0 for sign, _ in rows):  # -q < -c is q > c
            rows, columns = ([(-sign, at) for sign, at in side] for side in (rows, columns))
            compares = OPERATIONS[compares].mirrored
        return self._turn(compares, _sum(self.expr, rows), _sum(self.expr, columns))

    def _compare_distance(self, op: str, rows: _Terms, columns: _Terms, limit: int) -> bool:
        """The turns of |rows - columns| against a limit, on either side of columns."""
        within = op in ("lt", "le")
        far, near = (_sum(self.expr, [*columns, (sign, limit)]) for sign in (1, -1))
        self._turn(op, _sum(self.expr, rows), far, simple=within)
        return self._turn(OPERATIONS[op].mirrored, _sum(self.expr, rows), near, simple=within)

    def _turn(self, op: str, rows: Expr, columns: Expr, *, simple: bool = True) -> bool:
        """Note where `rows op columns` turns."""
        simple = simple and op != "ne"
        if op in ("ge", "lt", "eq", "ne"):
            hides: Hides = "below" if op == "lt" else "above"
            self.thresholds.append(Threshold(rows, columns, False, hides if simple else None))
        if op in ("gt", "le", "eq", "ne"):
            hides = "above" if op == "gt" else "below"
            self.thresholds.append(Threshold(rows, columns, True, hides if simple else None))
        return True

    def _terms(self, position: int, sign: int) -> tuple[_Terms, _Terms] | None:
        """A node as (terms of the row) - (terms of the column), each (sign, position); None where it is no such sum."""
        rows: _Terms = []
        columns: _Terms = []
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


def _part(expr: Expr, position: int, dtype: torch.dtype) -> Expr:
    """A node of an expression, in a dtype, as an expression of its own."""
    builder = Builder()
    return builder.finish(_copy(builder, expr, position, dtype))


def _sum(expr: Expr, terms: _Terms) -> Expr:
    """The sum of signed nodes of an expression."""
    builder = Builder()
    total: int | None = None
    for sign, position in sorted(terms, key=lambda term: -term[0]):
        term = _copy(builder, expr, position, torch.int64)
        if total is None and sign > 0:
            total = term
            continue
        total = builder.add("const", dtype=torch.int64, weak=False, value=0) if total is None else total
        total = builder.add("add" if sign > 0 else "sub", total, term, dtype=torch.int64, weak=False)
    return builder.finish(builder.add("const", dtype=torch.int64, weak=False, value=0) if total is None else total)


def _copy(builder: Builder, expr: Expr, position: int, dtype: torch.dtype) -> int:
    place = builder.append(expr.part(position))
    kept = builder.nodes[place].dtype == dtype
    return place if kept else builder.add("cast", place, dtype=dtype, weak=False)
