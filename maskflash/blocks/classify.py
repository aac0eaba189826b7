"""A mask expression and two lengths -> its BlockMap, exactly the brute-force one, at a cost that follows its boundary.

Bounds settle most tiles; a visible and a hidden pair among a few samples settle most of the rest; only the remaining
tiles are evaluated element by element. Where tiles are many, or many remain, and the mask compares rows with columns,
its columns are cut into pieces instead, which looks at no tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from maskflash.blocks.block_map import FULL, PARTIAL, SKIP, BlockMap
from maskflash.blocks.coverage import cover
from maskflash.blocks.pieces import Pieces, find_pieces
from maskflash.blocks.problem import Problem
from maskflash.expr.bounds import bounds
from maskflash.expr.intervals import Interval
from maskflash.expr.ranges import RangeMinima

_BOXES_AT_ONCE: Final = 1 << 17  # tiles bounded together: a few dozen int64 intermediates of this size
_PAIRS_AT_ONCE: Final = 1 << 21  # pairs evaluated together
_MANY_TILES: Final = 1 << 16  # from here on, bounding each costs more than cutting the columns
_PAIRS_FOR_A_PIECE: Final = 16  # evaluated for what a piece of a column costs
_SAMPLES: Final = 3  # per side of a tile: its corners, the middles of its edges, its centre


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
    """

    block_map: BlockMap
    largest: float
    by_bounds: int
    by_samples: int
    by_elements: int
    by_columns: int = 0


def classify(problem: Problem) -> Classified:
    """Find the kind of every tile.

    Returns:
        The map, equal to evaluating every pair.

    Raises:
        MaskIndexError: a pair inside the lengths reads out of range, or divides by zero, and no guard excludes it.
    """
    largest = float(max((size for table in problem.inputs.tables for size in table.shape), default=0))
    find = cache(find_pieces)  # once, for however many parts of the lattice
    if math.prod(problem.shape) > _MANY_TILES and (pieces := find(problem)):
        return _cut(pieces, largest)
    kinds = torch.full(problem.shape, SKIP, dtype=torch.int8, device=problem.device)
    ranges = RangeMinima()
    by_bounds = by_samples = 0
    for part in _parts(problem.shape):
        undecided, sure, cap = _bound(problem, ranges, kinds, part)
        largest = max(largest, cap)
        by_bounds += math.prod(kinds[part].shape) - len(undecided)
        undecided, found = _sample(problem, kinds, undecided, sure)
        by_samples += found
        pairs = len(undecided) * math.prod(problem.block_size)
        columns = math.prod(problem.shape[:2]) * problem.kv_len
        if pairs > _PAIRS_FOR_A_PIECE * columns and (pieces := find(problem)):
            return _cut(pieces, largest)
        _evaluate(problem, kinds, undecided)
    block_map = BlockMap.from_kinds(kinds, problem.q_len, problem.kv_len, problem.block_size)
    return Classified(block_map, largest, by_bounds, by_samples, kinds.numel() - by_bounds - by_samples)


def _cut(pieces: Pieces, largest: float) -> Classified:
    """The map of a problem from its columns' pieces."""
    return Classified(cover(pieces), max(largest, pieces.largest), 0, 0, 0, math.prod(pieces.problem.shape))


_Part = tuple[slice, slice, slice, slice]


