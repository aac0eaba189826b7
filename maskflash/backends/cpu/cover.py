"""Regular rows (each sees one interval) -> dense-kernel calls that cover them, at the least predicted cost.

Rows whose intervals' ends stay or move by one token a row are a segment:

    # # # . . . .    segment 0: rows 0 to 3, the stop moves           covered by   a band, or cut into
    # # # # . . .                                                                  two, since the corner
    # # # # # . .                                                                  is computed for nothing
    . . . . # # .    segment 1: rows 3 to 5, a rectangle              covered by   a call without a mask
    . . . . # # .
    . . . . . . #    segment 2: row 5                                 joins segment 1 in a call of Intervals
                                                                                   if that is cheaper than two

Columns that no row of a call sees are not in it, so what they hold can't matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import torch

from maskflash.analysis.rows import RowSpans
from maskflash.analysis.runs import IntArray
from maskflash.backends.cpu.calls import Band, Blocks, Call, Causal, Intervals, Pick
from maskflash.backends.cpu.costs import Costs

_HEIGHTS: Final = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # of the parts of a long segment, about
_ALIGNED: Final = 64  # columns; calls of odd numbers of columns are a tenth to a fifth slower
_MAX_BAND_BYTES: Final = 64 << 20  # of one shared mask matrix
_MAX_JOINED_ROWS: Final = 256
_MAX_SLID: Final = 1 << 14  # columns of all blocks of one call: backward holds their gradients at once


def find_segments(spans: RowSpans) -> IntArray:
    """Cuts the rows where the way their intervals move changes; rows that see nothing are in no segment.

    Returns:
        (n, 6) int64, a segment in each row, in the order of Segment's fields.
    """
    start, stop = spans.start, spans.stop
    sees = stop > start
    start_step, stop_step = _steps(start), _steps(stop)
    joins = sees & (start_step >= 0) & (start_step <= 1) & (stop_step >= 0) & (stop_step <= 1)
    joins[1:] &= sees[:-1]
    kind = np.where(joins, 2 * start_step + stop_step, -1)
    first = sees & ~joins
    first[1:] |= sees[1:] & (kind[:-1] >= 0) & (kind[1:] != kind[:-1])
    row = np.flatnonzero(first)
    # A segment ends where the next begins or where a row sees nothing.
    ends = np.flatnonzero(np.concatenate((first | ~sees, [True])))
    rows = ends[np.searchsorted(ends, row, side="right")] - row
    step = np.where(rows > 1, kind[np.where(rows > 1, row + 1, row)], 0)
    return np.stack((row, rows, start[row], stop[row], step // 2, step % 2), axis=1)


def _steps(places: IntArray) -> IntArray:
    """How far each row's place is from that of the row before; of the first, farther than a segment's."""
    steps = np.full(len(places), 9)
    np.subtract(places[1:], places[:-1], out=steps[1:])
    return steps


def cover_segments(segments: IntArray, costs: Costs) -> list[Call]:
    """Calls that cover what `find_segments` found: long segments are cut, short neighbours share a masked call."""
    each = [Segment(*fields) for fields in segments.tolist()]
    calls = _cut_or_joined(each, costs)
    if len(calls) > 1 and sum(segment.rows for segment in each) <= _MAX_JOINED_ROWS:
        whole = _call(each, reduce(_union, [segment.columns for segment in each], []))
        if cost_of(whole, costs) < sum(cost_of(call, costs) for call in calls):
            return [whole]
    return calls


def cost_of(call: Call, costs: Costs) -> float:
    """Predicted cost of one call, in pairs."""
    if isinstance(call.mask, Causal):
        return costs.of_causal(len(call.rows))
    if costs.tiled and isinstance(call.mask, Band):
        return costs.of(len(call.rows), call.mask.mean_width(len(call.rows)), masked=True)
    blocks = call.rows.total // len(call.rows)
    return blocks * costs.of(len(call.rows), len(call.columns), masked=call.mask is not None)


def _cut_or_joined(segments: list[Segment], costs: Costs) -> list[Call]:
    calls: list[Call] = []
    group: _Group | None = None
    for segment in segments:
        parts = _cut(segment, costs)
        blocks, rest = _as_blocks(parts)
        if blocks and group is not None:
            calls.append(_call(group.parts, group.runs))
            group = None
        calls += blocks
        for part in rest:
            single = _Group([part], part.rows, [part.columns], part.cost(costs))
            joinable = group is not None and len(parts) == 1 and part.rows < _MAX_JOINED_ROWS
            joined = _joined(group, single, costs) if group is not None and joinable else None
            if joined is None and group is not None:
                calls.append(_call(group.parts, group.runs))
            group = joined or single
    return calls if group is None else [*calls, _call(group.parts, group.runs)]


class Segment(NamedTuple):
    """Rows whose intervals' ends each stay or each move by one token a row: rows `row` to `row + rows`.

    The first sees start to stop; start_step and stop_step are 0 or 1.
    """

    row: int
    rows: int
    start: int
    stop: int
    start_step: int
    stop_step: int

    @property
    def columns(self) -> tuple[int, int]:
        """Columns that some row sees, half open."""
        return self.start, self.stop + self.stop_step * (self.rows - 1)

    @property
    def width(self) -> int:
        """How many columns some row sees."""
        return self.columns[1] - self.columns[0]

    @property
    def is_causal(self) -> bool:
        """Whether row t sees the first t + 1 of as many columns as rows."""
        return (self.start_step, self.stop_step) == (0, 1) and self.stop - self.start == 1

    @property
    def is_rectangle(self) -> bool:
        """Whether every row sees every column."""
        return self.start_step == self.stop_step == 0

    @property
    def band(self) -> Band:
        """What masks it, if it is no rectangle."""
        return Band(self.start_step, self.stop_step, self.stop - self.start)

    def cost(self, costs: Costs) -> float:
        """Predicted cost of the segment as one call."""
        if self.is_causal:
            return costs.of_causal(self.rows)
        if costs.tiled and not self.is_rectangle:
            return costs.of(self.rows, self.band.mean_width(self.rows), masked=True)
        return costs.of(self.rows, self.width, masked=not self.is_rectangle)

    def between(self, low: int, high: int) -> Segment:
        """Its rows low to high."""
        start, stop = self.start + self.start_step * low, self.stop + self.stop_step * low
        return Segment(self.row + low, high - low, start, stop, self.start_step, self.stop_step)


def _cut(segment: Segment, costs: Costs) -> list[Segment]:
    """The segment in about equal parts: few calls and long rows against the corners masked away."""
    rows = segment.rows
    if segment.is_rectangle or rows <= min(_HEIGHTS) or costs.tiled:
        return [segment]
    best, best_cost = [0], segment.cost(costs)
    if not segment.is_causal and _band_bytes(segment, rows) > _MAX_BAND_BYTES:
        best_cost = float("inf")
    for height in (_aligned_height(segment, height) for height in _HEIGHTS if height < rows):
        if height > 2 * min(_HEIGHTS) and _band_bytes(segment, height) > _MAX_BAND_BYTES:
            continue
        cuts = _cuts(segment, height)
        cost = _cost_of_parts(segment, len(cuts), rows / len(cuts), costs)
        if cost < best_cost:
            best, best_cost = cuts, cost
    return [segment.between(low, high) for low, high in pairwise([*best, rows])]


def _aligned_height(segment: Segment, height: int) -> int:
    """The height nearest to `height` that gives parts aligned numbers of columns, where all parts have the same."""
    if segment.start_step != segment.stop_step or height < _ALIGNED:
        return height
    width = segment.stop - segment.start
    return height + (1 - width - height + _ALIGNED // 2) % _ALIGNED - _ALIGNED // 2


def _cuts(segment: Segment, height: int) -> list[int]:
    """Where parts of about `height` rows begin, from 0 on.

    Where one end moves, parts differ in width. Cuts move a little, so that widths are multiples of _ALIGNED:

        # # # . . . .    part 0: rows 0 to 2, width + 2 - 1 columns, width being that of row 0
        # # # # . . .
        -------------    a cut at row n: above it n + width - 1 columns where the stop moves;
        # # # # # . .    below it width - n columns where the start moves
        # # # # # # .
    """
    rows, width = segment.rows, segment.stop - segment.start
    if segment.start_step == segment.stop_step:
        return list(range(0, rows, height))
    count = -(-rows // height)
    if rows < 3 * _ALIGNED * count:
        return [rows * n // count for n in range(count)]
    phase = (1 - width if segment.stop_step else width) % _ALIGNED
    return [0, *(round((rows * n / count - phase) / _ALIGNED) * _ALIGNED + phase for n in range(1, count))]


def _cost_of_parts(segment: Segment, count: int, height: float, costs: Costs) -> float:
    """Cost of `count` parts of `height` rows, from their mean number of columns. Sliding ones share calls."""
    corner = (height - 1) * (0.5 if segment.start_step != segment.stop_step else 1.0)
    seen = segment.stop - segment.start + (segment.stop_step - segment.start_step) * (segment.rows - 1) / 2
    columns = seen + corner
    calls = count if segment.start_step != segment.stop_step else -(-count * columns // _MAX_SLID)
    return count * costs.of(height, columns, masked=True) - (count - calls) * costs.call


def _as_blocks(parts: list[Segment]) -> tuple[list[Call], list[Segment]]:
    """Parts that only slide as few calls, and the parts that are left."""
    first = parts[0]
    if len(parts) < 3 or first.start_step != first.stop_step:
        return [], parts
    equal = len(parts) - (parts[-1].rows != first.rows)
    most = max(_MAX_SLID // first.width, 1)
    calls: list[Call] = []
    for low in range(0, equal, most):
        block, count = _single_call(parts[low]), min(most, equal - low)
        rows, columns = (Blocks(p.start, p.stop, None, count, first.rows) for p in (block.rows, block.columns))
        calls.append(Call(rows, columns, block.mask))
    return calls, parts[equal:]


def _band_bytes(segment: Segment, height: int) -> int:
    """Size of the shared float32 matrix that masks parts of `height` rows of the segment."""
    widest = segment.width if segment.start_step < segment.stop_step else segment.stop - segment.start
    return 4 * height * (widest + height)


@dataclass(slots=True)
class _Group:
    """Neighbours on their way into one call, over column runs that are ascending and disjoint."""

    parts: list[Segment]
    rows: int
    runs: list[tuple[int, int]]
    cost: float


def _joined(group: _Group, single: _Group, costs: Costs) -> _Group | None:
    """Both groups as one call, or None if two are cheaper."""
    rows = group.rows + single.rows
    if rows > _MAX_JOINED_ROWS:
        return None
    runs = _union(group.runs, single.runs[0])
    cost = costs.of(rows, sum(stop - start for start, stop in runs), masked=True)
    if cost >= group.cost + single.cost:
        return None
    return _Group([*group.parts, *single.parts], rows, runs, cost)


def _union(runs: list[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    """Ascending disjoint runs with one more added; touching runs join."""
    start, stop = new
    before = [r for r in runs if r[1] < start]
    after = [r for r in runs if r[0] > stop]
    for low, high in runs[len(before) : len(runs) - len(after)]:
        start, stop = min(start, low), max(stop, high)
    return [*before, (start, stop), *after]


def _call(parts: list[Segment], runs: list[tuple[int, int]]) -> Call:
    """One call over column runs: a band, a triangle or a rectangle if it is one segment, else each row's interval."""
    if len(parts) == 1:
        return _single_call(parts[0])
    columns = np.concatenate([np.arange(*run) for run in runs])
    row = np.concatenate([p.row + np.arange(p.rows) for p in parts])
    start = np.concatenate([p.start + p.start_step * np.arange(p.rows) for p in parts])
    stop = np.concatenate([p.stop + p.stop_step * np.arange(p.rows) for p in parts])
    # Tokens become positions among the picked columns; an interval lies inside one run, so its length stays.
    position = np.searchsorted(columns, start)
    stop += position - start
    if (position == 0).all() and (stop == len(columns)).all():
        return Call(Pick.of(row), Pick.of(columns), None)
    mask = Intervals(*(torch.from_numpy(x.astype(np.int32))[:, None] for x in (position, stop)))
    return Call(Pick.of(row), Pick.of(columns), mask)


def _single_call(segment: Segment) -> Call:
    rows, columns = Pick(segment.row, segment.row + segment.rows), Pick(*segment.columns)
    if segment.is_causal:
        return Call(rows, columns, Causal())
    if segment.is_rectangle:
        return Call(rows, columns, None)
    return Call(rows, columns, segment.band)
