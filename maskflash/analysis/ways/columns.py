"""A problem whose mask separates -> every column cut into a few pieces of rows that are all visible or all hidden.

    row      column j of causal documents, whose document ends with row 8
    0 .. j   ·   hidden: q < j             one pair of each piece is evaluated:
    j .. 9   ■   visible                   (0, j) ·   (j, j) ■   (9, j) ·
    9 ..     ·   another document          a comparison that turns is a cut

The cost follows the number of columns, not of pairs or of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.problem import LARGEST_SUM, Problem
from maskflash.analysis.ways.separate import Hides, separate
from maskflash.expr.evaluate import compute
from maskflash.expr.nodes import Expr

PIECES_AT_ONCE: Final = 1 << 18  # cut together: a few intermediates of this size stay in the caches
_MOST_PIECES: Final = 32  # of a column: beyond it, tiles are cheaper
_TURNED: Final[dict[Hides | None, Hides | None]] = {"above": "below", "below": "above", None: None}
_MOST_SWITCHES: Final = 8  # rows at which what depends on the row alone changes


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """How to cut columns: `cut` does it for a part of them, so that callers bound the memory.

    Attributes:
        problem: what was asked.
        turns: comparisons with the column.
        always: (n,) rows at which any column may change.
        within: (B or 1, H or 1, 1) int64, the first row that some column may see and one past the last, where columns
            see one interval each; else None.
        conditions: what then else hides columns whole.
    """

    problem: Problem
    turns: tuple[Turn, ...]
    always: Tensor
    within: tuple[Tensor, Tensor] | None
    conditions: tuple[Expr, ...]

    @property
    def most(self) -> int:
        """Pieces of a column."""
        return 1 + len(self.turns) + len(self.always)

    def parts(self, width: int = 1) -> Iterator[tuple[slice, slice, slice]]:
        """Batch rows, heads and columns of at most about PIECES_AT_ONCE pieces, in order.

        Columns are cut at multiples of `width`, and only where there is one head; heads only where there is one batch
        row: so each part is a stretch of all columns.
        """
        batch, heads, length = *self.problem.shape[:2], self.problem.kv_len
        step = max(1, PIECES_AT_ONCE // (self.most * width)) * width
        head_step = max(1, step // length)
        sizes, steps = (batch, heads, length), (max(1, head_step // heads), head_step, step)
        for starts in product(*(range(0, size, step) for size, step in zip(sizes, steps, strict=True))):
            b, h, columns = (slice(a, min(a + n, size)) for a, n, size in zip(starts, steps, sizes, strict=True))
            yield b, h, columns

    def cut(self, b: slice, h: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Cut the columns of some batch rows and heads of the problem's shape.

        Returns:
            start: (pieces, b, h, columns) int64, ascending in the first dimension from 0; where two are equal, or one
                is q_len, the piece is empty.
            visible: bool of the same shape.
        """
        problem, of = self.problem, _Columns(self.problem, b, h, columns)
        at, shape = of.pairs, of.shape
        found = (turn.row(of)[0] for turn in self.turns)
        # A turn outside the rows, such as an end of S, cuts nothing.
        turns = [row.expand(shape) for row in found if int(row.max()) > 0 and int(row.min()) < problem.q_len]
        first = torch.zeros((), dtype=torch.int64, device=problem.device).expand(shape)
        start = _ascending([first, *turns, *(row.expand(shape) for row in self.always)])
        row = start.clamp(max=problem.q_len - 1)
        return start, problem.visible(at["b"], at["h"], row, at["kv"])

    def interval(self, b: slice, h: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """What the columns of some batch rows and heads see, from their turns alone.

        Returns:
            start, stop: (b, h, columns) int64, rows half open, empty where start is not below stop; None where columns
            may see more than one interval, or where something may be read out of range.
        """
        if self.within is None:
            return None
        of = _Columns(self.problem, b, h, columns)
        start, stop = (_part(edge, b, h).expand(of.shape).clone() for edge in self.within)
        for turn in self.turns:
            row, faults = turn.row(of)
            if _any(faults):
                return None
            if turn.hides == "above":
                torch.maximum(start, row, out=start)
            else:
                torch.minimum(stop, row, out=stop)
        for condition in self.conditions:
            shown, faults = of.values(condition)
            if _any(faults):
                return None
            stop.masked_fill_(~shown.to(torch.bool), 0)
        return start, stop


class _Columns:
    """What expressions that don't read q are at some columns of a problem, each found once."""

    def __init__(self, problem: Problem, b: slice, h: slice, columns: slice) -> None:
        self.problem, self.b, self.h = problem, b, h
        device, (batch, heads) = problem.device, problem.shape[:2]
        self.pairs = {
            "b": torch.arange(batch, device=device)[b, None, None],
            "h": torch.arange(heads, device=device)[h, None],
            "kv": torch.arange(columns.start, columns.stop, device=device),
        }
        self.shape = np.broadcast_shapes(*(x.shape for x in self.pairs.values()))
        self._values: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._runs: dict[str, tuple[Tensor, Tensor]] = {}

    def values(self, expr: Expr) -> tuple[Tensor, list[Tensor]]:
        """An expression's values and faults, which broadcast to (b, h, columns)."""
        if expr.text not in self._values:
            pairs = self.problem.indices(**self.pairs, q=self.pairs["b"].new_zeros(()))
            self._values[expr.text] = compute(expr, self.problem.inputs, pairs)
        return self._values[expr.text]

    def runs(self, expr: Expr) -> tuple[Tensor, Tensor]:
        """Its values as they follow one another, each once, and how often each does."""
        if expr.text not in self._runs:
            values = self.values(expr)[0].to(torch.int64)
            self._runs[expr.text] = torch.unique_consecutive(values, return_counts=True)
        return self._runs[expr.text]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Finds, for columns, the first row whose value has reached theirs.

    Attributes:
        values: (B or 1, H or 1, q_len) int64 of the rows, ascending; (n,) distinct ones where there is one unit.
        first: (n + 1,) where each of distinct values begins, and q_len; None of the others.
        step: whether they ascend by one from row to row.
        descending: whether the rows' values were; then these are their complements ~x, as the columns' are to be.
        columns: of the columns' values.
        after: the first row whose value is beyond theirs, instead.
        hides: what the comparison alone hides, rows "above" the turn or "below" it; None where it isn't as simple.
    """

    values: Tensor
    first: Tensor | None
    step: bool
    descending: bool
    columns: Expr
    after: bool
    hides: Hides | None

    def row(self, of: _Columns) -> tuple[Tensor, list[Tensor]]:
        """The row, between 0 and q_len, for each column, which broadcasts to (b, h, columns); and columns' faults."""
        wanted, faults = of.values(self.columns)
        if self.first is not None:  # documents are few: they are searched for each other in half the time of tokens
            distinct, counts = of.runs(self.columns)
            row = self.first[torch.searchsorted(self.values, self._turned(distinct), right=self.after)]
            return torch.from_numpy(np.repeat(row.numpy(), counts.numpy())).view(wanted.shape), faults
        wanted = self._turned(wanted.to(torch.int64))
        values = _part(self.values, of.b, of.h)
        if self.step:
            return (wanted - (values[..., :1] - int(self.after))).clamp_(0, of.problem.q_len), faults
        sizes = np.broadcast_shapes(wanted.shape[:-1], values.shape[:-1])
        wanted, values = wanted.expand(*sizes, -1).contiguous(), values.expand(*sizes, -1).contiguous()
        return torch.searchsorted(values, wanted, right=self.after), faults

    def _turned(self, values: Tensor) -> Tensor:
        """Values in the order of the rows'."""
        return ~values if self.descending else values


def find_pieces(problem: Problem) -> Pieces | None:
    """How to cut a problem's columns; None where its mask doesn't separate, or rows don't ascend or descend."""
    separated = separate(problem.expr)
    if separated is None or 0 in problem.shape:
        return None
    largest = problem.largest()
    if separated.rearranged:
        sides = (side for threshold in separated.thresholds for side in (threshold.rows, threshold.columns))
        if max(largest, *map(problem.largest, sides)) >= LARGEST_SUM:
            return None
    turns: dict[tuple[str, str, bool, Hides | None], Turn] = {}
    changes: list[Tensor] = []
    faulty = False
    known: dict[str, tuple[Tensor, Tensor | None, bool, bool] | None] = {}
    for threshold in separated.thresholds:
        text = threshold.rows.text
        if text not in known:
            values, faults = _of_rows(problem, threshold.rows)
            changes += map(_changes, faults)
            faulty |= _any(faults)
            counted = threshold.rows.nodes[-1].op == "q" and largest < LARGEST_SUM  # no need to look
            known[text] = (values, None, True, False) if counted else _searchable(values, largest)
        ascending = known[text]
        if ascending is None:
            return None
        values, first, step, descending = ascending
        after, hides = threshold.after, threshold.hides
        if descending:
            after, hides = not after, _TURNED[hides]
        key = text, threshold.columns.text, threshold.after, hides
        turns[key] = Turn(values, first, step, descending, threshold.columns, after, hides)
    shown: Tensor | None = None
    for switch in separated.switches:
        values, faults = _of_rows(problem, switch)
        changes += map(_changes, (values, *faults))
        faulty |= _any(faults)
        values = values.to(torch.bool).expand(*values.shape[:2], problem.q_len)
        shown = values if shown is None else shown & values
    always = torch.cat(changes).unique() if changes else torch.zeros(0, dtype=torch.int64, device=problem.device)
    single = separated.joined and not faulty and all(turn.hides for turn in turns.values())
    within = _only_interval(shown, problem) if single else None
    pieces = Pieces(problem, tuple(turns.values()), always, within, separated.conditions)
    return pieces if len(always) <= _MOST_SWITCHES and pieces.most <= _MOST_PIECES else None


def _only_interval(shown: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor] | None:
    """The first and one past the last of the rows shown, (B, H, n) bool or all -> (B, H, 1); None where apart."""
    if shown is None:
        every = torch.tensor([0, problem.q_len], device=problem.device)[:, None, None, None]
        return every[0], every[1]
    count, length = shown.sum(-1, keepdim=True), shown.shape[-1]
    start = shown.to(torch.int8).argmax(-1, keepdim=True)
    stop = length - shown.flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    stop = torch.where(count > 0, stop, start)
    return (start, stop) if torch.equal(stop - start, count) else None


def _any(faults: list[Tensor]) -> bool:
    return any(bool(fault.any()) for fault in faults)


def _part(values: Tensor, b: slice, h: slice) -> Tensor:
    """Of (B or 1, H or 1, n) some batch rows and heads."""
    return values[b if len(values) > 1 else slice(None), h if values.shape[1] > 1 else slice(None)]


def _of_rows(problem: Problem, expr: Expr) -> tuple[Tensor, list[Tensor]]:
    """An expression's values and faults at every row, each (B or 1, H or 1, q_len or 1)."""
    values, faults = compute(expr, problem.inputs, problem.along(0))
    values, *faults = (x[(None,) * (3 - x.ndim)] for x in (values, *faults))
    return values, faults


def _searchable(values: Tensor, largest: float) -> tuple[Tensor, Tensor | None, bool, bool] | None:
    """Values of rows as Turn has them, with `first`, `step` and `descending`; None where they go up and down."""
    ascending = _ascend(values)
    if ascending is None:
        return None
    values, step, descending = ascending
    step &= largest < LARGEST_SUM  # else a difference may overflow
    if step or values.shape[:2] != (1, 1):
        return values, None, step, descending
    distinct, count = torch.unique_consecutive(values, return_counts=True)
    return distinct, pad(count.cumsum(0), (1, 0)), False, descending


def _ascend(values: Tensor) -> tuple[Tensor, bool, bool] | None:
    """Values of rows in ascending order, whether by steps of one, and whether they descended: then complemented.

    A complement turns the order as a negation would, and has no overflow.
    """
    values = values.to(torch.int64)
    before, after = values[..., :-1], values[..., 1:]  # compared, not subtracted: far apart, that overflows
    descending = not bool((before <= after).all())
    if descending:
        if not bool((before >= after).all()):
            return None
        values = ~values
    far = bool((values[..., -1] - values[..., 0] == values.shape[-1] - 1).all())
    return values, far and bool((values.diff(dim=-1) == 1).all()), descending


def _changes(values: Tensor) -> Tensor:
    """Rows whose value differs from that of the row before, in any batch row or head."""
    changed = (values[..., 1:] != values[..., :-1]).flatten(0, -2).any(0)
    return changed.nonzero()[:, 0] + 1


def _ascending(rows: list[Tensor]) -> Tensor:
    """Tensors of one shape, the first of them lowest, stacked and sorted by element: an insertion network."""
    stack = torch.stack(rows)
    low = torch.empty_like(stack[0])
    for top in range(2, len(rows)):
        for place in range(top, 1, -1):
            torch.minimum(stack[place - 1], stack[place], out=low)
            torch.maximum(stack[place - 1], stack[place], out=stack[place])
            stack[place - 1].copy_(low)
    return stack
