"""Pieces of columns -> the runs of their tiles, without a lattice: cost and memory follow columns and boundary.

    one column, visible from row 2 up to row 9, in tiles of 4 rows

    tile                    0    1    2    3
    ray from row 2          2    4    4    4      its own tile from there on, all of every later tile
    ray from row 9          0    0   -3   -4      hidden again
    visible                 2    4    1    0      partial, full, partial, skip

A tile's kind is how many of its pairs are visible: none, all, or some. Along a column of tiles that number is a sum of
rays, one from every row at which one of its columns turns visible or hidden.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL, SKIP, Runs
from maskflash.analysis.ways.columns import Pieces

_SHARE_BITS: Final = 40  # of the rows that rays share, summed over the columns of a tile


def cover(pieces: Pieces) -> BlockMap:
    """The block map of a problem whose columns are cut into pieces."""
    problem = pieces.problem
    n_q, n_kv = problem.shape[2:]
    found = [_column_runs(pieces, *part) for part in pieces.parts(problem.block_size[1])]
    count, start, stop, full = (torch.cat(parts) for parts in zip(*found, strict=True))
    offsets = torch.zeros(len(count) + 1, dtype=torch.int32, device=problem.device)
    offsets[1:] = count.cumsum(0)
    columns = Runs(offsets, start.int(), stop.int(), full)
    return problem.block_map(columns.transposed(n_kv, n_q), columns)


def _column_runs(pieces: Pieces, b: slice, h: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of some columns of tiles: how many each has, and the start, stop and fullness of each."""
    rows, width = pieces.problem.block_size
    n_q, tiles = pieces.problem.shape[2], -(-(columns.stop - columns.start) // width)
    start, visible = pieces.cut(b, h, columns)
    unit = torch.arange(start.shape[1] * start.shape[2], device=start.device).view(start.shape[1:3])
    place = torch.arange(columns.stop - columns.start, device=start.device)
    line, tile, change = _rays(start, visible, unit[..., None] * tiles + place // width, rows, n_q)

    # The sum of a line's rays from each change to the next. Rays go on after the last row, and so does a full tile.
    total = change.cumsum(0)
    first = torch.ones(line.shape, dtype=torch.bool, device=line.device)
    first[1:] = line[1:] != line[:-1]
    before = (total - change)[first]
    total = total - before[first.long().cumsum(0) - 1] if len(line) else total
    pairs = (len(place) - line % tiles * width).clamp(max=width) * rows
    kind = torch.where(total == 0, SKIP, torch.where(total == pairs, FULL, PARTIAL))
    stop = torch.full_like(tile, n_q)
    stop[:-1] = torch.where(first[1:], n_q, tile[1:])

    # Neighbours of one kind are one run.
    begins = first.clone()
    begins[1:] |= kind[1:] != kind[:-1]
    ends = torch.ones_like(begins)
    ends[:-1] = begins[1:]
    heads, lasts = begins.nonzero()[:, 0], ends.nonzero()[:, 0]
    kept = kind[heads] != SKIP
    heads, lasts = heads[kept], lasts[kept]
    count = torch.bincount(line[heads], minlength=unit.numel() * tiles)
    return count, tile[heads], stop[lasts], kind[heads] == FULL


def _rays(start: Tensor, visible: Tensor, line: Tensor, rows: int, n_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the number of visible pairs of a line's tiles changes, and by how much: line, tile, change; in order.

    A ray from row s adds, to its own tile, the tile's rows from s on; to every later tile, all of its rows.
    """
    # In place wherever it can be: fresh memory costs as much as the arithmetic.
    weight = visible.to(torch.int8)
    weight[1:] -= visible[:-1].view(torch.int8)
    keys = start >> rows.bit_length() - 1 if rows & (rows - 1) == 0 else start // rows  # a shift is ten times faster
    # Rays and their rows in their own tile are summed in one number, the rays above _SHARE_BITS: two numbers take a map
    # of 131,072 columns 1.1 to 2 times as long.
    rays = torch.add(rows + (1 << _SHARE_BITS), keys, alpha=rows).sub_(start).mul_(weight)
    keys, rays = _merged(keys.add_(line * (n_q + 2)).flatten(), rays.flatten())
    weight = (rays + (1 << _SHARE_BITS - 1)) >> _SHARE_BITS
    share = rays - (weight << _SHARE_BITS)
    keys, order = torch.cat((keys, keys + 1)).sort()
    keys, change = _merged(keys, torch.cat((share, weight * rows - share))[order])
    line, tile = keys // (n_q + 2), keys % (n_q + 2)
    inside = ((tile < n_q) & (change != 0)).nonzero()[:, 0]
    return line[inside], tile[inside], change[inside]


def _merged(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours that share a key as one, their values added."""
    last = torch.ones(keys.shape, dtype=torch.bool, device=keys.device)
    torch.ne(keys[1:], keys[:-1], out=last[:-1])
    last = last.nonzero()[:, 0]
    sums = values.cumsum(0)[last]
    sums[1:] = sums.diff()
    return keys[last], sums
