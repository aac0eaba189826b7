"""A BlockMap, its mask and what rows are known to see -> exact geometry: what each row sees, to the token.

Most masks show every row one interval of columns, and RowSpans has its ends. A line of tiles in which some row sees
anything else is handed over: by its rows' intervals where these are known, or as a Strip, with its exact bits.

    # # # . . . . .    one interval                # # . . # # # .    several: taken as intervals,
    . # # # . . . .    in each row: spans          # # . . . # # #    or as a strip of bits

Only partial tiles are evaluated, a bounded number at a time, and only where nothing tells; no strip outlives its turn:
memory follows what the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows, in_lines
from maskflash.analysis.runs import BoolArray, IntArray

Evaluate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""evaluate(b, h, q, kv): int64 index tensors that broadcast together -> bool of their common shape."""

TakeLines = Callable[[IntArray, IntArray, IntArray], BoolArray]
"""take_lines(lines, start, stop): some lines, and their rows' intervals (n, lines, bq) -> which of them are taken."""

_CHUNK_PAIRS: Final = 1 << 20  # pairs evaluated at once: index arithmetic stays near the caches, memory bounded


@dataclass(frozen=True, slots=True, eq=False)
class RowSpans:
    """The interval that each row sees, for all rows of one (b, h) of the mask.

    Attributes:
        start: (Sq,) first visible column.
        stop: (Sq,) one past the last visible column; equal to start where the row sees nothing or is in a strip.
    """

    start: IntArray
    stop: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """The exact bits of one row of tiles that has a row with holes in what it sees.

    Attributes:
        top: first row, in tokens.
        columns: (columns,) ascending tokens: those of tiles that are visited, and one hidden where these lie apart.
        bits: (rows, columns) bool.
    """

    top: int
    columns: IntArray
    bits: BoolArray


@dataclass(frozen=True, slots=True, eq=False)
class _Lines:
    """The rows of tiles of one (b, h) of a map, as numpy."""

    block_map: BlockMap
    b: int
    h: int
    run_offsets: IntArray
    run_start: IntArray
    run_stop: IntArray
    run_full: BoolArray
    tile_offsets: IntArray  # line -> its partial tiles
    tile_column: IntArray


def row_spans(
    block_map: BlockMap,
    evaluate: Evaluate,
    b: int,
    h: int,
    take_strip: Callable[[Strip], None],
    take_lines: TakeLines | None = None,
    rows: Rows | None = None,
) -> RowSpans:
    """Finds what each row of one batch row and head of the map sees.

    Args:
        block_map: the tiles.
        evaluate: the mask itself, called only on pairs inside partial tiles and inside the lengths.
        b: batch row of the map.
        h: head of the map.
        take_strip: called with each strip, from the top down.
        take_lines: called before it with lines of tiles whose rows see several known intervals; says which it takes.
        rows: what all rows see, where that is known without evaluation.

    Returns:
        The interval of every row that is in no strip, nor in a line that was taken.
    """
    if rows is None:
        lines = _lines(block_map, b, h)
        start, stop, count = _full_hulls(lines)
        for low, high in _groups(lines):
            bits = _evaluate_tiles(lines, evaluate, low, high)
            _add_partial_tiles(lines, bits, low, high, start[low:high], stop[low:high], count[low:high])
            for line in (low + np.flatnonzero(_holes(start[low:high], stop[low:high], count[low:high]))).tolist():
                _hand_over(lines, bits, low, line, take_strip)
                count[line] = 0
    else:
        rows = rows.unit(b, h)
        size = block_map.shape[2], block_map.block_size[0]
        start, stop, count = (in_lines(x, *size) for x in (*rows.hulls, rows.count))
        apart = np.flatnonzero(_holes(start, stop, count))
        if take_lines is not None and len(rows.start) > 1:
            told = np.logical_and.reduce(in_lines(rows.told, *size)[apart], axis=1)
            first, last = (in_lines(x, *size)[:, apart[told]] for x in (rows.start, rows.stop))
            told[told] = take_lines(apart[told], first, last)
            count[apart[told]] = 0
            apart = apart[~told]
        if len(apart):
            lines = _lines(block_map, b, h)
            alike = in_lines(torch.arange(block_map.q_len) if rows.group is None else rows.group, *size)
        for line in apart.tolist():
            first, place = _distinct(alike[line])
            bits = _evaluate_tiles(lines, evaluate, line, line + 1, first)[:, place]
            _hand_over(lines, bits, line, line, take_strip)
            count[line] = 0
    empty = count == 0
    start[empty] = stop[empty] = 0
    tokens = slice(0, block_map.q_len)
    return RowSpans(start.reshape(-1)[tokens], stop.reshape(-1)[tokens])


