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
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.analysis.ways.columns import find_pieces
from maskflash.analysis.ways.coverage import cover
from maskflash.analysis.ways.ends import Hulls, evaluated, find_intervals
from maskflash.analysis.ways.groups import find_groups
from maskflash.analysis.ways.lines import find_formula
from maskflash.analysis.ways.meets import find_meets
from maskflash.analysis.ways.parts import join_parts
from maskflash.analysis.ways.tiles import Tiles
from maskflash.ground import arguments

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
        by_samples: partial tiles that samples, or counts of matching pairs, settled.
        by_elements: tiles that had to be evaluated.
        by_columns: tiles whose columns were cut into pieces; then all of them.
        by_pairs: tiles of a few rows, whose pairs were evaluated at once; then all of them.
        by_intervals: tiles that follow from the interval that each row sees; then all of them.
        by_formula: tiles that follow from formulas; then all of them.
        by_groups: tiles that follow from pairs of groups of rows and of columns; then all of them.
        by_parts: tiles that follow from those of joined conditions, or were looked at where these leave them open; then
            all of them.
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
    by_parts: int = 0
    hulls: Hulls | None = None

    @property
    def decided(self) -> dict[str, int]:
        """How many tiles each means decided; the first seven decide all or none."""
        return {
            "pairs": self.by_pairs,
            "formula": self.by_formula,
            "intervals": self.by_intervals,
            "groups": self.by_groups,
            "columns": self.by_columns,
            "parts": self.by_parts,
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
    if isinstance(problem.q_offset, Tensor):
        arguments.offsets_in_range("attention", problem.q_offset)
    count = math.prod(problem.shape)
    largest = _longest(problem)
    if not count:
        kinds = torch.zeros(problem.shape, dtype=torch.int8, device=problem.device)
        return Classified(BlockMap.from_kinds(kinds, problem.q_len, problem.kv_len, problem.block_size), largest)
    units = math.prod(problem.shape[:2])
    if problem.q_len <= _FEW_ROWS and units * problem.q_len * problem.kv_len <= _FEW_PAIRS:
        few, block_map = evaluated(problem)
        return Classified(block_map, max(largest, few.largest), by_pairs=count, hulls=few)
    if whole := _by_one_way(problem):
        return whole
    otherwise = cache(_by_pieces_or_parts)
    if count > _MANY_TILES and (found := otherwise(problem)):
        return found
    columns = units * problem.kv_len
    tiles = Tiles(problem)
    tiles.meets = find_meets(problem, tiles.undecided)
    if not tiles.settle(lambda pairs: pairs <= _PAIRS_FOR_A_PIECE * columns or otherwise(problem) is None):
        found = otherwise(problem)
        assert found is not None, "evaluation is refused only where there is another way"
        return found
    by_bounds = count - tiles.by_samples - tiles.by_elements
    return Classified(tiles.block_map(), max(largest, tiles.largest), by_bounds, tiles.by_samples, tiles.by_elements)


def _by_one_way(problem: Problem) -> Classified | None:
    """The map of a problem that is a formula, whose rows see intervals, or that has groups."""
    count, largest = math.prod(problem.shape), _longest(problem)
    formula = find_formula(problem)
    if formula is not None:
        return Classified(formula.block_map(), max(largest, formula.largest), by_formula=count)
    hulls = find_intervals(problem)
    if hulls is not None and (joined := hulls.block_map(problem)):
        return Classified(joined, max(largest, hulls.largest), by_intervals=count, hulls=hulls)
    groups = find_groups(problem)
    if groups is not None:
        return Classified(groups.block_map(), max(largest, problem.largest()), by_groups=count)
    return None


def _by_pieces_or_parts(problem: Problem) -> Classified | None:
    """The map of a problem whose columns, or rows, are cut, or whose conditions are decided one by one."""
    if found := _by_pieces(problem):
        return found
    joined = join_parts(problem, _map_of)
    if joined is None:
        return None
    return Classified(joined, max(_longest(problem), problem.largest()), by_parts=math.prod(problem.shape))


def _by_pieces(problem: Problem) -> Classified | None:
    """The map of a problem whose columns are cut, or else its rows."""
    count, largest = math.prod(problem.shape), _longest(problem)
    if pieces := find_pieces(problem):
        return Classified(cover(pieces), max(largest, pieces.largest), by_columns=count)
    turned = problem.turned()
    if turned is not None and (pieces := find_pieces(turned)):
        return Classified(cover(pieces).turned(), max(largest, pieces.largest), by_columns=count)
    return None


def _map_of(problem: Problem) -> BlockMap | None:
    """The map of a condition, without a look at its tiles."""
    found = _by_one_way(problem) or _by_pieces(problem)
    return None if found is None else found.block_map


def _longest(problem: Problem) -> float:
    """The longest side of a problem's tables."""
    return float(max((size for table in problem.inputs.tables for size in table.shape), default=0))
