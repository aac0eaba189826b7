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
import numpy.typing as npt

from maskflash.analysis.intervals import intervals_of
from maskflash.analysis.rows import RowSpans, Strip
from maskflash.analysis.runs import BoolArray, IntArray

_MAX_CUTS: Final = 8  # per strip: where intervals jump more often, calls would be short


@dataclass(slots=True)
class Layers:
    """The intervals of lines and strips taken so far.

    Attributes:
        q_len: rows of the mask, in tokens.
        start: per layer, (Sq,) first column of the row's interval.
        stop: per layer, (Sq,) one past its last column; equal to start where the row has no such interval.
    """

    q_len: int
    start: list[IntArray] = field(default_factory=list)
    stop: list[IntArray] = field(default_factory=list)

    def take_lines(self, lines: IntArray, start: IntArray, stop: IntArray) -> BoolArray:
        """Adds those lines of tiles whose intervals don't jump often.

        Args:
            lines: their numbers.
            start: (n, lines, rows) first columns of their rows' intervals; beyond the last row anything.
            stop: likewise, one past the last columns.

        Returns:
            (lines,) bool, which were taken.
        """
        some = start < stop
        start, stop = np.where(some, start, 0), np.where(some, stop, 0)
        taken: BoolArray = _cuts(start, stop) <= _MAX_CUTS
        rows = lines[taken, None] * start.shape[2] + np.arange(start.shape[2])
        inside = rows < self.q_len
        self._add(rows[inside], start[:, taken][:, inside], stop[:, taken][:, inside])
        return taken

    def take(self, strip: Strip) -> bool:
        """Adds a strip, unless its rows see many intervals, or intervals that jump often: then returns False."""
        found = intervals_of(strip.bits)
        if found is None:
            return False
        start, stop = _tokens(strip, *found)
        if _cuts(start, stop) > _MAX_CUTS:
            return False
        self._add(strip.top + np.arange(len(strip.bits)), start, stop)
        return True

    def _add(self, rows: IntArray, start: IntArray, stop: IntArray) -> None:
        """Notes the intervals of rows (n, rows), 0 where a row has fewer."""
        for layer in range(np.count_nonzero((start < stop).any(axis=1))):
            if layer == len(self.start):
                self.start.append(np.zeros(self.q_len, dtype=np.int64))
                self.stop.append(np.zeros(self.q_len, dtype=np.int64))
            self.start[layer][rows], self.stop[layer][rows] = start[layer], stop[layer]

    def joined(self, spans: RowSpans) -> list[RowSpans]:
        """The layers, the first with the rows of `spans`, which are in no strip, beside its own."""
        if not self.start:
            return [spans]
        first = RowSpans(spans.start + self.start[0], spans.stop + self.stop[0])
        return [first, *map(RowSpans, self.start[1:], self.stop[1:])]


def _tokens(strip: Strip, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
    """Ends of intervals in tokens instead of columns of a strip; 0 where there is none."""
    some = stop > start
    return np.where(some, strip.columns[start * some], 0), np.where(some, strip.columns[stop - some] + 1, 0)


def _cuts(start: IntArray, stop: IntArray) -> npt.NDArray[np.intp]:
    """Between how many neighbouring rows some interval (n, ..., rows) appears, vanishes, or has an end that jumps."""
    # Column 0 is also where a missing interval "starts", so its presence is looked at too.
    moves = np.stack((np.diff(start), np.diff(stop)))
    jumps = (moves < 0) | (moves > 1) | np.diff(stop > start)
    cuts: npt.NDArray[np.intp] = np.count_nonzero(jumps.any(axis=(0, 1)), axis=-1)
    return cuts
