"""A problem -> the first and the last column that each row sees, and how many, without a look at pairs; and its map.

Where they are as many as lie between, they are all: most rows of most masks see one interval. Formulas tell, or the
columns' pieces of the problem turned over, if its mask comes apart that way too, or groups. Where the mask is
comparisons joined by `and`, the pieces' ends are the interval's: then a row of tiles is a few minima and maxima.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import IntArray, Runs
from maskflash.analysis.ways.columns import Pieces, find_pieces
from maskflash.analysis.ways.groups import find_groups
from maskflash.analysis.ways.lines import Seen, find_formula, segments_of, tiles_of

_PIECES_AT_ONCE: Final = 1 << 18  # starts held together
_ROWS_AT_ONCE: Final = 1 << 17  # in the caches


@dataclass(frozen=True, slots=True, eq=False)
class Hulls:
    """What rows see, for each batch row and head of the problem's shape; all (B, H, q_len) int64.

    Attributes:
        start: the first column.
        stop: one past the last; not after start where the row sees nothing.
        count: how many columns.
        largest: a cap on the mask's 64-bit integers.
        group: numbers of rows; those with one number see the same. None where that isn't known.
    """

    start: Tensor
    stop: Tensor
    count: Tensor
    largest: float
    group: Tensor | None = None

    def block_map(self, problem: Problem) -> BlockMap | None:
        """The map of rows that see one interval each; None where those of a line of tiles lie apart.

        A tile is visited if some row of its line sees some of it. Where each row's interval overlaps or touches that of
        the next row that sees anything, all rows together visit one stretch.
        """
        (lines, across), (rows, width) = problem.shape[2:], problem.block_size
        ragged = lines * rows - problem.q_len  # the last line repeats its last row
        start, stop = (
            np.pad(x.numpy(), ((0, 0), (0, 0), (0, ragged)), mode="edge") if ragged else x.numpy()
            for x in (self.start, self.stop)
        )
        start, stop = (x.reshape(-1, rows) for x in (start, stop))
        step = max(1, _ROWS_AT_ONCE // rows)
        found = [
            _ends(start[line : line + step], stop[line : line + step], problem.kv_len)
            for line in range(0, len(start), step)
        ]
        most, *ends = np.concatenate(found, axis=1)
        if most.max() > 1:
            return None
        tiles = tiles_of(Seen(*(x[None] for x in ends)), problem.kv_len, width)
        of_rows = Runs.from_segments(len(most), segments_of(np.arange(len(most)), tiles), problem.device)
        of_columns = _columns_of(tiles, lines, across, problem.device) or of_rows.transposed(lines, across)
        return BlockMap(problem.q_len, problem.kv_len, problem.block_size, problem.shape, of_rows, of_columns)


def _columns_of(tiles: Seen, lines: int, across: int, device: torch.device) -> Runs | None:
    """Runs along columns of tiles, where the ends of rows of tiles never move back; else None.

    A column then belongs to the rows between the last that ends at or before it and the last that starts there.
    """
    units = np.arange(tiles.start.shape[1] // lines)[:, None]
    moved = [(x.reshape(-1, lines) + units * across).reshape(-1) for x in tiles]  # those of a unit after all before
    if any((x[1:] < x[:-1]).any() for x in moved):
        return None
    column = np.arange(len(units) * across)
    start, stop, inner_start, inner_stop = (np.searchsorted(x, column, side="right") for x in moved)
    before = (units * lines).repeat(across)
    seen = Seen(*((x - before)[None] for x in (stop, start, inner_stop, inner_start)))
    return Runs.from_segments(len(column), segments_of(column, seen), device)


def _ends(start: IntArray, stop: IntArray, kv_len: int) -> IntArray:
    """Of lines of rows (lines, rows): how many stretches each sees, and the ends as in Seen; (5, lines).

    In numpy, whose reductions of many short lines are several times faster.
    """
    sees = start < stop
    every = start.max(1), stop.min(1)  # a row that sees nothing leaves nothing between them
    before = start[:, :-1], stop[:, :-1], sees[:, :-1]
    if not sees.all():
        last = np.maximum.accumulate(np.where(sees, np.arange(sees.shape[1]), 0), axis=1)[:, :-1]  # that sees
        line = np.arange(len(sees))[:, None]
        before = start[line, last], stop[line, last], sees[line, last]
        start, stop = np.where(sees, start, kv_len), np.where(sees, stop, 0)
    apart = (start[:, 1:] > before[1]) | (before[0] > stop[:, 1:]) | ~before[2]
    stretches = np.count_nonzero(apart & sees[:, 1:], axis=1) + sees[:, 0]
    return np.stack((stretches, start.min(1), stop.max(1), *every))


def find_hulls(problem: Problem) -> Hulls | None:
    """The hulls of all rows; None where only the pairs tell."""
    formula = find_formula(problem)
    if formula is not None:
        parts = [_hull(start, stop) for start, stop in formula.intervals()]
        start, stop, count = (torch.cat(x).view(1, 1, -1) for x in zip(*parts, strict=True))
        return Hulls(start, stop, count, formula.largest)
    pieces = _pieces_of_rows(problem)
    if pieces is not None:
        return _joined(pieces) or _cut(pieces)
    groups = find_groups(problem)
    return None if groups is None else Hulls(*groups.hulls(), problem.largest(), groups.of_rows())


def find_intervals(problem: Problem) -> Hulls | None:
    """The hulls of rows that see one interval each, the ends of joined comparisons; None where those don't tell."""
    pieces = _pieces_of_rows(problem)
    return None if pieces is None else _joined(pieces)


