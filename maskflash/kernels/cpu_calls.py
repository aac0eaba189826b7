"""What the CPU backend runs: dense-kernel calls, each some rows x some columns x the mask between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from maskflash.blocks.runs import BoolArray, IntArray


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

    def take(self, x: Tensor, dim: int) -> Tensor:
        """The picked tokens of x: a view where they are a slice, else a copy."""
        if self.index is None:
            whole = self.stop - self.start == x.shape[dim]
            return x if whole else x.narrow(dim, self.start, self.stop - self.start)
        return x.index_select(dim, self.index)

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

    def matrix(self, height: int, dtype: torch.dtype) -> Tensor:
        """The mask of `height` rows: (height, width + height) of 0 and -inf."""
        t = torch.arange(height, dtype=torch.int32)[:, None]
        x = torch.arange(self.width + height, dtype=torch.int32)
        return additive((x >= self.start_step * t) & (x < self.width + self.stop_step * t), dtype)


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
    """One dense-kernel call; mask None means that every row sees every column.

    With repeat n it computes n such blocks at once, each len(rows) rows and as many columns further than the last:
    the way of a sliding window. Rows and columns are slices then.

    With `merges` its rows are in calls before it: their results so far are merged with its own by lse.
    """

    rows: Pick
    columns: Pick
    mask: Causal | Band | Intervals | Bits | None
    repeat: int = 1
    merges: bool = False

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs it covers."""
        return self.repeat * len(self.rows) * len(self.columns)

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


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The calls of one pass. Every pair that is visible is in exactly one call.

    Attributes:
        native: compute in the tensors' own dtype, else in float32.
        calls: per (b, h) of the mask, its calls.
        cost: predicted, in pairs.
    """

    native: bool
    calls: dict[tuple[int, int], list[Call]]
    cost: float

    @property
    def merges(self) -> bool:
        """Whether some rows are in several calls."""
        return any(call.merges for call in self.all_calls())

    def only(self, q_len: int) -> Call | None:
        """The one call there is, if it computes all rows of every batch row and head."""
        if len(self.calls) == 1:
            (calls,) = self.calls.values()
            if len(calls) == 1 and calls[0].repeat == 1 and len(calls[0].rows) == q_len:
                return calls[0]
        return None

    def all_calls(self) -> Iterator[Call]:
        """Every call, in order."""
        return (call for calls in self.calls.values() for call in calls)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it, from (R, S) bool: 0 where visible, -inf elsewhere, last stride 1."""
    return spread(torch.from_numpy(np.packbits(visible.numpy(), axis=1)), visible.shape[1], dtype)


def spread(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it, from packed bits: (R, columns) of 0 and -inf, last stride 1."""
    # Eight entries for each byte looked up at once: 5x faster than filling where a bool is False.
    rows = _bytes_as_masks(dtype).index_select(0, packed.reshape(-1).int())
    return rows.reshape(len(packed), -1)[:, :columns]


@cache
def _bytes_as_masks(dtype: torch.dtype) -> Tensor:
    """What each byte stands for: (256, 8) of 0 and -inf."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.zeros(256, 8, dtype=dtype).masked_fill_(torch.from_numpy(bits == 0), -torch.inf)
