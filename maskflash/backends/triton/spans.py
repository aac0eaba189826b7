"""A mask -> its statements for few rows, and between which columns these may see anything, found before the loop.

    q >= kv and                row 6    # . . . # # # .     columns [q - 2, q + 1) and [0, 1):
    (q - kv <= 2 or kv < 1)    row 7    # . . . . # # #     what is between is not walked

    columns    0   1   2   3   4   5   6   7            in tiles of two columns, of both rows:
    tiles      walked  -       walked  walked           spans [0, 1) and [2, 4), which share no tile

Comparisons of kv, or of a sum with it, with something of the row say where a row's columns begin or end; `and`, `or`
and `select` join them. Everything else may see all. So spans hold all that is seen, and more; which of their pairs are
visible, the mask says. Sums are rearranged only where no number in them is so far from 0 that one of them may wrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from maskflash.backends.triton.emit import Emitted, Writer
from maskflash.backends.triton.signature import TableKind
from maskflash.expr.nodes import Expr, operand_dtype

MOST: Final = 3  # spans; more are joined to one
_TERMS: Final = 8  # of a comparison's sums, at most
_FAR: Final = str(1 << 60)  # columns, and sums of near numbers, are nearer
_NEAR: Final = str(1 << 55)  # a number of a sum that may be rearranged
_SHARES: Final = ((0, 1), (1, 2), (0, 1))  # what to compare, so that three are in order
_TRUTHS: Final = {"bitand": "and", "mul": "and", "min": "and", "bitor": "or", "add": "or", "max": "or"}
_MIRRORED: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq"}


class Span(NamedTuple):
    """Columns [low, stop) of each row, as texts of 64-bit integers; None for no end."""

    low: str | None
    stop: str | None


class _Sum(NamedTuple):
    """kv, as often as said, and numbers of the row with their signs."""

    kv: int
    terms: tuple[tuple[str, str], ...]


ALL: Final = Span(None, None)


@dataclass(frozen=True, slots=True)
class Walked(Emitted):
    """Triton text of a mask, and of the tiles that its rows walk.

    Attributes:
        walk: statements that leave in `total` how many tiles there are. They find in `within` which rows there are, in
            `kv_first` the first column's number, and in `kv_len` how many columns there are.
        at: the expression of the `step`-th of these tiles.
    """

    walk: list[str]
    at: str


def emit_few(
    expr: Expr, tables: Sequence[TableKind], *, narrow: bool, negative_kv: bool = False, remarks: bool = False
) -> Walked:
    """Write a mask in Triton for tiles whose rows are of several heads: see `emit`."""
    writer = Writer(expr, tables, narrow, False, negative_kv, remarks)
    writer.alone = {**writer.alone, "h": "rows"}
    for position in range(len(expr.nodes)):
        writer.write(position)
    visible = writer.value(len(expr.nodes) - 1, torch.bool, "pairs")
    return Walked(writer.lines, visible, *_walk(writer))


def _walk(writer: Writer) -> tuple[list[str], str]:
    finder = _SpansOf(writer)
    spans = finder.spans(len(writer.expr.nodes) - 1)
    lines = (
        [*finder.lines, "shift = kv_first.to(tl.int64)", f"near = (shift < {_NEAR}) & (shift > -{_NEAR})"]
        if spans
        else []
    )
    for n, span in enumerate(spans):
        low = f"tl.where(within, {span.low or f'-{_FAR}'}, {_FAR})"
        stop = f"tl.where(within, {span.stop or _FAR}, -{_FAR})"
        lines += [
            f"low = {low}",
            f"stop = {stop}",
            f"low{n} = tl.min(tl.where(low < stop, low, {_FAR}), 0)",
            f"stop{n} = tl.max(tl.where(low < stop, stop, -{_FAR}), 0)",
            f"low{n} = tl.where(near, tl.minimum(tl.maximum(low{n} - shift, 0), kv_len), 0).to(tl.int32)",
            f"stop{n} = tl.where(near, tl.minimum(tl.maximum(stop{n} - shift, 0), kv_len), kv_len).to(tl.int32)",
            f"some = low{n} < stop{n}",
            f"low{n}, stop{n} = tl.where(some, low{n} // BLOCK_N, 0), tl.where(some, tl.cdiv(stop{n}, BLOCK_N), 0)",
        ]
    for i, j in [pair for pair in _SHARES if pair[1] < len(spans)]:
        lines += [
            f"later = low{i} > low{j}",
            f"low{i}, low{j} = tl.where(later, low{j}, low{i}), tl.where(later, low{i}, low{j})",
            f"stop{i}, stop{j} = tl.where(later, stop{j}, stop{i}), tl.where(later, stop{i}, stop{j})",
        ]
    at, total = "low0 + step", "stop0 - low0"
    for n in range(1, len(spans)):
        lines += [
            f"low{n} = tl.maximum(low{n}, stop{n - 1})",
            f"stop{n} = tl.maximum(stop{n}, low{n})",
            f"before{n} = {total}",
        ]
        at = f"tl.where(step < before{n}, {at}, low{n} + step - before{n})"
        total = f"before{n} + stop{n} - low{n}"
    return [*lines, f"total = {total}"] if spans else ["total = 0"], at if spans else "step"


class _SpansOf:
    """Finds the spans of nodes, of which it says nothing twice."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.nodes = writer.expr.nodes
        self.lines: list[str] = []
        self.of_keys: list[bool] = []  # whether a node reads kv
        for node in self.nodes:
            self.of_keys.append(node.op == "kv" or any(self.of_keys[arg] for arg in node.args))

    def spans(self, position: int) -> list[Span]:
        """Where a truth may hold; none where it never does."""
        node = self.nodes[position]
        if not self.of_keys[position]:
            if node.op == "const":
                return [ALL] if node.value else []
            truth = self.writer.value(position, torch.bool, "rows")
            return [Span(f"tl.where({truth}, -{_FAR}, {_FAR})", None)]
        op = _TRUTHS.get(node.op, node.op) if node.dtype == torch.bool else ""
        if op == "and":
            return _meet(*map(self.spans, node.args))
        if op == "or":
            return _joined([span for arg in node.args for span in self.spans(arg)])
        if op == "select":
            chosen, first, second = map(self.spans, node.args)
            return _joined([*_meet(chosen, first), *second])
        if op in _MIRRORED and operand_dtype(node, [self.nodes[arg] for arg in node.args]) == torch.int64:
            return self._compared(op, *node.args)
        return [ALL]

    def _compared(self, op: str, left: int, right: int) -> list[Span]:
        if self.nodes[right].op == "abs":
            op, left, right = _MIRRORED[op], right, left
        if self.nodes[left].op == "abs" and op in ("lt", "le") and not self.of_keys[right]:
            inner, limit = self._sum(self.nodes[left].args[0]), self._sum(right)
            if inner is None or limit is None:
                return [ALL]
            below = self._isolated(op, inner, limit)
            return _meet(below, self._isolated(_MIRRORED[op], inner, _negative(limit)))
        sums = self._sum(left), self._sum(right)
        return [ALL] if sums[0] is None or sums[1] is None else self._isolated(op, sums[0], sums[1])

    def _sum(self, position: int) -> _Sum | None:
        """A node as a sum; None where kv is in it otherwise."""
        node = self.nodes[position]
        if node.op == "kv":
            return _Sum(1, ())
        if not self.of_keys[position]:
            return _Sum(0, (("+", f"{self.writer.value(position, torch.int64, 'rows', typed=True)}.to(tl.int64)"),))
        if node.op not in ("add", "sub", "neg") or node.dtype != torch.int64:
            return None
        sums = [self._sum(arg) for arg in node.args]
        if any(found is None for found in sums):
            return None
        first, *others = [found for found in sums if found is not None]
        if node.op == "neg":
            return _negative(first)
        return _plus(first, others[0] if node.op == "add" else _negative(others[0]))

    def _isolated(self, op: str, left: _Sum, right: _Sum) -> list[Span]:
        """Where `left op right` may hold."""
        found = _plus(left, _negative(right))  # op 0
        if abs(found.kv) != 1 or len(found.terms) > _TERMS:
            return [ALL]
        if found.kv == 1:
            found = _negative(found)
        else:
            op = _MIRRORED[op]
        bound = f"bound{len(self.lines)}"  # kv op bound
        terms = "".join(f" {sign} {text}" for sign, text in found.terms).removeprefix(" + ") or "0"
        low, stop = f"{bound} + 1" if op == "gt" else bound, bound if op == "lt" else f"{bound} + 1"
        self.lines.append(f"{bound} = {terms}")
        if not self.writer.narrow and found.terms:
            near = " & ".join(f"({text} < {_NEAR}) & ({text} > -{_NEAR})" for _, text in found.terms)
            self.lines.append(f"{bound}_known = {near}")
            low, stop = f"tl.where({bound}_known, {low}, -{_FAR})", f"tl.where({bound}_known, {stop}, {_FAR})"
        return [Span(low if op in ("ge", "gt", "eq") else None, stop if op in ("le", "lt", "eq") else None)]


