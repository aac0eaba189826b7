"""A problem whose mask separates -> every column cut into a few pieces of rows that are all visible or all hidden.

The cost follows the number of columns, not of pairs or of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.blocks.problem import LARGEST_SUM, Problem
from maskflash.expr.evaluate import compute
from maskflash.expr.nodes import Expr
from maskflash.expr.separate import separate

_MOST_PIECES: Final = 32  # of a column: beyond it, tiles are cheaper
_MOST_SWITCHES: Final = 8  # rows at which what depends on the row alone changes


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """How to cut columns: `cut` does it for a part of them, so that callers bound the memory.

    Attributes:
        problem: what was asked.
        largest: a cap on the mask's 64-bit integers, before any wrapping.
        turns: comparisons with the column.
        always: (n,) rows at which any column may change.
    """

    problem: Problem
    largest: float
    turns: tuple[Turn, ...]
    always: Tensor

    @property
    def most(self) -> int:
        """Pieces of a column."""
        return 1 + len(self.turns) + len(self.always)

    def cut(self, b: slice, h: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Cut the columns of some batch rows and heads of the problem's shape.

        Returns:
            start: (pieces, b, h, columns) int64, ascending in the first dimension from 0; where two are equal, or one
                is q_len, the piece is empty.
            visible: bool of the same shape.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
        """
        problem, device = self.problem, self.problem.device
        batch, heads = problem.shape[:2]
        at = {
            "b": torch.arange(batch, device=device)[b, None, None],
            "h": torch.arange(heads, device=device)[h, None],
            "kv": torch.arange(columns.start, columns.stop, device=device),
        }
        shape = torch.broadcast_shapes(*(x.shape for x in at.values()))
        found = (turn.row(problem, at, b, h) for turn in self.turns)
        # A turn outside the rows, such as an end of S, cuts nothing.
        turns = [row.expand(shape) for row in found if int(row.max()) > 0 and int(row.min()) < problem.q_len]
        first = torch.zeros((), dtype=torch.int64, device=device).expand(shape)
        start = _ascending([first, *turns, *(row.expand(shape) for row in self.always)])
        row = start.clamp(max=problem.q_len - 1)
        return start, problem.visible(at["b"], at["h"], row, at["kv"])


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Finds, for columns, the first row whose value has reached theirs.

    Attributes:
        values: (B or 1, H or 1, q_len) int64 of the rows, ascending.
        step: whether they ascend by one from row to row.
        sign: of the columns' values, -1 where the rows' were descending.
        columns: of the columns' values.
        after: the first row whose value is beyond theirs, instead.
    """

    values: Tensor
    step: bool
    sign: int
    columns: Expr
    after: bool

    def row(self, problem: Problem, at: dict[str, Tensor], b: slice, h: slice) -> Tensor:
        """The row, between 0 and q_len, for each column; broadcasts to (b, h, columns)."""
        nowhere = torch.zeros((), dtype=torch.int64, device=problem.device)
        wanted = compute(self.columns, problem.inputs, {**at, "q": nowhere})[0].to(torch.int64) * self.sign
        values = self.values[b if len(self.values) > 1 else slice(None), h if self.values.shape[1] > 1 else slice(None)]
        if self.step:
            return (wanted - values[..., :1] + self.after).clamp(0, problem.q_len)
        sizes = torch.broadcast_shapes(wanted.shape[:-1], values.shape[:-1])
        wanted, values = wanted.expand(*sizes, -1).contiguous(), values.expand(*sizes, -1).contiguous()
        return torch.searchsorted(values, wanted, right=self.after)


def find_pieces(problem: Problem) -> Pieces | None:
    """How to cut a problem's columns; None where its mask doesn't separate, or rows don't ascend or descend."""
    separated = separate(problem.expr)
    if separated is None or 0 in problem.shape:
        return None
    largest = problem.largest()
    if separated.rearranged and largest >= LARGEST_SUM:
        return None
    turns: dict[tuple[str, str, bool], Turn] = {}
    changes: list[Tensor] = []
    known: dict[str, tuple[Tensor, bool, int] | None] = {}
    for threshold in separated.thresholds:
        text = threshold.rows.text
        if text not in known:
            values, faults = _of_rows(problem, threshold.rows)
            changes += map(_changes, faults)
            known[text] = _ascend(values)
        ascending = known[text]
        if ascending is None:
            return None
        values, step, sign = ascending
        after = threshold.after if sign > 0 else not threshold.after
        turns[text, threshold.columns.text, threshold.after] = Turn(values, step, sign, threshold.columns, after)
    for switch in separated.switches:
        values, faults = _of_rows(problem, switch)
        changes += map(_changes, (values, *faults))
    always = torch.cat(changes).unique() if changes else torch.zeros(0, dtype=torch.int64, device=problem.device)
    pieces = Pieces(problem, largest, tuple(turns.values()), always)
    return pieces if len(always) <= _MOST_SWITCHES and pieces.most <= _MOST_PIECES else None


def _of_rows(problem: Problem, expr: Expr) -> tuple[Tensor, list[Tensor]]:
    """An expression's values and faults at every row, each (B or 1, H or 1, q_len or 1)."""
    batch, heads = problem.shape[:2]
    device = problem.device
    b, h = torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]
    nowhere = torch.zeros((), dtype=torch.int64, device=device)
    row = torch.arange(problem.q_len, device=device) + problem.offset_of(b)
    values, faults = compute(expr, problem.inputs, {"b": b, "h": h, "q": row, "kv": nowhere})
    values, *faults = (x[(None,) * (3 - x.ndim)] for x in (values, *faults))
    return values, faults


def _ascend(values: Tensor) -> tuple[Tensor, bool, int] | None:
    """Values of rows in ascending order, whether by steps of one, and the sign that made them so."""
    values = values.to(torch.int64)
    before, after = values[..., :-1], values[..., 1:]  # compared, not subtracted: far apart, that overflows
    sign = 1
    if not bool((before <= after).all()):
        if not bool((before >= after).all()) or bool((values == torch.iinfo(torch.int64).min).any()):
            return None
        values, sign = -values, -1
    return values, bool((values.diff(dim=-1) == 1).all()), sign


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