def _parts(shape: tuple[int, int, int, int]) -> Iterator[_Part]:
    """Slices of the lattice of at most _BOXES_AT_ONCE tiles, or one row."""
    batch, heads, n_q, n_kv = shape
    if 0 in shape:
        return
    rows = max(1, _BOXES_AT_ONCE // n_kv)
    head_step = max(1, rows // n_q)
    batch_step = max(1, head_step // heads)
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for i in range(0, n_q, rows):
                yield slice(b, b + batch_step), slice(h, h + head_step), slice(i, i + rows), slice(0, n_kv)


def _bound(problem: Problem, ranges: RangeMinima, kinds: Tensor, part: _Part) -> tuple[Tensor, Tensor, float]:
    """Write the kinds that bounds prove; return the others, (n, 4), which may safely be sampled, (n,), and the cap."""
    b, h, i, j = (
        torch.arange(n, device=problem.device)[cut].view([-1 if axis == place else 1 for axis in range(4)])
        for place, (n, cut) in enumerate(zip(problem.shape, part, strict=True))
    )
    offset = problem.offset_of(b)
    q, kv = (
        _extent(i, problem.q_len, problem.block_size[0]),
        _extent(j, problem.kv_len, problem.block_size[1]),
    )
    boxes = {"b": Interval(b, b), "h": Interval(h, h), "q": Interval(q.lo + offset, q.hi + offset), "kv": kv}
    verdict = bounds(problem.expr, problem.inputs, boxes, ranges)
    shape = kinds[part].shape
    always, maybe, faulty = (x.expand(shape) for x in (verdict.always, verdict.maybe, verdict.faulty))
    kinds[part] = torch.where(always, FULL, SKIP).to(torch.int8)
    places = ((maybe & ~always) | faulty).nonzero()
    sure = ~faulty[tuple(places.T)]
    return places + torch.tensor([cut.start for cut in part], device=places.device), sure, verdict.largest


def _sample(problem: Problem, kinds: Tensor, tiles: Tensor, sure: Tensor) -> tuple[Tensor, int]:
    """Mark the tiles with a visible and a hidden sample as partial; return the others and the number marked.

    Tiles where a fault is possible are left out: only all their pairs tell whether there is one.
    """
    rows, columns = (_spread(_extent(tiles[:, 2 + axis], length, block)) for axis, length, block in _axes(problem))
    marked = torch.zeros_like(sure)
    chosen = sure.nonzero()[:, 0]
    for some in chosen.split(max(1, _PAIRS_AT_ONCE // _SAMPLES**2)):
        bits = _visible(problem, tiles[some], rows[some], columns[some])
        marked[some] = bits.any(1) & ~bits.all(1)
    kinds[tuple(tiles[marked].T)] = PARTIAL
    return tiles[~marked], int(marked.sum())


def _evaluate(problem: Problem, kinds: Tensor, tiles: Tensor) -> None:
    """Write the kinds of tiles from all their pairs. A ragged tile repeats its last row and column."""
    for some in tiles.split(max(1, _PAIRS_AT_ONCE // math.prod(problem.block_size))):
        rows, columns = (
            torch.minimum(box.lo[:, None] + torch.arange(block, device=some.device), box.hi[:, None])
            for axis, length, block in _axes(problem)
            for box in [_extent(some[:, 2 + axis], length, block)]
        )
        bits = _visible(problem, some, rows, columns)
        kinds[tuple(some.T)] = torch.where(bits.all(1), FULL, bits.any(1) * PARTIAL).to(torch.int8)


def _visible(problem: Problem, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bits of rows x columns of each tile: (n, pairs)."""
    b, h = tiles[:, 0, None, None], tiles[:, 1, None, None]
    return problem.visible(b, h, rows[:, :, None], columns[:, None, :]).flatten(1)


def _axes(problem: Problem) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(axis, length, block) of rows and of columns."""
    return (0, problem.q_len, problem.block_size[0]), (1, problem.kv_len, problem.block_size[1])


def _extent(tile: Tensor, length: int, block: int) -> Interval:
    """First and last index of tiles, inside the length."""
    return Interval(tile * block, (tile * block + block).clamp(max=length) - 1)


def _spread(box: Interval) -> Tensor:
    """Evenly spread indices of boxes, ends included: (n, _SAMPLES)."""
    step = torch.arange(_SAMPLES, device=box.lo.device)
    return box.lo[:, None] + (box.hi - box.lo)[:, None] * step // (_SAMPLES - 1)