def _plus(x: _Sum, y: _Sum) -> _Sum:
    return _Sum(x.kv + y.kv, x.terms + y.terms)


def _negative(x: _Sum) -> _Sum:
    return _Sum(-x.kv, tuple(("-" if sign == "+" else "+", text) for sign, text in x.terms))


def _meet(one: list[Span], other: list[Span]) -> list[Span]:
    """Where both may hold."""
    if len(one) * len(other) > MOST:
        one, other = (([_hull(spans)] if len(spans) > 1 else spans) for spans in (one, other))
    return [
        Span(_either("tl.maximum", x.low, y.low), _either("tl.minimum", x.stop, y.stop)) for x in one for y in other
    ]


def _joined(spans: list[Span]) -> list[Span]:
    """Where one of them holds."""
    found = list(dict.fromkeys(spans))
    if ALL in found:
        return [ALL]
    return [_hull(found)] if len(found) > MOST else found


def _hull(spans: list[Span]) -> Span:
    """The first to the last column of any, also of those that a row has none of."""
    low, stop = spans[0]
    for span in spans[1:]:
        low = None if low is None or span.low is None else f"tl.minimum({low}, {span.low})"
        stop = None if stop is None or span.stop is None else f"tl.maximum({stop}, {span.stop})"
    return Span(low, stop)


def _either(pick: str, x: str | None, y: str | None) -> str | None:
    if x is None or y is None:
        return y if x is None else x
    return x if x == y else f"{pick}({x}, {y})"
