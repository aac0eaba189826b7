"""A problem -> what each query sees, as intervals of keys: exactly, and never from all pairs; and as cuDNN takes it.

q 0    ■ · · · · ·    offsets 0    start 0      stop 1
q 1    ■ ■ · · · ·            1          0           2
q 2    ■ · ■ ■ · ·            2          0 2         1 4    a row with a gap has two
q 3    · · · · · ·            4                             a row that sees nothing has none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.changes import find_runs
from maskflash.analysis.problem import Problem
from maskflash.errors import UnsupportedMask
from maskflash.ground import arguments
from maskflash.masks.lines import Line

_MOST_ENDPOINTS: Final = 2**31 - 1  # that 32 bits can count


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
        batch: batch rows of the call, which share the only one here where `shape` says 1.
    """

    q_len: int
    kv_len: int
    shape: tuple[int, int]
    offsets: Tensor
    start: Tensor
    stop: Tensor
    batch: int = 1

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

    def to_cudnn(self) -> Tensor:
        """The endpoints that cuDNN's flexible attention takes, `mask_func` of its `create_mask_plan`; on the CPU.

        Query q of batch row b is column b*q_len + q. It sees the keys [0, F[0]), [F[1], F[2]), [F[3], F[4]) and so on,
        counted from its own batch row's first. F ascends along n; the last intervals of a row may be empty.

            ■ · · · · ·    1 0 0
            ■ ■ · · · ·    2 0 0
            ■ · ■ ■ · ·    1 2 4
            · · ■ ■ · ·    0 2 4    the first interval is empty, since key 0 is hidden

        As columns of one batch row after the other they are right for q (B, S, H, D), and, with all sequences of one
        length, for q (B*S, H, D) with cu_seqlens too.

        Returns:
            (Hmask, n, batch * q_len) int32, contiguous; Hmask is 1 where the mask does not look at h, else the query
            heads. n is odd, and as small as the row with most intervals allows.

        Raises:
            UnsupportedMask: some row has so many intervals that there would be more than 2**31 - 1 endpoints.

        Source: nvidia-cudnn-frontend 1.32, cudnn/flex_attention/plan/builder.py and plan/kernels/q2k_classify.py.

        Example:
            >>> from maskflash import causal, global_tokens, sliding_window
            >>> seen = (causal() & (global_tokens(1) | sliding_window(1))).to_row_intervals(4, 4)
            >>> seen.to_cudnn()[0]
            tensor([[1, 2, 3, 1],
                    [1, 2, 3, 2],
                    [1, 2, 3, 4]], dtype=torch.int32)
        """
        batch, heads = self.shape
        rows = len(self.offsets) - 1
        count, first, row = self.count, self.offsets[:-1], self.rows
        some = (count > 0).nonzero()[:, 0]
        late = torch.zeros(rows, dtype=torch.int64)  # 1 where a row's intervals come after [0, F[0]), which is empty
        late[some] = (self.start[first[some]] > 0).long()
        slots = count + late
        most = int(slots.max()) if rows else 1
        n = max(2 * most - 1, 1)
        if n * heads * self.batch * self.q_len > _MOST_ENDPOINTS:
            at = int(slots.argmax())
            raise UnsupportedMask(
                f"to_cudnn: {self._place(at)} sees {int(count[at])} intervals of keys, and as many for each query are "
                f"more than {_MOST_ENDPOINTS:,} endpoints. Use the mask itself: compile(mask) needs none"
            )
        last = torch.zeros(rows, dtype=torch.int32)
        last[some] = self.stop[self.offsets[1:][some] - 1].int()
        ends = last.repeat(n, 1)
        ends[0, late > 0] = 0
        slot = torch.arange(len(row)) - first[row] + late[row]
        ends[2 * slot, row] = self.stop.int()
        inner = slot > 0
        ends[2 * slot[inner] - 1, row[inner]] = self.start[inner].int()
        by_head = ends.view(n, batch, heads, self.q_len).permute(2, 0, 1, 3)
        return by_head.expand(heads, n, self.batch, self.q_len).reshape(heads, n, -1).contiguous()

    def _place(self, row: int) -> str:
        """A row by name; batch row and head only where there are several."""
        unit, q = divmod(row, self.q_len)
        b, h = divmod(unit, self.shape[1])
        of = [f"batch row {b}"] * (self.shape[0] > 1) + [f"head {h}"] * (self.shape[1] > 1)
        return f"row {q}" + (f" of {', '.join(of)}" if of else "")

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
    row, start, stop = find_runs(problem.turned())  # whose columns are the problem's rows
    batch, heads = problem.shape[:2]
    count = torch.bincount(row, minlength=batch * heads * problem.q_len)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
    return RowIntervals(problem.q_len, problem.kv_len, (batch, heads), offsets, start, stop, problem.batch)
