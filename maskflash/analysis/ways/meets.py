"""A problem whose mask matches rows with columns -> the tiles in which any match, and how many pairs of each do.

    doc  4 4 7 7 1 1 4 4       doc[q] == doc[kv], in tiles of 2 x 2:     # . . #
                                                                         . # . .
                                                                         . . # .
                                                                         # . . #

Values need no order: documents in any order, ids that come again, gaps. The lines of tiles are joined by what they
hold, as tables are, at a cost that follows rows, columns and what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.problem import Problem
from maskflash.analysis.ways.separate import Matching, matchings
from maskflash.expr.evaluate import compute
from maskflash.expr.nodes import Expr

_DENSE: Final = 1 / 64  # matching pairs among all: a few samples of a tile tell sooner
_MOST_FOR_A_TILE: Final = 128  # values that a tile's rows and columns share, on average: so do all its pairs
_MOST: Final = 1 << 25  # such values, all told
_AT_ONCE: Final = 1 << 20  # joined together


@dataclass(frozen=True, slots=True, eq=False)
class Meets:
    """Tiles in which some row matches some column.

    Attributes:
        matching: what is matched. Outside these tiles it is False.
        shape: (B, H, nQ, nKV).
        tiles: (n,) int64, ((b * H + h) * nQ + i) * nKV + j, ascending.
        pairs: (n,) how many pairs of each match.
    """

    matching: Matching
    shape: tuple[int, int, int, int]
    tiles: Tensor
    pairs: Tensor
    _squares: dict[int, Tensor] = field(default_factory=dict)

    def within(self, squares: tuple[Tensor, ...], side: int) -> Tensor:
        """Whether squares (b, h, i, j) of side x side tiles, which broadcast together, hold such a tile."""
        held = self._held(side)
        key = self._key(squares, side)
        return held[torch.searchsorted(held, key).clamp(max=len(held) - 1)] == key if len(held) else key < 0

    def count(self, tiles: tuple[Tensor, ...]) -> Tensor:
        """How many pairs match in each of some such tiles (b, h, i, j)."""
        return self.pairs[torch.searchsorted(self.tiles, self._key(tiles, 1))]

    def _held(self, side: int) -> Tensor:
        """The keys of squares that hold such a tile, ascending."""
        if side == 1:
            return self.tiles
        if side not in self._squares:
            n_q, n_kv = self.shape[2:]
            line, j = self.tiles // n_kv, self.tiles % n_kv
            self._squares[side] = self._key(
                (torch.zeros_like(line), line // n_q, line % n_q // side, j // side), side
            ).unique()
        return self._squares[side]

    def _key(self, squares: tuple[Tensor, ...], side: int) -> Tensor:
        b, h, i, j = squares
        down, across = (-(-n // side) for n in self.shape[2:])
        key = ((b * self.shape[1] + h) * down + i) * across + j
        return key.masked_fill((i >= down) | (j >= across), -1)  # beyond the last tile


def find_meets(problem: Problem, undecided: Callable[[], int]) -> tuple[Meets, ...]:
    """Where rows meet the columns that they match; nothing of what meets nearly everywhere.

    Args:
        problem: what is asked.
        undecided: how many tiles there are to look at, as far as bounds tell.
    """
    found = matchings(problem.expr)
    if not found:
        return ()
    most = min(_MOST, _MOST_FOR_A_TILE * undecided())
    return tuple(meets for matching in found if (meets := _meet(problem, matching, most)))


def _meet(problem: Problem, matching: Matching, most: int) -> Meets | None:
    """Join the lines of tiles by what they hold; None where that shares too much."""
    n_kv = problem.shape[3]
    (line, row_value, rows), (value, tile, columns) = _held(problem, matching)
    first, last = (torch.searchsorted(value, row_value, right=right) for right in (False, True))
    shared = last - first
    before = pad(columns.cumsum(0), (1, 0))
    matches = int((rows * (before[last] - before[first])).sum())
    if int(shared.sum()) > most or matches >= _DENSE * math.prod(problem.shape[:2]) * problem.q_len * problem.kv_len:
        return None
    found = []
    for low, high in _parts(line, shared):
        each = shared[low:high]
        entry = torch.arange(low, high).repeat_interleave(each)
        partner = torch.arange(len(entry)) - (each.cumsum(0) - each).repeat_interleave(each) + first[entry]
        tiles, place = (line[entry] * n_kv + tile[partner]).unique(return_inverse=True)
        found.append((tiles, torch.zeros_like(tiles).index_add_(0, place, rows[entry] * columns[partner])))
    nothing = torch.zeros(0, dtype=torch.int64)
    tiles, pairs = (torch.cat(x) for x in zip((nothing, nothing), *found, strict=True))
    return Meets(matching, problem.shape, tiles, pairs)


def _held(problem: Problem, matching: Matching) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What lines of tiles hold, each value once, and how often: (line, value, count), then (value, column, count).

    Lines are (b*H + h) * nQ + i; values are numbered anew, those of another batch row or head by other numbers.
    """
    units = math.prod(problem.shape[:2])
    rows, columns = (_values(problem, exprs, axis) for axis, exprs in enumerate((matching.rows, matching.columns)))
    number = torch.zeros((), dtype=torch.int64)
    for pair in zip(rows, columns, strict=True):
        both = torch.cat(pair, 1).unique(return_inverse=True)[1]
        number = (number * both.numel() + both).unique(return_inverse=True)[1]
    number = number + torch.arange(units)[:, None] * number.numel()
    held = []
    for axis, exprs in enumerate((matching.of_rows, matching.of_columns)):
        size, tiles = problem.block_size[axis], problem.shape[2 + axis]
        values = number.split((problem.q_len, problem.kv_len), 1)[axis]
        shown = torch.ones(values.shape, dtype=torch.bool)
        for condition in _values(problem, exprs, axis):
            shown &= condition != 0
        unit, token = shown.nonzero(as_tuple=True)
        value, place = values[unit, token], token // size
        first, second, most = (
            (unit * tiles + place, value, int(number.max()) + 1) if axis == 0 else (value, place, tiles)
        )
        key, count = (first * most + second).unique(return_counts=True)
        held.append((key // most, key % most, count))
    return held


def _values(problem: Problem, exprs: tuple[Expr, ...], axis: int) -> list[Tensor]:
    """Expressions of the row (axis 0) or the column (axis 1), at each of them: (units, tokens) int64.

    Where something is read out of range they are anything. Bounds see that, and all pairs of the tile are looked at.
    """
    pairs, shape = problem.along(axis), (*problem.shape[:2], (problem.q_len, problem.kv_len)[axis])
    found = (compute(expr, problem.inputs, pairs)[0] for expr in exprs)
    return [x.to(torch.int64).expand(shape).flatten(0, 1) for x in found]


def _parts(line: Tensor, shared: Tensor) -> Iterator[tuple[int, int]]:
    """Whole lines that share about _AT_ONCE values with columns; such lines as there are."""
    group = (shared.cumsum(0) - shared) // _AT_ONCE
    begins = torch.ones_like(line, dtype=torch.bool)
    begins[1:] = line[1:] != line[:-1]
    of_line = group[begins][begins.cumsum(0) - 1]  # that of the line's first
    ends = of_line.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    yield from pairwise([0, *ends])
