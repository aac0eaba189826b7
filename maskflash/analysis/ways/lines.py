"""A mask that compares only q, kv and q - kv with numbers -> its runs of tiles and its rows' intervals by formulas.

    columns 0  1 | 2  3  4  5  6     causal() & (global_tokens(2) | sliding_window(2)): the line | cuts columns at 2,
    row 4   ■  ■ | ■  ■  ■           the diagonals q - kv = 0 and q - kv = 2 cut the rest. On each area between cuts
    row 5   ■  ■ | ·  ■  ■  ■        all pairs are alike, so one pair of it is evaluated. Row q sees [0, 2) of the
    row 6   ■  ■ | ·  ·  ■  ■  ■     first band of columns and [q - 2, q + 1) of the second.

A few rows, columns and diagonals cut the plane into areas on which the mask is constant. What a row sees in a band of
columns is then an interval for each pair of diagonals, with ends that move with the row. No pair, tile or look-up costs
anything beyond, and a row of tiles costs a few additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows
from maskflash.analysis.problem import LARGEST_SUM, Problem
from maskflash.analysis.runs import IntArray, Runs, Stretches, TileArray
from maskflash.analysis.ways.cuts import find_cuts

_T = TypeVar("_T")

_MOST_CELLS: Final = 4096  # one pair of each is evaluated
_LINES_AT_ONCE: Final = 8192  # whose numbers stay in the caches, and in memory that the process has already
_TOKENS_AT_ONCE: Final = 1 << 17  # likewise


class Diagonals(NamedTuple):
    """Lines see, of columns left to right (half open), those with low <= line - column <= high."""

    left: int
    right: int
    low: int
    high: int


_NOTHING: Final = Diagonals(0, 0, 0, 0)

Bands = dict[tuple[int, int], list[Diagonals]]
"""What lines (half open) see: strips in ascending order, disjoint; those of one band of columns never touch."""


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """What rows see of columns, and what columns see of rows.

    Attributes:
        problem: what was asked.
        rows: bands of rows, q counted from the call's first row.
        columns: bands of columns; a strip's "column" is then a row.
    """

    problem: Problem
    rows: Bands
    columns: Bands

    def block_map(self) -> BlockMap:
        """The map, at a cost of a few operations per row and column of tiles."""
        problem = self.problem
        q, kv = (problem.q_len, problem.block_size[0]), (problem.kv_len, problem.block_size[1])
        rows, columns = (_runs(*args, problem.device) for args in ((self.rows, *q, *kv), (self.columns, *kv, *q)))
        return problem.block_map(rows, columns)


def find_formula(problem: Problem) -> Formula | None:
    """Cut the plane of a problem; None where its mask compares anything else, or too often."""
    q_offset, kv_offset = problem.q_offset, problem.kv_offset
    if 0 in problem.shape or isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return None
    cuts = find_cuts(problem.expr, problem.inputs.params)
    if cuts is None or problem.largest() >= LARGEST_SUM:
        return None
    q_len, kv_len = problem.q_len, problem.kv_len
    rows = _between([q - q_offset for q in cuts.rows], 0, q_len)
    columns = _between([kv - kv_offset for kv in cuts.columns], 0, kv_len)
    diagonals = _between([d - q_offset + kv_offset for d in cuts.diagonals], 1 - kv_len, q_len)
    if len(rows) * len(columns) * len(diagonals) > _MOST_CELLS:
        return None
    cells: dict[tuple[int, int, int], tuple[int, int]] = {}  # a pair of each that has any
    for r, (top, bottom) in enumerate(rows):
        for c, (left, right) in enumerate(columns):
            for d, (low, high) in enumerate(diagonals):
                distance = max(low, top - right + 1)
                if distance < min(high, bottom - left):
                    kv = max(left, top - distance)
                    cells[r, c, d] = kv + distance, kv
    q, kv = torch.tensor(list(cells.values()), device=problem.device).T
    zero = torch.zeros((), dtype=torch.int64, device=problem.device)
    bits = problem.visible(zero, zero, q, kv).expand(len(cells)).tolist()
    seen = {cell for cell, bit in zip(cells, bits, strict=True) if bit}
    seen_by = [
        [_joined([x for d, x in enumerate(diagonals) if (r, c, d) in seen]) for c in range(len(columns))]
        for r in range(len(rows))
    ]
    of_rows = [
        [
            Diagonals(*column, low, high)
            for column, distances in _merged(columns, by_row)
            for low, high in reversed(distances)
        ]
        for by_row in seen_by
    ]
    of_columns = [
        [Diagonals(*row, -high, -low) for row, distances in _merged(rows, by_column) for low, high in distances]
        for by_column in zip(*seen_by, strict=True)
    ]
    return Formula(problem, dict(_merged(rows, of_rows)), dict(_merged(columns, of_columns)))


def rows_of(bands: Bands) -> Rows:
    """What each of the lines that these bands are of sees."""
    return Rows.joined(
        Rows.from_pieces(torch.from_numpy(ends.start)[:, None, None], torch.from_numpy(ends.stop)[:, None, None])
        for (top, bottom), strips in bands.items()
        for low in range(top, bottom, _TOKENS_AT_ONCE)
        for line in [np.arange(low, min(low + _TOKENS_AT_ONCE, bottom))]
        for ends in [_ends(strips or [_NOTHING], line, line)]
    )


def _between(cuts: list[int], start: int, stop: int) -> list[tuple[int, int]]:
    """What cuts divide start to stop into, half open."""
    return list(pairwise([start, *sorted(cut for cut in cuts if start < cut < stop), stop]))


def _merged(bands: list[tuple[int, int]], values: Iterable[_T]) -> Iterator[tuple[tuple[int, int], _T]]:
    """Neighbouring bands of one value as one."""
    for value, same in groupby(zip(bands, values, strict=True), key=itemgetter(1)):
        alike = [band for band, _ in same]
        yield (alike[0][0], alike[-1][1]), value


def _joined(strips: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open intervals in ascending order, those that touch as one, with both ends included."""
    joined: list[tuple[int, int]] = []
    for low, high in strips:
        if joined and joined[-1][1] == low - 1:
            joined[-1] = joined[-1][0], high - 1
        else:
            joined.append((low, high - 1))
    return joined


