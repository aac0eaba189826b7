"""Turns strips (rows with holes in what they see, as exact bits) into dense-kernel calls over the columns they see."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from maskflash.blocks.spans import BoolArray, IntArray, Strip
from maskflash.kernels.cpu_calls import Bits, Call, Pick
from maskflash.kernels.cpu_costs import Costs, candidates

_COSTS: Final[Costs] = candidates("forward", torch.float32)[0]
_MAX_ROWS: Final = 128  # of a call: packed bits are unpacked per call
_MAX_CUTS: Final = 8  # strips that change more often are cut every _FINEST_CUT rows
_FINEST_CUT: Final = 32


@dataclass(slots=True)
class _Piece:
    """Rows of a strip on their way into a call, without those that see nothing."""

    rows: IntArray
    left: int
    bits: BoolArray


@dataclass(slots=True)
class StripMerger:
    """Turns strips into calls over just the columns that some row sees; joins pieces where that is cheaper.

    Attributes:
        b: batch row of the mask.
        h: head of the mask.
        kv_len: columns of the mask, in tokens.
        budget: bytes of packed bits left to keep.
    """

    b: int
    h: int
    kv_len: int
    budget: int
    calls: list[Call] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    rows: int = 0
    seen: BoolArray | None = None  # (kv_len,), the columns of the pending pieces
    cost: float = 0.0

    def take(self, strip: Strip) -> None:
        """Adds a strip, cut where what its rows see changes abruptly."""
        for low, high in _steady(strip.bits):
            bits = strip.bits[low:high]
            some = bits.any(axis=1)
            if some.any():
                self._add(_Piece(strip.top + low + np.flatnonzero(some), strip.left, bits[some]))

    def _add(self, piece: _Piece) -> None:
        seen = np.zeros(self.kv_len, dtype=np.bool_)
        seen[piece.left : piece.left + piece.bits.shape[1]] = piece.bits.any(axis=0)
        cost = _COSTS.of(len(piece.rows), int(seen.sum()), masked=True)
        if self.seen is not None:
            rows, union = self.rows + len(piece.rows), self.seen | seen
            together = _COSTS.of(rows, int(union.sum()), masked=True)
            if rows <= _MAX_ROWS and together < self.cost + cost:
                self.pieces.append(piece)
                self.rows, self.seen, self.cost = rows, union, together
                return
            self._flush()
        self.pieces, self.rows, self.seen, self.cost = [piece], len(piece.rows), seen, cost

    def finish(self) -> list[Call]:
        """The calls of all strips taken."""
        self._flush()
        return self.calls

    def _flush(self) -> None:
        if self.seen is None:
            return
        columns = np.flatnonzero(self.seen)
        bits = np.zeros((self.rows, len(columns)), dtype=np.bool_)
        top = 0
        for piece in self.pieces:
            low, high = np.searchsorted(columns, (piece.left, piece.left + piece.bits.shape[1]))
            bits[top : top + len(piece.rows), low:high] = piece.bits[:, columns[low:high] - piece.left]
            top += len(piece.rows)
        rows = np.concatenate([piece.rows for piece in self.pieces])
        self.calls.append(Call(Pick.of(rows), Pick.of(columns), self._mask(bits)))
        self.pieces, self.seen = [], None

    def _mask(self, bits: BoolArray) -> Bits | None:
        if bits.all():
            return None
        mask = Bits.pack(bits, self.b, self.h)
        assert mask.packed is not None
        if mask.packed.nbytes > self.budget:
            return Bits(None, self.b, self.h)
        self.budget -= mask.packed.nbytes
        return mask


def _steady(bits: BoolArray) -> list[tuple[int, int]]:
    """Runs of rows in which first, last and number of visible columns change by at most one from row to row."""
    rows = len(bits)
    shape = np.stack((bits.argmax(axis=1), bits[:, ::-1].argmax(axis=1), np.count_nonzero(bits, axis=1)))
    cuts = np.flatnonzero((np.abs(np.diff(shape, axis=1)) > 1).any(axis=0)) + 1
    if len(cuts) > _MAX_CUTS:
        cuts = np.arange(_FINEST_CUT, rows, _FINEST_CUT)
    cuts = np.union1d(cuts, np.arange(_MAX_ROWS, rows, _MAX_ROWS))
    return list(pairwise([0, *cuts.tolist(), rows]))
