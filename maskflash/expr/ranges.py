"""Tables -> bounds of the elements that any range of indices reaches.

Source: range minima by sparse tables (Bender and Farach-Colton, The LCA Problem Revisited, 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from maskflash.expr.intervals import Interval, unknown, widen

_GRANULES = 8192  # range minima are kept over at most this many granules of a table row


@dataclass(slots=True)
class RangeMinima:
    """Minima and maxima of tables over any range of indices, built when first asked for.

    A row of n elements keeps at most 8192 granules at log2 levels; a range is rounded outward to whole granules, so
    the answer is a bound, and exact where granules are single elements or the range is aligned.
    """

    _levels: dict[tuple[int, int, tuple[int, ...]], tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    _extremes: dict[int, tuple[int, int]] = field(default_factory=dict)
    _alive: dict[int, Tensor] = field(default_factory=dict)  # so that no other tensor takes a known one's id

    def extremes(self, table: Tensor) -> tuple[int, int]:
        """Bounds of all values in an integer table: its own in 64 bits, else its dtype's."""
        if table.dtype == torch.int64:
            key = id(self._alive.setdefault(id(table), table))
            if key not in self._extremes:
                low, high = torch.stack(torch.aminmax(table)).tolist() if table.numel() else (0, 0)
                self._extremes[key] = low, high
            return self._extremes[key]
        if table.dtype.is_floating_point or table.dtype == torch.bool:
            return 0, 1  # of no interest: only integers wrap
        info = torch.iinfo(table.dtype)
        return info.min, info.max

    def lookup(self, table: Tensor, indices: list[Interval]) -> tuple[Interval, Tensor | None]:
        """Bounds of the elements any index in the boxes reaches, and where an index may be out of range."""
        if not indices:
            return Interval(table, table), None
        if 0 in table.shape:
            return unknown([Interval(table, table)], table.dtype), torch.ones_like(indices[0].lo, dtype=torch.bool)
        spans: list[Interval] = []
        fault: Tensor | None = None
        for (lo, hi), size in zip((widen(index) for index in indices), table.shape, strict=True):
            lo, hi = lo.to(table.device), hi.to(table.device)
            outside = (lo < -size) | (hi >= size)
            fault = outside if fault is None else fault | outside
            below, across = hi < 0, (lo < 0) & (hi >= 0)  # negative indices wrap; a range across 0 takes everything
            start = torch.where(below, lo + size, torch.where(across, 0, lo))
            stop = torch.where(below, hi + size, torch.where(across, size - 1, hi))
            spans.append(Interval(start.clamp(0, size - 1), stop.clamp(0, size - 1)))
        ranged = [axis for axis, span in enumerate(spans) if not torch.equal(span.lo, span.hi)]
        if not ranged:
            value = table[tuple(span.lo for span in spans)]
            return Interval(value, value), fault
        if all(span.lo.numel() == 1 for span in spans):  # a single box needs no levels
            box = table[tuple(slice(int(span.lo), int(span.hi) + 1) for span in spans)]
            shape = np.broadcast_shapes(*(span.lo.shape for span in spans))
            return Interval(*(x.view(shape) for x in torch.aminmax(box))), fault
        # One axis at a time, the other ranged axes collapsed: each answer is a bound, so the tighter of them is too.
        answers = [self._along(table, axis, [a for a in ranged if a != axis], spans) for axis in ranged]
        lo, hi = answers[0]
        for other in answers[1:]:
            either = table.dtype == torch.bool
            lo = lo | other.lo if either else torch.maximum(lo, other.lo)
            hi = hi & other.hi if either else torch.minimum(hi, other.hi)
        return Interval(lo, hi), fault

    def _along(self, table: Tensor, axis: int, collapsed: list[int], spans: list[Interval]) -> Interval:
        minima, maxima, granule = self._levels_of(table, axis, tuple(collapsed))
        points = [span.lo for a, span in enumerate(spans) if a != axis and a not in collapsed]
        start, stop = (bound // granule for bound in spans[axis])
        length = stop - start + 1
        level = torch.log2(length.to(torch.float64)).to(torch.int64)  # exact below 2**52
        second = stop + 1 - (torch.ones_like(level) << level)
        low = [minima[(level, *points, place)] for place in (start, second)]
        high = [maxima[(level, *points, place)] for place in (start, second)]
        if table.dtype == torch.bool:
            return Interval(low[0] & low[1], high[0] | high[1])
        return Interval(torch.minimum(*low), torch.maximum(*high))

    def _levels_of(self, table: Tensor, axis: int, collapsed: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
        """(levels, kept axes..., granules) minima and maxima: level k covers 2**k granules from each start."""
        key = (id(self._alive.setdefault(id(table), table)), axis, collapsed)
        if key not in self._levels:
            rows = table.movedim(axis, -1)
            moved = [a - (a > axis) for a in collapsed]
            low, high = (rows.amin(moved), rows.amax(moved)) if moved else (rows, rows)
            size = table.shape[axis]
            granule = max(1, 1 << (size // _GRANULES).bit_length()) if size > _GRANULES else 1
            low, high = _granulate(low, granule, torch.amin), _granulate(high, granule, torch.amax)
            self._levels[key] = (_doubling(low, torch.minimum), _doubling(high, torch.maximum), granule)
        return self._levels[key]


class Unread(RangeMinima):
    """What is known of tables by their shapes and dtypes alone: nothing of them is read, which a GPU is waited for."""

    def extremes(self, table: Tensor) -> tuple[int, int]:
        """What the dtype holds."""
        if table.dtype.is_floating_point or table.dtype == torch.bool:
            return 0, 1
        info = torch.iinfo(table.dtype)
        return info.min, info.max

    def lookup(self, table: Tensor, indices: list[Interval]) -> tuple[Interval, Tensor | None]:
        """What the dtype holds, and where an index may be out of range."""
        if table.dtype.is_floating_point:
            ends = [math.nan, math.nan]
        else:
            ends = [bool(x) if table.dtype == torch.bool else x for x in self.extremes(table)]
        low, high = (torch.tensor(end, dtype=table.dtype) for end in ends)
        fault: Tensor | None = None
        for (lo, hi), size in zip((widen(index) for index in indices), table.shape, strict=True):
            outside = (lo < -size) | (hi >= size)
            fault = outside if fault is None else fault | outside
        return Interval(low, high), fault


def _granulate(rows: Tensor, granule: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Minima (or maxima) of each `granule` elements; the last element fills up the last granule."""
    if granule == 1:
        return rows
    padding = -rows.shape[-1] % granule
    filled = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], padding)], -1)
    return reduce(filled.unflatten(-1, (-1, granule)), -1)


def _doubling(rows: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    levels = [rows]
    width = 1
    while 2 * width <= rows.shape[-1]:
        last = levels[-1]
        shifted = torch.cat([last[..., width:], last[..., -1:].expand(*last.shape[:-1], width)], -1)
        levels.append(pick(last, shifted))
        width *= 2
    return torch.stack(levels)