class Ends(NamedTuple):
    """What groups of lines see, interval by interval: all (strips, groups), empty where start is not below stop.

    In tokens int64, in tiles int32.

    Attributes:
        start: first column that some line of the group sees.
        stop: one past the last.
        inner_start: first column that all of them see.
        inner_stop: one past the last.
    """

    start: TileArray | IntArray
    stop: TileArray | IntArray
    inner_start: TileArray | IntArray
    inner_stop: TileArray | IntArray


def _ends(strips: list[Diagonals], first: IntArray, last: IntArray) -> Ends:
    """What lines first to last (groups,) of one band see. Strips that all lines see to their common edge are joined."""
    left, right, low, high = np.array(strips, dtype=np.int64).reshape(-1, 4).T[:, :, None]
    start, stop = np.maximum(left, first - high), np.minimum(right, last - low + 1)
    inner_start, inner_stop = np.maximum(left, last - high), np.minimum(right, first - low + 1)
    for place in range(1, len(strips)):
        before = place - 1
        joins = (inner_start[place] < inner_stop[place]) & (inner_start[before] < inner_stop[before])
        joins &= inner_start[place] == inner_stop[before]
        for starts, stops in ((start, stop), (inner_start, inner_stop)):
            starts[place] = np.where(joins, starts[before], starts[place])
            stops[before] = np.where(joins, starts[before], stops[before])
    return Ends(start, stop, inner_start, inner_stop)


