"""A problem -> the kinds of its tiles, coarse to fine, at a cost that follows the mask's boundary.

    bounds of 8 x 8 tiles        of single tiles            samples, then pairs
    full  full  maybe skip       full  maybe                a visible and a hidden pair among a few: partial
    full  full  full  maybe      full  full                 else every pair of the tile is evaluated

Bounds settle large squares of tiles; what they leave open is divided, down to single tiles. There a visible and a
hidden pair among a few samples settle most, and only what remains is evaluated pair by pair. Where rows match columns,
it is known which squares hold any pair that does, and how many a tile has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import Runs, Stretches
from maskflash.analysis.ways.meets import Meets
from maskflash.expr.bounds import Verdict, bounds
from maskflash.expr.intervals import Interval
from maskflash.expr.ranges import RangeMinima

_DIVISION: Final = 8  # a square is divided into 8 x 8
_SQUARES: Final = 1 << 12  # of the first lattice, at most; as many are divided together
_PAIRS_AT_ONCE: Final = 1 << 21  # pairs evaluated together
_SAMPLES: Final = (  # where in a tile, along either side, in 65,536ths: a few, and more for what they leave open
    (0, 1 << 15, 1 << 16),  # its corners, the middles of its edges, its centre
    tuple(n * 40503 % (1 << 16) for n in range(1, 17)),  # scattered by the golden ratio
)

_Squares = tuple[Tensor, Tensor, Tensor, Tensor]  # (b, h, i, j), which broadcast together; i and j in squares


@dataclass(slots=True, eq=False)
class Tiles:
    """The kinds of a problem's tiles, as far as they are known.

    Attributes:
        problem: what was asked.
        meets: where rows match columns, as far as that is known.
        by_samples: partial tiles that samples, or counts of matching pairs, settled.
        evaluated: tiles that had to be evaluated, (n, 4) each.
    """

    problem: Problem
    meets: tuple[Meets, ...] = ()
    by_samples: int = 0
    evaluated: list[Tensor] = field(default_factory=list)
    _ranges: RangeMinima = field(default_factory=RangeMinima)
    _stretches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def settle(self, may_evaluate: Callable[[int], bool]) -> bool:
        """Find the kind of every tile.

        Args:
            may_evaluate: asked with the number of pairs, all told, before any are evaluated.

        Returns:
            False where it said no; then nothing is known.
        """
        pending = list(self._first())
        pairs = 0
        while pending:
            squares, side = pending.pop()
            open_, sure = self._bound(squares, side)
            if side > 1:
                pending += [(_divided(part), side // _DIVISION) for part in open_.split(_SQUARES)]
                continue
            rest, sure = self._count(open_, sure)
            for places in _SAMPLES:
                rest, sure = self._sample(rest, sure, places)
            pairs += len(rest) * math.prod(self.problem.block_size)
            if len(rest) and not may_evaluate(pairs):
                return False
            self._evaluate(rest)
        return True

    def undecided(self) -> int:
        """How many tiles there are in the squares of the first lattice that bounds leave open."""
        found = 0
        for squares, side in self._first():
            verdict = self._verdict(squares, side, {})
            found += int(((verdict.maybe & ~verdict.always) | verdict.faulty).sum()) * side * side
        return min(found, math.prod(self.problem.shape))

    def look(self, tiles: Tensor) -> None:
        """Find the kinds of some tiles, (n, 4), from their pairs; none of them may fail where a guard excludes it."""
        rest, sure = tiles, torch.ones(len(tiles), dtype=torch.bool, device=tiles.device)
        for places in _SAMPLES:
            rest, sure = self._sample(rest, sure, places)
        self._evaluate(rest)

    def block_map(self) -> BlockMap:
        """The map of what was settled."""
        problem = self.problem
        nothing = torch.zeros(0, dtype=torch.int64, device=problem.device)
        stretches = [(nothing, nothing, nothing, nothing.bool()), *self._stretches]
        joined = Stretches(*(torch.cat(x).cpu().numpy() for x in zip(*stretches, strict=True)))
        return problem.block_map(Runs.from_stretches(math.prod(problem.shape[:3]), joined, problem.device))

    def _keep(self, squares: Tensor, side: int, *, full: Tensor | bool) -> None:
        """Note squares (n, 4) whose tiles are all full, or all partial."""
        _, heads, n_q, n_kv = self.problem.shape
        i = squares[:, 2, None] * side + torch.arange(side, device=squares.device)
        line = (squares[:, 0] * heads + squares[:, 1])[:, None] * n_q + i
        start = (squares[:, 3] * side)[:, None].expand_as(line)
        kind = torch.as_tensor(full, device=squares.device).expand(len(squares))[:, None].expand_as(line)
        inside = i < n_q
        self._stretches.append((line[inside], start[inside], (start + side).clamp(max=n_kv)[inside], kind[inside]))

    def _first(self) -> Iterator[tuple[_Squares, int]]:
        """Squares that make up the whole, and their side."""
        batch, heads, n_q, n_kv = self.problem.shape
        side = 1
        while math.ceil(n_q / side) * math.ceil(n_kv / side) > _SQUARES:
            side *= _DIVISION
        device = self.problem.device
        i = torch.arange(math.ceil(n_q / side), device=device)[:, None]
        j = torch.arange(math.ceil(n_kv / side), device=device)
        units = torch.arange(batch * heads, device=device)
        for some in units.split(max(1, _SQUARES * _DIVISION**2 // max(1, i.numel() * j.numel()))):
            yield (some[:, None, None] // heads, some[:, None, None] % heads, i, j), side

    def _bound(self, squares: _Squares, side: int) -> tuple[Tensor, Tensor]:
        """Keep the squares that bounds prove full; return the open ones, (n, 4), and which surely have no fault."""
        b, _, i, j = squares
        verdict = self._verdict(squares, side, {})
        inside = (i * side < self.problem.shape[2]) & (j * side < self.problem.shape[3])
        always, undecided = verdict.always & ~verdict.faulty, (verdict.maybe & ~verdict.always) | verdict.faulty
        shape = np.broadcast_shapes(b.shape, inside.shape)

        def places(chosen: Tensor) -> Tensor:
            return torch.stack([x.expand(shape)[chosen] for x in squares], 1)

        self._keep(places((always & inside).expand(shape)), side, full=True)
        undecided = (undecided & inside).expand(shape)
        return places(undecided), ~verdict.faulty.expand(shape)[undecided]

    def _verdict(self, squares: _Squares, side: int, supposed: dict[int, Interval]) -> Verdict:
        """Bounds over squares, given where rows match columns, and what is supposed of some nodes."""
        b, h, i, j = squares
        rows, columns = self._extent(i, 0, side), self._extent(j, 1, side)
        first, last = (self.problem.indices(b, h, *ends) for ends in zip(rows, columns, strict=True))
        boxes = {name: Interval(first[name], last[name]) for name in first}
        never = torch.zeros((), dtype=torch.bool, device=self.problem.device)
        met = {meets.matching.position: Interval(never, meets.within(squares, side)) for meets in self.meets}
        return bounds(self.problem.expr, self.problem.inputs, boxes, self._ranges, met | supposed)

    def _count(self, tiles: Tensor, sure: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the tiles that show just the pairs that match; return the others, and which of them are sure.

        The mask is bounded once as if all pairs matched, and once as if none did.
        """
        for meets in self.meets:
            squares = tiles[:, 0], tiles[:, 1], tiles[:, 2], tiles[:, 3]
            matching, told = meets.matching, sure & meets.within(squares, 1)
            yes, no = (Interval(x, x) for x in torch.tensor([True, False], device=tiles.device))
            told &= self._verdict(squares, 1, dict.fromkeys(matching.parts, yes)).always
            told &= ~self._verdict(squares, 1, {matching.position: no}).maybe
            chosen = tiles[told]
            rows, columns = (self._extent(chosen[:, 2 + axis], axis) for axis in (0, 1))
            pairs = (rows.hi - rows.lo + 1) * (columns.hi - columns.lo + 1)
            full = meets.count(tuple(chosen.T)) == pairs
            self._keep(chosen, 1, full=full)
            self.by_samples += int((~full).sum())
            tiles, sure = tiles[~told], sure[~told]
        return tiles, sure

    def _sample(self, tiles: Tensor, sure: Tensor, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keep the tiles with a visible and a hidden sample as partial; return the others, and which of them are sure.

        Tiles where a fault is possible are left out: only all their pairs tell whether there is one.
        """
        rows, columns = (_at(places, self._extent(tiles[:, 2 + axis], axis)) for axis in (0, 1))
        marked = torch.zeros_like(sure)
        for some in sure.nonzero()[:, 0].split(max(1, _PAIRS_AT_ONCE // len(places) ** 2)):
            bits = self._visible(tiles[some], rows[some], columns[some])
            marked[some] = bits.any(1) & ~bits.all(1)
        self._keep(tiles[marked], 1, full=False)
        self.by_samples += int(marked.sum())
        return tiles[~marked], sure[~marked]

    def _evaluate(self, tiles: Tensor) -> None:
        """Find the kinds of tiles from all their pairs. A ragged tile repeats its last row and column."""
        height, width = self.problem.block_size
        at_once = max(1, _PAIRS_AT_ONCE // width)  # rows of a tile, if it has more pairs than that
        for some in tiles.split(max(1, _PAIRS_AT_ONCE // (height * width))):
            rows, columns = (
                torch.minimum(box.lo[:, None] + torch.arange(block, device=some.device), box.hi[:, None])
                for axis, block in enumerate(self.problem.block_size)
                for box in [self._extent(some[:, 2 + axis], axis)]
            )
            parts = (self._visible(some, part, columns) for part in rows.split(at_once, dim=1))
            anywhere, everywhere = zip(*((bits.any(1), bits.all(1)) for bits in parts), strict=True)
            seen = torch.stack(anywhere).any(0)
            self._keep(some[seen], 1, full=torch.stack(everywhere).all(0)[seen])
        self.evaluated.append(tiles)

    def _visible(self, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Bits of rows x columns of each tile: (n, pairs)."""
        b, h = tiles[:, 0, None, None], tiles[:, 1, None, None]
        return self.problem.visible(b, h, rows[:, :, None], columns[:, None, :]).flatten(1)

    def _extent(self, place: Tensor, axis: int, side: int = 1) -> Interval:
        """First and last row (axis 0) or column (axis 1) of squares, inside the length."""
        length = (self.problem.q_len, self.problem.kv_len)[axis]
        block = self.problem.block_size[axis] * side
        return Interval((place * block).clamp(max=length - 1), (place * block + block).clamp(max=length) - 1)


def _divided(squares: Tensor) -> _Squares:
    """The squares that these (n, 4) consist of; some may lie outside."""
    b, h, i, j = squares.T[:, :, None, None]
    step = torch.arange(_DIVISION, device=squares.device)
    return b, h, i * _DIVISION + step[:, None], j * _DIVISION + step


def _at(places: tuple[int, ...], box: Interval) -> Tensor:
    """Indices of boxes at these places, from 0, the first, to 65,536, the last: (n, places)."""
    return box.lo[:, None] + ((box.hi - box.lo)[:, None] * torch.tensor(places, device=box.lo.device) >> 16)
