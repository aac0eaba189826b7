"""What each query sees -> the window and the sequences that would show it, if any do.

                         runs of queries      sequences: queries  keys        window
■ ■ · · · · · · ·        whose hulls share                 2      [0, 3)      left None, right 0
■ ■ ■ · · · · · ·        keys                              1      none
· · · · · · · · ·        a row without keys                2      [5, 8)
· · · · · ■ ■ · ·        is apart
· · · · · ■ ■ ■ ·        keys between them belong to sequences without queries

These are proposals: where rows have gaps, heads differ or ends jump, they show something else. Who asks has to compare.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.forms.row_intervals import RowIntervals
from maskflash.forms.windows import Side
from maskflash.presets.documents import Align


class Hulls(NamedTuple):
    """The first key that each query of head 0 sees, and one past the last.

    Attributes:
        start: (batch, q_len) int64; 0 where the query sees none.
        stop: likewise.
        kv_len: columns in tokens.
    """

    start: Tensor
    stop: Tensor
    kv_len: int

    @staticmethod
    def of(seen: RowIntervals, batch: int) -> Hulls:
        """Those of head 0 of all batch rows."""
        if 0 in seen.shape:
            nothing = torch.zeros(batch, seen.q_len, dtype=torch.int64)
            return Hulls(nothing, nothing, seen.kv_len)
        count = seen.count.view(*seen.shape, seen.q_len)[:, 0]
        offsets = seen.offsets[:-1].view(*seen.shape, seen.q_len)[:, 0]
        some = count > 0
        start, stop = (torch.zeros_like(count) for _ in range(2))
        start[some] = seen.start[offsets[some]]
        stop[some] = seen.stop[(offsets + count - 1)[some]]
        return Hulls(start.expand(batch, -1), stop.expand(batch, -1), seen.kv_len)

    @property
    def square(self) -> bool:
        """Whether there are as many queries as keys."""
        return self.start.shape[1] == self.kv_len

    def window(self, align: Align = "bottom_right") -> tuple[Side, Side]:
        """The window along the diagonal of the first batch row, through its last query and key, or its first ones."""
        q_len = self.start.shape[1]
        if not len(self.start):
            return None, None
        start, stop = self.start[0], self.stop[0]
        at = torch.arange(q_len) + (self.kv_len - q_len if align == "bottom_right" else 0)
        left, right = _sides(at, start, stop, 0, self.kv_len)
        before, after = (at[(start == stop) & beyond] for beyond in (at < 0, at >= self.kv_len))
        if right is None and len(before) and self.kv_len:
            right = -1 - int(before[-1])  # the window ends just before the keys begin
        if left is None and len(after) and self.kv_len:
            left = int(after[0]) - self.kv_len  # it begins just after they end
        return left, right

    def chunk(self) -> list[int]:
        """The size of chunks of keys, of which queries see no more than one; none where all see the first key."""
        size = math.gcd(*self.start[:1].unique().tolist())
        return [size] if size else []

    def sequences(self, align: Align = "bottom_right") -> Sequences:
        """Runs of queries whose hulls share keys, as sequences; tokens are counted through the batch rows.

        Args:
            align: the corner in which the diagonal of each sequence begins, or ends.
        """
        batch, q_len = self.start.shape
        some = (self.start < self.stop).flatten()
        before = torch.arange(batch)[:, None] * self.kv_len
        start, stop = (self.start + before).flatten(), (self.stop + before).flatten()
        first = _first_of_runs(start, stop, some, q_len)
        last = pad(first[1:], (0, 1), value=len(start))[: len(first)] - 1
        # Keys ascend, whatever the rows: those of a run come after those before it, and a row without keys has none.
        kv_stop = torch.where(some[first], torch.maximum(start[first], stop[last]), 0)
        after = pad(kv_stop.cummax(0).values, (1, 0)) if len(first) else kv_stop.new_zeros(1)
        kv_start = torch.maximum(torch.where(some[first], start[first], 0), after[:-1])
        kv_stop = torch.maximum(kv_stop, kv_start)
        q_lengths = last + 1 - first
        run = torch.repeat_interleave(torch.arange(len(first)), q_lengths)
        ahead = kv_stop - 1 - last if align == "bottom_right" else kv_start - first
        at = torch.arange(len(start)) + ahead[run]
        ends = (x[run][some] for x in (kv_start, kv_stop))
        left, right = _sides(at[some], start[some], stop[some], *ends)
        return Sequences(q_lengths, kv_start, kv_stop, batch * self.kv_len, left, right)


class Sequences(NamedTuple):
    """Sequences of queries and keys, and a window along the diagonal of each.

    Attributes:
        q_lengths: (n,) int64, queries of each, one after the other.
        kv_start: (n,) int64, first key of each, ascending.
        kv_stop: (n,) int64, one past its last key.
        kv_total: all keys.
        left: tokens before the key that a query is aligned with; None for all.
        right: tokens after it; None for all.
    """

    q_lengths: Tensor
    kv_start: Tensor
    kv_stop: Tensor
    kv_total: int
    left: Side
    right: Side

    @property
    def kv_lengths(self) -> Tensor:
        """Keys of each."""
        return self.kv_stop - self.kv_start

    def end_to_end(self) -> tuple[Tensor, Tensor]:
        """Lengths of queries and keys (m,) where the keys between sequences are some without queries; m is positive."""
        ends = torch.tensor([self.kv_total])
        gaps = torch.cat((self.kv_start, ends)) - pad(self.kv_stop, (1, 0))
        q_lengths = torch.stack((torch.zeros_like(gaps), pad(self.q_lengths, (0, 1))), 1).flatten()
        kv_lengths = torch.stack((gaps, pad(self.kv_lengths, (0, 1))), 1).flatten()
        kept = (q_lengths > 0) | (kv_lengths > 0)
        kept[-1] |= not bool(kept.any())
        return q_lengths[kept], kv_lengths[kept]


def _first_of_runs(start: Tensor, stop: Tensor, some: Tensor, q_len: int) -> Tensor:
    """The first row of each run, ascending."""
    together = (start[1:] < stop[:-1]) & (start[:-1] < stop[1:])
    if not bool(together.any()) and bool((stop - start <= 1).all()):  # a diagonal is one sequence, not many of a token
        together = start[1:] == start[:-1] + 1
        together[q_len - 1 :: max(q_len, 1)] = False
    goes_on = torch.where(some[1:], together & some[:-1], ~some[:-1])
    return torch.cat((torch.ones(min(len(start), 1), dtype=torch.bool), ~goes_on)).nonzero()[:, 0]


def _sides(at: Tensor, start: Tensor, stop: Tensor, first: Tensor | int, end: Tensor | int) -> tuple[Side, Side]:
    """How far the first row that tells sees to the left and to the right, its own key always; None is to the end."""
    some = start < stop
    left = (at - start)[some & (start > first)]
    right = (stop - 1 - at)[some & (stop < end)]
    return (max(int(left[0]), 0) if len(left) else None), (max(int(right[0]), 0) if len(right) else None)
