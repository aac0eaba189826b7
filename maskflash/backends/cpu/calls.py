"""What the CPU backend runs: dense-kernel calls, each some rows x some columns x the mask between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.runs import BoolArray, IntArray
from maskflash.backends.cpu.costs import Pass


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

    def span(self, pick: Pick) -> tuple[int, int]:
        """Between which tokens its rows or columns lie, those of all blocks."""
        return pick.start, pick.stop + (self.repeat - 1) * len(self.rows)

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


class Chain(NamedTuple):
    """Calls that follow one another, and their predicted cost, in pairs."""

    calls: list[Call]
    cost: float


def chained(calls: list[Call], pass_: Pass, cost_of: Callable[[Call], float]) -> list[Chain]:
    """Calls in chains that may run side by side, each in the calls' order: what they sum up is the same every time."""
    groups = [[n] for n in range(len(calls))]
    if any(call.merges for call in calls):
        groups = _apart(groups, [call.span(call.rows) for call in calls])
    if pass_ == "backward":
        groups = _apart(groups, [call.span(call.columns) for call in calls])
    return [Chain([calls[n] for n in sorted(g)], sum(cost_of(calls[n]) for n in g)) for g in groups]


def _apart(groups: list[list[int]], spans: list[tuple[int, int]]) -> list[list[int]]:
    """Groups joined where one begins before another ends, so that no two of them share a token."""
    found: list[list[int]] = []
    reached = 0
    for start, stop, group in sorted((min(spans[n][0] for n in g), max(spans[n][1] for n in g), g) for g in groups):
        if not found or start >= reached:
            found.append([])
        found[-1] += group
        reached = max(reached, stop)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The calls of one pass. Every pair that is visible is in exactly one call.

    Attributes:
        native: compute in the tensors' own dtype, else in float32.
        chains: per (b, h) of the mask, its calls; those of different chains write to no token in common.
        cost: predicted, in pairs.
    """

    native: bool
    chains: dict[tuple[int, int], list[Chain]]
    cost: float

    @property
    def merges(self) -> bool:
        """Whether some rows are in several calls."""
        return any(call.merges for call in self.all_calls())

    def complete(self, q_len: int) -> bool:
        """Whether every row of every batch row and head is in a call, so that what it writes holds nothing else."""
        written = (
            [call for chain in chains for call in chain.calls if not call.merges] for chains in self.chains.values()
        )
        return all(sum(call.repeat * len(call.rows) for call in calls) == q_len for calls in written)

    def only(self, q_len: int) -> Call | None:
        """The one call there is, if it computes all rows of every batch row and head."""
        if len(self.chains) == 1:
            (chains,) = self.chains.values()
            if len(chains) == 1 and len(chains[0].calls) == 1:
                (call,) = chains[0].calls
                return call if call.repeat == 1 and len(call.rows) == q_len else None
        return None

    def all_calls(self) -> Iterator[Call]:
        """Every call, chain by chain."""
        return (call for chains in self.chains.values() for chain in chains for call in chain.calls)


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
