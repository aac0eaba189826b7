"""A block map -> the kinds of at most so many cells, each a group of tiles: what every picture of a map is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskflash.analysis.block_map import BlockMap
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
    kinds = block_map.rows.cells(unit, n_q, n_kv, side)
    tall, wide = (side * size for size in block_map.block_size)
    edges = _edges(len(kinds), tall, block_map.q_len), _edges(kinds.shape[1], wide, block_map.kv_len)
    return Cells(kinds, *edges, side)


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
