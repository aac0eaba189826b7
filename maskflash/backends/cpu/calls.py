"""Some rows, some columns and the mask between them -> one call of torch's dense kernel, of a kind for each shape.

One drawing for each kind of mask; rows go down, columns to the right, # is visible:

    None        Causal      Band(0, 1)   Band(1, 0)   Band(1, 1)   Intervals     Bits
    # # # #     # . . .     # # # . .    # # # # #    # # # . .    # # # . .     # . # # .
    # # # #     # # . .     # # # # .    . # # # #    . # # # .    # # # . .     . # . # .
    # # # #     # # # .     # # # # #    . . # # #    . . # # #    . . . # #     # # . . #
    no mask     the         a slice of one matrix, shared by       ends of       a bit for
                kernel's    all calls of that kind                 each row      each pair
                own flag

A call may be gathered: its rows or columns have gaps in the sequence, and are picked by an index.

    columns of the sequence   0 1 2 3 4 5 6 7 8
    picked                    ^ ^ ^       ^ ^     index [0, 1, 2, 6, 7]: five columns of the call

A sliding window is many equal blocks, one below and to the right of the other: one call picks them as `Blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskflash.analysis.runs import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """Which tokens of a sequence: the slice start to stop, or the ascending int64 index where it has gaps."""

    start: int
    stop: int
    index: Tensor | None = None

    @staticmethod
    def of(tokens: IntArray) -> Pick:
        """Picks ascending tokens: a slice if they have no gap."""
        start, stop = int(tokens[0]), int(tokens[-1]) + 1
        return Pick(start, stop, None if stop - start == len(tokens) else torch.from_numpy(tokens))

    def __len__(self) -> int:
        return self.stop - self.start if self.index is None else len(self.index)

    def between(self, low: int, high: int) -> Pick:
        """Some of its tokens."""
        if self.index is None:
            return Pick(self.start + low, self.start + high)
        return Pick(int(self.index[low]), int(self.index[high - 1]) + 1, self.index[low:high])

    @property
    def total(self) -> int:
        """How many tokens there are in all."""
        return len(self)

    @property
    def hull(self) -> tuple[int, int]:
        """The first token and one past the last."""
        return self.start, self.stop

    def take(self, x: Tensor) -> Tensor:
        """The picked tokens of x (N, H, tokens, ...), as the kernel gets them: a view where they are a slice."""
        if self.index is None:
            whole = self.stop - self.start == x.shape[2]
            return x if whole else x.narrow(2, self.start, self.stop - self.start)
        return x.index_select(2, self.index)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Writes what the kernel returned into the picked tokens of x."""
        if self.index is None:
            self.take(x).copy_(part)
        else:
            x.index_copy_(2, self.index, part.to(x.dtype))

    def add(self, x: Tensor, part: Tensor) -> None:
        """Adds what the kernel returned to the picked tokens of x, summed over the heads that share them."""
        if part.shape[1] != x.shape[1]:
            part = part.sum(1, keepdim=True, dtype=x.dtype)
        if self.index is None:
            self.take(x).add_(part)
        else:
            x.index_add_(2, self.index, part.to(x.dtype))

    def tokens(self) -> Tensor:
        """The token numbers: (len,) int64."""
        return torch.arange(self.start, self.stop) if self.index is None else self.index

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return 0 if self.index is None else self.index.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(Pick):
    """Equal slices, each `step` tokens after the last, of which start to stop is the first: a sliding window's.

        # # # . . . . . .      rows: count = 3, step = 2; columns: the same, of 4 each. The kernel gets
        . # # # . . . . .      (heads, 3, 2, ...) and (heads, 3, 4, ...), views that overlap: nothing is copied.
        . . # # # . . . .
        . . . # # # . . .      Its batch is the blocks, so x has N = 1.
        . . . . # # # . .
        . . . . . # # # .

    Without it each block is a call of its own. Forward is then 1.1 to 1.5 times slower at 1,024 to 4,096 tokens of 8
    heads x 64 and windows of 128 to 512, backward about the same (medians by turns, on a busy machine).
    """

    count: int = 1
    step: int = 1

    @property
    def total(self) -> int:
        """How many tokens there are in all, those of several blocks each time."""
        return self.count * len(self)

    @property
    def hull(self) -> tuple[int, int]:
        """The first token and one past the last."""
        return self.start, self.stop + (self.count - 1) * self.step

    def take(self, x: Tensor) -> Tensor:
        """The slices of x (1, H, tokens, ...): a view (H, count, len, ...)."""
        size = (x.shape[1], self.count, len(self), *x.shape[3:])
        stride = (x.stride(1), self.step * x.stride(2), *x.stride()[2:])
        return x.as_strided(size, stride, int(x.storage_offset()) + self.start * x.stride(2))

    def each(self) -> list[Pick]:
        """Its slices."""
        steps = (block * self.step for block in range(self.count))
        return [Pick(self.start + step, self.stop + step) for step in steps]

    def add(self, x: Tensor, part: Tensor) -> None:
        """Adds what the kernel returned, summed over the heads that share it, block by block, since they overlap."""
        if part.shape[0] != x.shape[1]:
            part = part.sum(0, keepdim=True, dtype=x.dtype)
        for block in range(self.count):
            start = self.start + block * self.step
            x[0, :, start : start + len(self)].add_(part[:, block])


@dataclass(frozen=True, slots=True)
class Causal:
    """Row t of the call sees the columns x <= t, as many columns as rows: the kernel knows this one itself."""


@dataclass(frozen=True, slots=True)
class Band:
    """Row t of the call sees start_step·t <= x < width + stop_step·t; the steps are 0 or 1, not both 0."""

    start_step: int
    stop_step: int
    width: int

    @property
    def kind(self) -> tuple[int, int, int]:
        """Bands of one kind are slices of one matrix; two edges that move fix its width, one edge doesn't."""
        return self.start_step, self.stop_step, self.width if self.start_step == self.stop_step else 0

    def mean_width(self, rows: int) -> float:
        """How many columns each of so many rows sees, on average."""
        return self.width + (self.stop_step - self.start_step) * (rows - 1) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Row t of the call sees the columns start[t] <= x < stop[t]; both (R, 1) int32."""

    start: Tensor
    stop: Tensor

    def visible(self, columns: int) -> Tensor:
        """(R, columns) bool."""
        x = torch.arange(columns, dtype=torch.int32)
        return (x >= self.start) & (x < self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """Row t of the call sees the columns whose bit is set; packed (R, ceil(S/8)) uint8, highest bit first.

    Without packed bits the mask is evaluated again for (b, h) of the mask.
    """

    packed: Tensor | None
    b: int
    h: int


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the dense kernel; mask None means that every row sees every column.

    Views of q, k, v, out and lse are (N, H, tokens, ...), as `views.py` makes them.

    With `merges` its rows are in calls before it: their results so far are merged with its own by lse.
    """

    rows: Pick
    columns: Pick
    mask: Causal | Band | Intervals | Bits | None
    merges: bool = False

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs it covers."""
        return self.rows.total * len(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the call's tensors."""
        mask = self.mask
        held = self.rows.nbytes + self.columns.nbytes
        if isinstance(mask, Intervals):
            held += mask.start.nbytes + mask.stop.nbytes
        if isinstance(mask, Bits) and mask.packed is not None:
            held += mask.packed.nbytes
        return held