def _runs(bands: Bands, length: int, block: int, across: int, width: int, device: torch.device) -> Runs:
    """Runs of tiles: `length` tokens in lines of `block` over `across` tokens in tiles of `width`."""
    lines = -(-length // block)
    parts = {int(torn.line[0]): torn for torn in _torn(bands, length, block, across, width)}
    for (top, bottom), strips in bands.items():
        # Whole lines of tiles; the last line may be ragged.
        begin, end = -(-top // block), lines if bottom == length else bottom // block
        for low in range(begin, end, _LINES_AT_ONCE):
            line = np.arange(low, min(low + _LINES_AT_ONCE, end), dtype=np.int32)
            first = line * np.int64(block)
            seen = _ends(strips, first, np.minimum(first + block, length) - 1)
            parts[low] = stretches_of(line, tiles_of(seen, across, width)).kept()
    ordered = (parts[line] for line in sorted(parts))
    stretches = Stretches(*(np.concatenate(column) for column in zip(*ordered, strict=True)))
    return Runs.from_stretches(lines, stretches, device)


def tiles_of(seen: Ends, across: int, width: int) -> Ends:
    """The same in tiles: start and stop of those to visit, no tile twice, and of those that are full."""
    some = seen.start < seen.stop
    stop = np.where(some, -(-seen.stop // width), 0).astype(np.int32)
    start = np.where(some, seen.start // width, stop).astype(np.int32)
    for place in range(1, len(start)):
        start[place] = np.maximum(start[place], stop[:place].max(0))
    inner_start = -(-seen.inner_start // width)
    inner_stop = np.where(seen.inner_stop == across, -(-across // width), seen.inner_stop // width)
    return Ends(start, stop, inner_start.astype(np.int32), inner_stop.astype(np.int32))


def stretches_of(line: TileArray | IntArray, tiles: Ends) -> Stretches:
    """The stretches of lines of tiles that belong to one band, in order."""
    full = tiles.inner_start < tiles.inner_stop
    before, after = (np.where(full, end, tiles.start) for end in (tiles.inner_start, tiles.inner_stop))
    stretches = [
        stretch
        for start, inner, outer, stop in zip(tiles.start, before, after, tiles.stop, strict=True)
        for stretch in ((start, inner, False), (inner, outer, True), (outer, stop, False))
        if (stretch[0] < stretch[1]).any()
    ]
    starts, stops = np.empty((2, len(line), len(stretches)), dtype=tiles.start.dtype)
    kinds = np.array([kind for _, _, kind in stretches], dtype=np.bool_)
    for place, (start, stop, _) in enumerate(stretches):
        starts[:, place], stops[:, place] = start, stop
    return Stretches(line.repeat(len(kinds)), starts.reshape(-1), stops.reshape(-1), np.tile(kinds, len(line)))


def _torn(bands: Bands, length: int, block: int, across: int, width: int) -> Iterator[Stretches]:
    """The stretches of lines of tiles that belong to several bands: a few, each drawn on a line of its own."""
    n = -(-across // width)
    for line in sorted({edge // block for edge, _ in bands if edge % block}):
        some, every = np.zeros(n, dtype=np.bool_), np.ones(n, dtype=np.bool_)
        for (top, bottom), strips in bands.items():
            first, last = max(top, line * block), min(bottom, line * block + block, length) - 1
            if first <= last:
                seen = _ends(strips, np.array([first]), np.array([last]))
                inner = np.zeros(n, dtype=np.bool_)
                for _, start, stop, full in zip(
                    *stretches_of(np.array([line]), tiles_of(seen, across, width)), strict=True
                ):
                    some[start:stop] = True
                    inner[start:stop] |= full
                every &= inner
        edges = np.flatnonzero(np.diff(some.view(np.int8) + every, prepend=-1, append=-1))
        start, stop = edges[:-1], edges[1:]
        yield Stretches(np.full_like(start, line), start, np.where(some[start], stop, start), every[start])
