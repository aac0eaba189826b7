"""A problem -> what each query sees, as intervals of keys: exactly, and never from all pairs.

q 0    ■ · · · · ·    offsets 0    start 0      stop 1
q 1    ■ ■ · · · ·            1          0           2
q 2    ■ · ■ ■ · ·            2          0 2         1 4    a row with a gap has two
q 3    · · · · · ·            4                             a row that sees nothing has none
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskflash.analysis.changes import find_changes
from maskflash.analysis.problem import Problem
from maskflash.ground import arguments
from maskflash.masks.lines import Line


@dataclass(frozen=True, slots=True, eq=False)
class RowIntervals:
    """What each query sees: intervals of keys, apart and ascending, in compressed-row form, on the CPU.

    Attributes:
        q_len: rows in tokens.
        kv_len: columns in tokens.
        shape: (B, H); B or H is 1 where the mask does not look at it.
        offsets: (B*H*q_len + 1,) int64. Row q of (b, h) has the intervals offsets[r] to offsets[r + 1], half open,
            r = (b*H + h)*q_len + q.
        start: (intervals,) int64, first key of each.
        stop: (intervals,) int64, one past its last key.
    """

    q_len: int
    kv_len: int
    shape: tuple[int, int]
    offsets: Tensor
    start: Tensor
    stop: Tensor

    @property
    def count(self) -> Tensor:
        """How many intervals each row has: (B*H*q_len,) int64."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """The row r of each interval: (intervals,) int64, ascending."""
        return torch.repeat_interleave(torch.arange(len(self.offsets) - 1), self.count)

    def row(self, q: int, *, b: int = 0, h: int = 0) -> Line:
        """The keys that a query sees, as (start, stop) of each interval.

        Args:
            q: the row, from 0.
            b: batch row.
            h: query head.
        """
        batch, heads = self.shape
        for name, index, size in (("b", b, batch), ("h", h, heads), ("q", q, self.q_len)):
            arguments.integer("RowIntervals.row", name, index, high=max(size - 1, 0))
        row = (b * heads + h) * self.q_len + q
        low, high = self.offsets[row : row + 2].tolist()
        return list(zip(self.start[low:high].tolist(), self.stop[low:high].tolist(), strict=True))

    def __repr__(self) -> str:
        most = int(self.count.max()) if len(self.count) else 0
        return (
            f"RowIntervals({self.q_len} x {self.kv_len} tokens, shape {self.shape}, {len(self.start)} intervals, "
            f"at most {most} in a row)"
        )


def find_row_intervals(problem: Problem) -> RowIntervals:
    """What the rows of a problem see.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    changes = find_changes(problem.turned())  # whose columns are the problem's rows
    batch, heads = changes.shape
    rows = batch * heads * problem.q_len
    turns = torch.bincount(changes.column, minlength=rows)
    before = turns.cumsum(0) - turns
    opens = (torch.arange(len(changes.column)) - before[changes.column]) % 2 == 0
    start = changes.row[opens]
    # Each interval's end is the next turn of its row; one without has no end but the last column.
    ends = torch.roll(changes.row, -1)
    goes_on = torch.roll(changes.column, -1) == changes.column
    goes_on[-1:] = False
    stop = ends.where(goes_on, torch.full_like(ends, problem.kv_len))[opens]
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), ((turns + 1) // 2).cumsum(0)))
    return RowIntervals(problem.q_len, problem.kv_len, (batch, heads), offsets, start, stop)
