"""A block map -> the kinds of at most so many cells, each a group of tiles: what every picture of a map is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskflash import arguments
from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.runs import FULL, PARTIAL, SKIP
from maskflash.errors import ArgumentError


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


def cells(block_map: BlockMap, most: int, batch_row: int = 0, head: int = 0) -> Cells:
    """The cells of one batch row and head.

    A cell is full if all of its tiles are, skip if all are, else partial: what it would be as a tile. Its tiles are
    counted from the ends of runs, so the cost follows the runs and the cells.

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
    height, width = math.ceil(n_q / side), math.ceil(n_kv / side)
    runs = block_map.rows
    offsets = runs.offsets[unit * n_q : (unit + 1) * n_q + 1].cpu().numpy().astype(np.int64)
    held = slice(int(offsets[0]), int(offsets[-1]))
    start, stop, full = (x[held].cpu().numpy() for x in (runs.start, runs.stop, runs.full))
    band = np.repeat(np.arange(n_q) // side, np.diff(offsets))
    seen, filled = (
        _overlap(stop[of], band[of], (height, width), side) - _overlap(start[of], band[of], (height, width), side)
        for of in (slice(None), full)
    )
    area = np.outer(_sizes(n_q, side), _sizes(n_kv, side))
    kinds = np.where(filled == area, FULL, np.where(seen == 0, SKIP, PARTIAL)).astype(np.int8)
    tall, wide = (side * size for size in block_map.block_size)
    return Cells(kinds, _edges(height, tall, block_map.q_len), _edges(width, wide, block_map.kv_len), side)


def _overlap(ends: Any, band: Any, shape: tuple[int, int], side: int) -> NDArray[np.int64]:
    """How many tiles of each cell lie before the ends that are in its band: (rows, columns)."""
    height, width = shape
    before = np.zeros(height * (width + 1))
    place = band * (width + 1) + ends // side
    # An end has `side` tiles before it in each earlier cell of its band, and the rest in its own.
    before += side * np.bincount(place, minlength=len(before))
    total = before.reshape(height, width + 1)
    total = total[:, ::-1].cumsum(1)[:, ::-1] - total
    total += np.bincount(place, weights=ends % side, minlength=len(before)).reshape(height, width + 1)
    counted: NDArray[np.int64] = total[:, :width].astype(np.int64)
    return counted


def _sizes(tiles: int, side: int) -> NDArray[np.int64]:
    return np.minimum(side, tiles - np.arange(0, tiles, side))


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