def evaluated(problem: Problem) -> tuple[Hulls, BlockMap]:
    """The hulls and the map of few rows, from all their pairs.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    (batch, heads, lines, across), (rows, width) = problem.shape, problem.block_size
    q_len, kv_len = problem.q_len, problem.kv_len
    b, h, q, kv = (torch.arange(n) for n in (batch, heads, q_len, kv_len))
    visible = problem.visible(b[:, None, None, None], h[:, None, None], q[:, None], kv)
    bits = visible.expand(batch, heads, q_len, kv_len).numpy()
    rows = min(rows, q_len)  # a tile may be far higher
    some, every = np.zeros((2, batch, heads, lines * rows, across * width), dtype=np.bool_)
    every[:] = True
    some[..., :q_len, :kv_len] = every[..., :q_len, :kv_len] = bits
    tiles = batch, heads, lines, rows, across, width
    kinds = np.any(some.reshape(tiles), axis=(3, 5)).astype(np.int8) + np.all(every.reshape(tiles), axis=(3, 5))
    count = np.count_nonzero(bits, axis=-1)
    stop = np.where(count > 0, kv_len - bits[..., ::-1].argmax(-1), 0)
    block_map = BlockMap.from_kinds(torch.from_numpy(kinds), q_len, kv_len, problem.block_size)
    start, end, seen = (torch.from_numpy(x) for x in (bits.argmax(-1), stop, count))
    return Hulls(start, end, seen, problem.largest()), block_map


def _pieces_of_rows(problem: Problem) -> Pieces | None:
    turned = problem.turned()
    return None if turned is None else find_pieces(turned)


def _joined(pieces: Pieces) -> Hulls | None:
    turned = pieces.problem
    batch, heads = turned.shape[:2]
    step = max(1, _ROWS_AT_ONCE // (batch * heads))
    parts: list[tuple[Tensor, Tensor]] = []
    for row in range(0, turned.kv_len, step):
        ends = pieces.interval(slice(None), slice(None), slice(row, min(row + step, turned.kv_len)))
        if ends is None:
            return None
        parts.append(ends)
    start, stop = parts[0] if len(parts) == 1 else (torch.cat(x, dim=-1) for x in zip(*parts, strict=True))
    return Hulls(start, stop, (stop - start).clamp_(min=0), pieces.largest)


def _cut(pieces: Pieces) -> Hulls:
    turned = pieces.problem
    batch, heads = turned.shape[:2]
    found = torch.empty(3, batch, heads, turned.kv_len, dtype=torch.int64, device=turned.device)
    for b, h, rows in _parts(batch, heads, turned.kv_len, pieces.most):
        start, visible = pieces.cut(b, h, rows)
        stop = torch.cat((start[1:], torch.full_like(start[:1], turned.q_len)))
        found[:, b, h, rows] = torch.stack(_hull(start, torch.where(visible, stop, start)))
    start, stop, count = found
    return Hulls(start, stop, count, pieces.largest)


def _hull(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First column, one past the last, and how many, of disjoint intervals (n, ...), some of them empty."""
    # Interval by interval: reductions over a short first dimension are ten times slower.
    first, last, count = torch.full_like(start[0], torch.iinfo(torch.int64).max), torch.zeros_like(stop[0]), 0
    for a, z in zip(start, stop, strict=True):
        some = a < z
        first = torch.minimum(first, a.masked_fill(~some, torch.iinfo(torch.int64).max))
        last = torch.maximum(last, z * some)
        count = count + (z - a) * some
    return first, last, torch.as_tensor(count)


def _parts(batch: int, heads: int, rows: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Batch rows, heads and rows of at most about _PIECES_AT_ONCE pieces."""
    step = max(1, _PIECES_AT_ONCE // most)
    head_step = max(1, step // rows)
    for b in range(batch):
        for h in range(0, heads, head_step):
            for row in range(0, rows, step):
                yield slice(b, b + 1), slice(h, min(h + head_step, heads)), slice(row, min(row + step, rows))
