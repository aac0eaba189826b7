"""A block map -> the kinds of at most so many cells, each a group of tiles: what every picture of a map is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL, SKIP, IntArray, Runs
from maskflash.errors import ArgumentError
from maskflash.ground import arguments


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The kinds of groups of tiles.

    Attributes:
        kinds: (rows, columns) int8, 0 skip, 1 partial, 2 full.
        rows: (rows + 1,) where cells begin and end, in tokens.
        columns: (columns + 1,) likewise.
        side: tiles along each side of a cell; the last ones may have fewer.
    """

    kinds: NDArray[np.int8]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    side: int

    def corners(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Of the cells that are True in (rows, columns): (n, 4, 2) keys and queries."""
        i, j = np.nonzero(chosen)
        left, right, top, bottom = self.columns[j], self.columns[j + 1], self.rows[i], self.rows[i + 1]
        across, down = np.stack((left, right, right, left), axis=1), np.stack((top, top, bottom, bottom), axis=1)
        return np.stack((across, down), axis=2)


def cells(block_map: BlockMap, most: int, batch_row: int = 0, head: int = 0) -> Cells:
    """The cells of one batch row and head.

    A cell is full if all of its tiles are, skip if all are, else partial: what it would be as a tile.

    Args:
        block_map: the map.
        most: cells along either side, at least 1.
        batch_row: which batch row; a map with one serves all.
        head: which head, likewise.

    Raises:
        ArgumentError: the map has no such batch row or head.
    """
    batch, heads, n_q, n_kv = block_map.shape
    unit = index("batch_row", batch_row, batch) * heads + index("head", head, heads)
    side = max(1, math.ceil(max(n_q, n_kv) / most))
    kinds = _kinds(block_map.rows, unit, (n_q, n_kv), side)
    tall, wide = (side * size for size in block_map.block_size)
    edges = _edges(len(kinds), tall, block_map.q_len), _edges(kinds.shape[1], wide, block_map.kv_len)
    return Cells(kinds, *edges, side)


def _kinds(runs: Runs, unit: int, tiles: tuple[int, int], side: int) -> NDArray[np.int8]:
    """The kinds of squares of tiles, which are counted from the ends of runs: the cost follows runs and cells.

    Args:
        runs: by rows of tiles.
        unit: which batch row and head.
        tiles: rows and columns of tiles of each unit.
        side: tiles along each side of a square; the last ones may have fewer.
    """
    lines = tiles[0]
    offsets = runs.offsets[unit * lines : (unit + 1) * lines + 1].cpu().numpy().astype(np.int64)
    held = slice(int(offsets[0]), int(offsets[-1]))
    start, stop, full = (x[held].cpu().numpy() for x in (runs.start, runs.stop, runs.full))
    band = np.repeat(np.arange(lines) // side, np.diff(offsets))
    tall, wide = (np.minimum(side, n - np.arange(0, n, side)) for n in tiles)
    shape = len(tall), len(wide)
    seen, filled = (
        _before(stop[of], band[of], shape, side) - _before(start[of], band[of], shape, side)
        for of in (slice(None), full)
    )
    kinds = np.where(filled == np.outer(tall, wide), FULL, np.where(seen == 0, SKIP, PARTIAL))
    return kinds.astype(np.int8)


def _before(ends: NDArray[np.int32], band: IntArray, shape: tuple[int, int], side: int) -> IntArray:
    """How many tiles of each cell lie before the ends that are in its band: (rows, columns)."""
    height, width = shape
    before = np.zeros(height * (width + 1))
    place = band * (width + 1) + ends // side
    # An end has `side` tiles before it in each earlier cell of its band, and the rest in its own.
    before += side * np.bincount(place, minlength=len(before))
    total = before.reshape(height, width + 1)
    total = total[:, ::-1].cumsum(1)[:, ::-1] - total
    total += np.bincount(place, weights=ends % side, minlength=len(before)).reshape(height, width + 1)
    counted: IntArray = total[:, :width].astype(np.int64)
    return counted


def _edges(count: int, tokens: int, length: int) -> NDArray[np.int64]:
    return np.minimum(np.arange(count + 1) * tokens, length)


def index(name: str, value: int, size: int) -> int:
    """A place along a dimension; one of size 1 serves all."""
    place = arguments.integer("visualize", name, value)
    if size == 1:
        return 0
    if place >= size:
        raise ArgumentError(f"visualize: {name} is {place}, expected less than the map's {size}")
    return place
