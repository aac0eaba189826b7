"""Strips (lines of tiles whose rows see holes, as exact bits) -> dense-kernel calls over just the columns they see.

    columns     0 1 2 3 4 5 6 7
                # . # # . . # .      every row sees 0, 2, 3: a call without a mask, gathered
                # . # # . . . #      some rows see 6, 7: a call with bits, which merges
                # . # # . . # #      nobody sees 1, 4, 5: in no call

Where the columns that all rows see are few, one call with bits computes everything. So bits are kept and unpacked only
for columns that some rows of the call see and some don't, or where that is cheaper than a second call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from maskflash.analysis.rows import Strip
from maskflash.analysis.runs import BoolArray, IntArray
from maskflash.backends.cpu.calls import Bits, Call, Pick
from maskflash.backends.cpu.costs import TABLE_WORK, Costs, candidates

_MAX_ROWS: Final = 512  # of a call: packed bits are unpacked per call
_MAX_CUTS: Final = 8  # strips that change more often are cut every _FINEST_CUT rows
_FINEST_CUT: Final = 32
_UNPACKED: Final = 0.1  # cost of one pair's bit on its way to the kernel, in pairs of the table's work


@dataclass(slots=True)
class _Batch:
    """Rows on their way into a call, each of which sees something, and the columns that some or all of them see."""

    rows: int
    some: BoolArray  # (kv_len,)
    every: BoolArray  # (kv_len,)


@dataclass(slots=True)
class StripMerger:
    """Turns strips into calls over just the columns that some row sees; joins batches where that is cheaper.

    Attributes:
        b: batch row of the mask.
        h: head of the mask.
        kv_len: columns of the mask, in tokens.
        budget: bytes of packed bits left to keep.
        work: heads x head dim that one call is expected to compute.
    """

    b: int
    h: int
    kv_len: int
    budget: int
    work: int
    calls: list[Call] = field(default_factory=list)
    rows: list[IntArray] = field(default_factory=list)
    bits: list[tuple[IntArray, BoolArray]] = field(default_factory=list)  # columns, bits
    pending: _Batch | None = None
    _costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        (costs,) = candidates("forward", torch.float32)
        self._costs = costs.for_work(self.work)

    def take(self, strip: Strip) -> None:
        """Adds a strip, cut where what its rows see changes abruptly."""
        for low, high in _steady(strip.bits):
            rows = low + np.flatnonzero(strip.bits[low:high].any(axis=1))
            if len(rows):
                self._add(strip.top + rows, strip.columns, strip.bits[rows])

    def _add(self, rows: IntArray, columns: IntArray, bits: BoolArray) -> None:
        batch = _Batch(len(rows), *(np.zeros(self.kv_len, dtype=np.bool_) for _ in range(2)))
        # Reducing over rows is an eighth of the work on packed bits.
        packed = np.packbits(bits, axis=1)
        for seen, of_rows in ((batch.some, np.bitwise_or), (batch.every, np.bitwise_and)):
            seen[columns] = np.unpackbits(of_rows.reduce(packed, axis=0), count=len(columns))
        if self.pending is not None:
            known = self.pending
            both = _Batch(known.rows + batch.rows, known.some | batch.some, known.every & batch.every)
            if both.rows <= _MAX_ROWS and self._cost(both) < self._cost(self.pending) + self._cost(batch):
                batch = both
            else:
                self._flush()
        self.rows.append(rows)
        self.bits.append((columns, bits))
        self.pending = batch

    def _cost(self, batch: _Batch) -> float:
        some, every = int(np.count_nonzero(batch.some)), int(np.count_nonzero(batch.every))
        return min(self._masked_cost(batch.rows, some), self._split_cost(batch.rows, some, every))

    def _masked_cost(self, rows: int, columns: int) -> float:
        unpacked = _UNPACKED * TABLE_WORK / self.work
        return self._costs.of(rows, columns, masked=True) + unpacked * rows * columns

    def _split_cost(self, rows: int, some: int, every: int) -> float:
        return self._costs.of(rows, every, masked=False) + self._masked_cost(rows, some - every)

    def finish(self) -> list[Call]:
        """The calls of all strips taken."""
        self._flush()
        return self.calls

    def _flush(self) -> None:
        if self.pending is None:
            return
        batch, rows = self.pending, np.concatenate(self.rows)
        some, every = int(np.count_nonzero(batch.some)), int(np.count_nonzero(batch.every))
        if self._split_cost(batch.rows, some, every) < self._masked_cost(batch.rows, some):
            self.calls.append(Call(Pick.of(rows), Pick.of(np.flatnonzero(batch.every)), None))
            self._mask(rows, np.flatnonzero(batch.some & ~batch.every), merges=True)
        else:
            self._mask(rows, np.flatnonzero(batch.some), merges=False)
        self.rows, self.bits, self.pending = [], [], None

    def _mask(self, rows: IntArray, columns: IntArray, *, merges: bool) -> None:
        """Adds the call over these columns, without rows that see none of them."""
        bits = np.zeros((len(rows), len(columns)), dtype=np.bool_)
        top = 0
        for own, part in self.bits:
            place = np.searchsorted(own, columns).clip(max=len(own) - 1)
            shared = np.flatnonzero(own[place] == columns)
            bits[top : top + len(part), shared] = part[:, place[shared]]
            top += len(part)
        seeing = np.flatnonzero(bits.any(axis=1))
        if len(seeing) < len(rows):
            rows, bits = rows[seeing], bits[seeing]
        if len(rows):
            self.calls.append(Call(Pick.of(rows), Pick.of(columns), self._packed(bits), merges=merges))

    def _packed(self, bits: BoolArray) -> Bits | None:
        if bits.all():
            return None
        packed = torch.from_numpy(np.packbits(bits, axis=1))
        kept = packed.nbytes <= self.budget
        self.budget -= packed.nbytes * kept
        return Bits(packed if kept else None, self.b, self.h)


def _steady(bits: BoolArray) -> list[tuple[int, int]]:
    """Runs of rows in which first, last and number of visible columns change by at most one from row to row."""
    rows = len(bits)
    shape = np.stack((bits.argmax(axis=1), bits[:, ::-1].argmax(axis=1), np.count_nonzero(bits, axis=1)))
    cuts = np.flatnonzero((np.abs(np.diff(shape, axis=1)) > 1).any(axis=0)) + 1
    if len(cuts) > _MAX_CUTS:
        cuts = np.arange(_FINEST_CUT, rows, _FINEST_CUT)
    cuts = np.union1d(cuts, np.arange(_MAX_ROWS, rows, _MAX_ROWS))
    return list(pairwise([0, *cuts.tolist(), rows]))
