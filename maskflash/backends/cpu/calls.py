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

A sliding window is many equal blocks, one below and to the right of the other: `Blocks` computes them as one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.runs import BoolArray, IntArray


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

    def take(self, x: Tensor) -> Tensor:
        """The picked tokens of x (N, H, tokens, ...): a view where they are a slice, else a copy."""
        if self.index is None:
            whole = self.stop - self.start == x.shape[2]
            return x if whole else x.narrow(2, self.start, self.stop - self.start)
        return x.index_select(2, self.index)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Writes the picked tokens of x."""
        if self.index is None:
            self.take(x).copy_(part)
        else:
            x.index_copy_(2, self.index, part.to(x.dtype))

    def add(self, x: Tensor, part: Tensor) -> None:
        """Adds to the picked tokens of x."""
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

    @staticmethod
    def pack(bits: BoolArray, b: int, h: int) -> Bits:
        """Keeps bits (R, S)."""
        return Bits(torch.from_numpy(np.packbits(bits, axis=1)), b, h)


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

    by_batch_row: ClassVar[bool] = False  # whether it takes views with N = 1 only

    @property
    def height(self) -> int:
        """How many rows it computes in all."""
        return len(self.rows)

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs it covers."""
        return self.height * len(self.columns)

    @property
    def row_hull(self) -> tuple[int, int]:
        """Its first row and one past its last."""
        return self.rows.start, self.rows.stop

    @property
    def column_hull(self) -> tuple[int, int]:
        """Its first column and one past its last."""
        return self.columns.start, self.columns.stop

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

    def take_rows(self, x: Tensor) -> Tensor:
        """Its rows of a view, as the kernel gets them: a view where they are a slice, else a copy."""
        return self.rows.take(x)

    def take_columns(self, x: Tensor) -> Tensor:
        """Its columns of a view, as the kernel gets them."""
        return self.columns.take(x)

    def put_rows(self, x: Tensor, part: Tensor) -> None:
        """Writes what the kernel returned into its rows of a view."""
        self.rows.put(x, part)

    def add_rows(self, x: Tensor, part: Tensor) -> None:
        """Adds what the kernel returned to its rows of a view."""
        self.rows.add(x, part)

    def add_columns(self, x: Tensor, part: Tensor) -> None:
        """Adds what the kernel returned to its columns of a view, summed over the heads that share them."""
        if part.shape[1] != x.shape[1]:
            part = part.sum(1, keepdim=True, dtype=x.dtype)
        self.columns.add(x, part)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(Call):
    """Equal blocks of a sliding window in one call: each len(rows) rows below, and as many columns right of, the last.

        # # # . . . . . .      count = 3: the kernel gets (heads, 3 blocks, 2 rows, ...) and
        . # # # . . . . .      (heads, 3 blocks, 4 columns, ...), views that overlap: nothing is copied.
        . . # # # . . . .
        . . . # # # . . .      rows and columns pick the first block; they are slices.
        . . . . # # # . .
        . . . . . # # # .

    Without it each block is a call of its own. Forward is then 1.1 to 1.5 times slower at 1,024 to 4,096 tokens of 8
    heads x 64 and windows of 128 to 512, backward about the same (medians by turns, on a busy machine).
    """

    count: int = 1

    by_batch_row: ClassVar[bool] = True  # the kernel's batch is the blocks

    @property
    def height(self) -> int:
        """How many rows it computes in all."""
        return self.count * len(self.rows)

    @property
    def row_hull(self) -> tuple[int, int]:
        """Its first row and one past its last."""
        return self.rows.start, self.rows.start + self.height

    @property
    def column_hull(self) -> tuple[int, int]:
        """Its first column and one past its last."""
        return self.columns.start, self.columns.stop + self.height - len(self.rows)

    def take_rows(self, x: Tensor) -> Tensor:
        """Its rows of a view: (H, count, rows, ...)."""
        return self._each(x, self.rows)

    def take_columns(self, x: Tensor) -> Tensor:
        """Its columns of a view, which overlap: (H, count, columns, ...)."""
        return self._each(x, self.columns)

    def put_rows(self, x: Tensor, part: Tensor) -> None:
        """Writes what the kernel returned into its rows of a view."""
        self.take_rows(x).copy_(part)

    def add_rows(self, x: Tensor, part: Tensor) -> None:
        """Adds what the kernel returned to its rows of a view."""
        self.take_rows(x).add_(part)

    def add_columns(self, x: Tensor, part: Tensor) -> None:
        """Adds what the kernel returned to its columns of a view, block by block, since they overlap."""
        if part.shape[0] != x.shape[1]:
            part = part.sum(0, keepdim=True, dtype=x.dtype)
        for block in range(self.count):
            start = self.columns.start + block * len(self.rows)
            x[0, :, start : start + len(self.columns)].add_(part[:, block])

    def _each(self, x: Tensor, pick: Pick) -> Tensor:
        size = (x.shape[1], self.count, len(pick), *x.shape[3:])
        stride = (x.stride(1), len(self.rows) * x.stride(2), *x.stride()[2:])
        return x.as_strided(size, stride, int(x.storage_offset()) + pick.start * x.stride(2))