def _hand_over(lines: _Lines, bits: BoolArray, low: int, line: int, take_strip: Callable[[Strip], None]) -> None:
    """A line as a strip, from the bits of partial tiles from line `low` on."""
    within = slice(*(lines.tile_offsets[line : line + 2] - lines.tile_offsets[low]))
    take_strip(_strip(lines, bits[within], line))


def _holes(start: IntArray, stop: IntArray, count: IntArray) -> BoolArray:
    """Lines (n, bq) in which some row sees less than lies between its first column and its last."""
    holes: BoolArray = (count != np.maximum(stop - start, 0)).any(axis=1)
    return holes


def _lines(block_map: BlockMap, b: int, h: int) -> _Lines:
    rows = block_map.rows
    _, heads, n_q, _ = block_map.shape
    first = (b * heads + h) * n_q
    offsets = rows.offsets[first : first + n_q + 1].cpu().numpy().astype(np.int64)
    runs = slice(int(offsets[0]), int(offsets[-1]))
    start, stop = (x[runs].cpu().numpy().astype(np.int64) for x in (rows.start, rows.stop))
    full = rows.full[runs].cpu().numpy()
    offsets -= offsets[0]
    length = np.where(full, 0, stop - start)
    tiles_before = np.concatenate(([0], length.cumsum()))
    return _Lines(
        block_map=block_map,
        b=b,
        h=h,
        run_offsets=offsets,
        run_start=start,
        run_stop=stop,
        run_full=full,
        tile_offsets=tiles_before[offsets],
        tile_column=np.repeat(start - tiles_before[:-1], length) + np.arange(tiles_before[-1]),
    )


def _full_hulls(lines: _Lines) -> tuple[IntArray, IntArray, IntArray]:
    """Start, stop and count of each row, from the full tiles alone: three (nQ, bq)."""
    n_q = lines.block_map.shape[2]
    bq, bkv = lines.block_map.block_size
    kv_len, full = lines.block_map.kv_len, lines.run_full
    owner = np.repeat(np.arange(n_q), np.diff(lines.run_offsets))[full]
    left = lines.run_start[full] * bkv
    right = np.minimum(lines.run_stop[full] * bkv, kv_len)
    start = np.full(n_q, kv_len, dtype=np.int64)
    stop = np.zeros(n_q, dtype=np.int64)
    count = np.zeros(n_q, dtype=np.int64)
    np.minimum.at(start, owner, left)
    np.maximum.at(stop, owner, right)
    np.add.at(count, owner, right - left)
    start, stop, count = (np.repeat(x[:, None], bq, axis=1) for x in (start, stop, count))
    return start, stop, count


