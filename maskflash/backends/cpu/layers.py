"""Strips whose rows see a few intervals each -> layers: the n-th intervals of all rows are in layer n.

    a strip              layer 0              layer 1
    # # . . # # . .      # # . . . . . .      . . . . # # . .
    # # . . . # # .      # # . . . . . .      . . . . . # # .
    # # # # # # # .      # # # # # # # .      . . . . . . . .

Each layer is planned like a mask of one interval per row, in long calls without gathered columns. A row's results
from its layers are merged by their lse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from maskflash.analysis.rows import RowSpans, Strip
from maskflash.analysis.runs import BoolArray, IntArray

_MAX_LAYERS: Final = 4  # each merges its rows once more
_MAX_CUTS: Final = 8  # per strip: where intervals jump more often, calls would be short


@dataclass(slots=True)
class Layers:
    """The intervals of strips taken so far.

    Attributes:
        q_len: rows of the mask, in tokens.
        start: per layer, (Sq,) first column of the row's interval.
        stop: per layer, (Sq,) one past its last column; equal to start where the row has no such interval.
    """

    q_len: int
    start: list[IntArray] = field(default_factory=list)
    stop: list[IntArray] = field(default_factory=list)

    def take(self, strip: Strip) -> bool:
        """Adds a strip, unless its rows see many intervals, or intervals that jump often: then returns False."""
        found = _intervals(strip.bits)
        if found is None:
            return False
        start, stop = _tokens(strip, *found)
        if _cuts(start, stop) > _MAX_CUTS:
            return False
        while len(self.start) < len(start):
            self.start.append(np.zeros(self.q_len, dtype=np.int64))
            self.stop.append(np.zeros(self.q_len, dtype=np.int64))
        rows = slice(strip.top, strip.top + len(strip.bits))
        for layer, (first, last) in enumerate(zip(start, stop, strict=True)):
            self.start[layer][rows], self.stop[layer][rows] = first, last
        return True

    def joined(self, spans: RowSpans) -> list[RowSpans]:
        """The layers, the first with the rows of `spans`, which are in no strip, beside its own."""
        if not self.start:
            return [spans]
        first = RowSpans(spans.start + self.start[0], spans.stop + self.stop[0])
        return [first, *map(RowSpans, self.start[1:], self.stop[1:])]


def _intervals(bits: BoolArray) -> tuple[IntArray, IntArray] | None:
    """Starts and stops of each row's intervals, both (layers, rows), 0 where it has fewer; None if one has too many."""
    rows, columns = bits.shape
    padded = np.zeros((rows, columns + 2), dtype=np.bool_)
    padded[:, 1:-1] = bits
    edge = padded[:, 1:] != padded[:, :-1]
    per_row = np.count_nonzero(edge, axis=1)
    layers = int(per_row.max()) // 2
    if layers > _MAX_LAYERS:
        return None
    row, column = np.divmod(np.flatnonzero(edge), columns + 1)
    # The edges of a row alternate: where an interval starts, where it stops.
    number = np.arange(len(row)) - (per_row.cumsum() - per_row)[row]
    found = np.zeros((2 * layers, rows), dtype=np.int64)
    found[number, row] = column
    return found[::2], found[1::2]


def _tokens(strip: Strip, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
    """Ends of intervals in tokens instead of columns of a strip; 0 where there is none."""
    some = stop > start
    return np.where(some, strip.columns[start * some], 0), np.where(some, strip.columns[stop - some] + 1, 0)


def _cuts(start: IntArray, stop: IntArray) -> int:
    """Between how many neighbouring rows some interval appears, vanishes, or has an end that jumps."""
    # Column 0 is also where a missing interval "starts", so its presence is looked at too.
    moves = np.stack((np.diff(start, axis=1), np.diff(stop, axis=1)))
    jumps = (moves < 0) | (moves > 1) | (np.diff(stop > start, axis=1))
    return int(np.count_nonzero(jumps.any(axis=(0, 1))))
