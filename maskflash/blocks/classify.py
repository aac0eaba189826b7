"""A mask expression and two lengths -> its BlockMap, exactly the brute-force one, by the cheapest means that applies.

The pairs of a few rows are evaluated at once. A mask that compares only q, kv and q - kv with numbers has formulas; one
that is comparisons joined by `and` mostly shows each row one interval, whose ends tell. Else squares of tiles are
bounded, coarse to fine; where tiles are many, or many pairs would have to be evaluated, and the mask compares rows with
columns, its columns are cut into pieces instead, which looks at no tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.coverage import cover
from maskflash.blocks.formula import find_formula
from maskflash.blocks.groups import find_groups
from maskflash.blocks.hulls import Hulls, evaluated, find_intervals
from maskflash.blocks.pieces import Pieces, find_pieces
from maskflash.blocks.problem import Problem
from maskflash.blocks.tiles import Tiles

_FEW_ROWS: Final = 8  # and as many pairs as there are are evaluated at once: a step of decoding
_FEW_PAIRS: Final = 1 << 18
_MANY_TILES: Final = 1 << 16  # from here on, bounding costs more than cutting the columns
_PAIRS_FOR_A_PIECE: Final = 16  # evaluated for what a piece of a column costs


@dataclass(frozen=True, slots=True, eq=False)
class Classified:
    """The block map, and how it was found.

    Attributes:
        block_map: the map.
        largest: a cap on the mask's 64-bit integers over all its pairs, before any wrapping, and on its tables' sizes.
        by_bounds: tiles that bounds settled.
        by_samples: tiles that samples settled.
        by_elements: tiles that had to be evaluated.
        by_columns: tiles whose columns were cut into pieces; then all of them.
        by_pairs: tiles of a few rows, whose pairs were evaluated at once; then all of them.
        by_intervals: tiles that follow from the interval that each row sees; then all of them.
        by_formula: tiles that follow from formulas; then all of them.
        by_groups: tiles that follow from pairs of groups of rows and of columns; then all of them.
        hulls: those intervals.
    """

    block_map: BlockMap
    largest: float
    by_bounds: int = 0
    by_samples: int = 0
    by_elements: int = 0
    by_columns: int = 0
    by_pairs: int = 0
    by_intervals: int = 0
    by_formula: int = 0
    by_groups: int = 0
    hulls: Hulls | None = None

    @property
    def decided(self) -> dict[str, int]:
        """How many tiles each means decided; the first five decide all or none."""
        return {
            "pairs": self.by_pairs,
            "formula": self.by_formula,
            "intervals": self.by_intervals,
            "groups": self.by_groups,
            "columns": self.by_columns,
            "bounds": self.by_bounds,
            "samples": self.by_samples,
            "elements": self.by_elements,
        }


def classify(problem: Problem) -> Classified:
    """Find the kind of every tile.

    Returns:
        The map, equal to evaluating every pair; on the CPU, wherever the problem is.

    Raises:
        MaskIndexError: a pair inside the lengths reads out of range, or divides by zero, and no guard excludes it.
    """
    problem = problem.on_host()
    count = math.prod(problem.shape)
    largest = float(max((size for table in problem.inputs.tables for size in table.shape), default=0))
    if not count:
        kinds = torch.zeros(problem.shape, dtype=torch.int8, device=problem.device)
        return Classified(BlockMap.from_kinds(kinds, problem.q_len, problem.kv_len, problem.block_size), largest)
    units = math.prod(problem.shape[:2])
    if problem.q_len <= _FEW_ROWS and units * problem.q_len * problem.kv_len <= _FEW_PAIRS:
        few, block_map = evaluated(problem)
        return Classified(block_map, max(largest, few.largest), by_pairs=count, hulls=few)
    formula = find_formula(problem)
    if formula is not None:
        return Classified(formula.block_map(), max(largest, formula.largest), by_formula=count)
    hulls = find_intervals(problem)
    if hulls is not None and (joined := hulls.block_map(problem)):
        return Classified(joined, max(largest, hulls.largest), by_intervals=count, hulls=hulls)
    if groups := find_groups(problem):
        return Classified(groups.block_map(), max(largest, problem.largest()), by_groups=count)
    find = cache(_pieces)
    if count > _MANY_TILES and (cut := find(problem)):
        return _cut(problem, cut, largest)
    columns = units * problem.kv_len
    tiles = Tiles(problem)
    if not tiles.settle(lambda pairs: pairs <= _PAIRS_FOR_A_PIECE * columns or find(problem) is None):
        cut = find(problem)
        assert cut is not None, "evaluation is refused only where columns can be cut"
        return _cut(problem, cut, largest)
    by_bounds = count - tiles.by_samples - tiles.by_elements
    return Classified(tiles.block_map(), max(largest, tiles.largest), by_bounds, tiles.by_samples, tiles.by_elements)


def _pieces(problem: Problem) -> Pieces | None:
    """How to cut a problem's columns, or else its rows."""
    turned = problem.turned()
    return find_pieces(problem) or (find_pieces(turned) if turned else None)


def _cut(problem: Problem, pieces: Pieces, largest: float) -> Classified:
    """The map of a problem from its columns' pieces, or from its rows'."""
    block_map = cover(pieces)
    if pieces.problem is not problem:
        block_map = block_map.turned()
    return Classified(block_map, max(largest, pieces.largest), by_columns=math.prod(problem.shape))