def _groups(lines: _Lines) -> Iterator[tuple[int, int]]:
    """Cuts the lines into groups of at most about _CHUNK_PAIRS pairs in partial tiles, or one line."""
    bq, bkv = lines.block_map.block_size
    tiles = max(1, _CHUNK_PAIRS // (bq * bkv))
    low, n_q = 0, lines.block_map.shape[2]
    while low < n_q:
        end = int(np.searchsorted(lines.tile_offsets, lines.tile_offsets[low] + tiles, side="right")) - 1
        end = max(end, low + 1)
        yield low, end
        low = end


def _distinct(numbers: IntArray) -> tuple[IntArray, IntArray]:
    """Where each number first occurs, and for each place which of these it is."""
    ordered = np.sort(numbers)
    values = ordered[np.append(True, ordered[1:] != ordered[:-1])]
    place = np.searchsorted(values, numbers)
    first = np.empty_like(values)
    first[place[::-1]] = np.arange(len(numbers))[::-1]
    return first, place


def _evaluate_tiles(lines: _Lines, evaluate: Evaluate, low: int, high: int, rows: IntArray | None = None) -> BoolArray:
    """Bits of the partial tiles of the lines low to high, or of some of their rows: (tiles, rows, bkv).

    They are False beyond kv_len.
    """
    block_map = lines.block_map
    bq, bkv = block_map.block_size
    rows = np.arange(bq) if rows is None else rows
    column = lines.tile_column[lines.tile_offsets[low] : lines.tile_offsets[high]]
    if len(column) == 0:
        return np.zeros((0, len(rows), bkv), dtype=np.bool_)
    line = np.repeat(np.arange(low, high), np.diff(lines.tile_offsets[low : high + 1]))
    # A ragged tile's outside repeats its last row and column: the mask never sees an index out of range.
    q = np.minimum(line[:, None] * bq + rows, block_map.q_len - 1)
    kv = column[:, None] * bkv + np.arange(bkv)
    inside = kv < block_map.kv_len
    visible = evaluate(
        torch.tensor(lines.b),
        torch.tensor(lines.h),
        torch.from_numpy(q)[:, :, None],
        torch.from_numpy(np.minimum(kv, block_map.kv_len - 1))[:, None, :],
    )
    bits: BoolArray = visible.expand(len(line), len(rows), bkv).numpy()
    return bits if inside.all() else bits & inside[:, None, :]


def _add_partial_tiles(
    lines: _Lines,
    bits: BoolArray,
    low: int,
    high: int,
    start: IntArray,
    stop: IntArray,
    count: IntArray,
) -> None:
    """Widens, in place, the hulls (lines, bq) of the lines low to high by their partial tiles' bits."""
    bkv, kv_len = lines.block_map.block_size[1], lines.block_map.kv_len
    offsets = lines.tile_offsets[low : high + 1] - lines.tile_offsets[low]
    left = (lines.tile_column[lines.tile_offsets[low] : lines.tile_offsets[high]] * bkv)[:, None]
    tile_count = np.count_nonzero(bits, axis=2)
    some = tile_count > 0
    tile_start = np.where(some, left + bits.argmax(axis=2), kv_len)
    tile_stop = np.where(some, left + bkv - bits[:, :, ::-1].argmax(axis=2), 0)
    owners = np.flatnonzero(np.diff(offsets))  # reduceat wants no empty group
    if len(owners) == 0:
        return
    begins = offsets[owners]
    start[owners] = np.minimum(start[owners], np.minimum.reduceat(tile_start, begins, axis=0))
    stop[owners] = np.maximum(stop[owners], np.maximum.reduceat(tile_stop, begins, axis=0))
    count[owners] += np.add.reduceat(tile_count, begins, axis=0)


def _strip(lines: _Lines, tile_bits: BoolArray, line: int) -> Strip:
    """The bits of one row of tiles, of the tiles that it visits."""
    block_map = lines.block_map
    bq, bkv = block_map.block_size
    runs = slice(lines.run_offsets[line], lines.run_offsets[line + 1])
    start, stop, full = lines.run_start[runs], lines.run_stop[runs], lines.run_full[runs]
    length = (stop - start) * bkv
    width = length + np.append(start[1:] > stop[:-1], False)  # and a hidden one where the next run lies apart
    left = np.cumsum(width) - width
    bits = np.zeros((bq, int(width.sum())), dtype=np.bool_)
    tile = 0
    for at, columns, filled in zip(left.tolist(), length.tolist(), full.tolist(), strict=True):
        if filled:
            bits[:, at : at + columns] = True
        else:
            # (tiles, bq, bkv) side by side
            n = columns // bkv
            bits[:, at : at + columns] = tile_bits[tile : tile + n].transpose(1, 0, 2).reshape(bq, -1)
            tile += n
    columns = np.repeat(start * bkv - left, width) + np.arange(bits.shape[1])
    inside = np.searchsorted(columns, block_map.kv_len)  # the last tile may be ragged
    top = line * bq
    return Strip(top, columns[:inside], bits[: block_map.q_len - top, :inside])
