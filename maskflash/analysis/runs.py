"""Kinds of tiles as runs: along each line of a lattice, stretches of full or of partial tiles.

They leave the skipped tiles out and join neighbours of one kind, so that memory follows a mask's boundary, not its
area.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

IntArray = npt.NDArray[np.int64]
TileArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

SKIP: Final = 0
PARTIAL: Final = 1
FULL: Final = 2


class Stretches(NamedTuple):
    """Stretches of tiles of one kind: all (n,).

    Attributes:
        line: the line of each.
        start: its first tile.
        stop: one past its last tile; where it is not after start there is no stretch.
        full: whether its tiles are full; else they are partial.
    """

    line: TileArray | IntArray
    start: TileArray | IntArray
    stop: TileArray | IntArray
    full: BoolArray

    def kept(self) -> Stretches:
        """Without those that hold no tile."""
        some = self.stop > self.start
        if some.all():
            return self
        kept = np.flatnonzero(some)  # where they come and go by turns, it takes a quarter of the time of a mask
        line, start, stop, full = self
        return Stretches(line.take(kept), start.take(kept), stop.take(kept), full.take(kept))


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Runs of visited tiles along the lines (rows or columns) of a lattice, in compressed-row form.

    Line l = (b*H + h)*n + i owns the runs offsets[l] to offsets[l+1] (half open), ascending and disjoint.

    Attributes:
        offsets: (B*H*n + 1,) int32, where each line's runs begin.
        start: (runs,) int32, first tile of the run.
        stop: (runs,) int32, one past its last tile.
        full: (runs,) bool, whether its tiles are full; else they are partial.
    """

    offsets: Tensor
    start: Tensor
    stop: Tensor
    full: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held by the four tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that is held."""
        return self.offsets, self.start, self.stop, self.full

    def lines(self) -> Tensor:
        """The line of each run: (runs,) int64, ascending."""
        owned = self.offsets.diff().long()
        return torch.repeat_interleave(torch.arange(len(owned), device=owned.device), owned)

    def tiles(self, *, full: bool) -> tuple[Tensor, Tensor]:
        """Line and position of every full (or every partial) tile: two (tiles,) int64, in order."""
        chosen = self.full if full else ~self.full
        start = self.start[chosen].long()
        length = self.stop[chosen].long() - start
        # Tile number n of the selection lies n - (tiles before its run) after its run's start.
        first = start - (length.cumsum(0) - length)
        position = torch.repeat_interleave(first, length) + torch.arange(int(length.sum()), device=start.device)
        return torch.repeat_interleave(self.lines()[chosen], length), position

    @staticmethod
    def from_lattice(kinds: Tensor) -> Runs:
        """Runs along the last axis of a (lines, n) int8 lattice of kinds."""
        lattice = kinds.cpu().numpy()
        changes = np.ones((len(lattice), lattice.shape[1] + 1), dtype=np.bool_)
        changes[:, 1:-1] = lattice[:, 1:] != lattice[:, :-1]
        visited = lattice != SKIP
        # Both lists are in row-major order and every run has one start and one end, so they pair up.
        line, start = np.nonzero(visited & changes[:, :-1])
        last = np.nonzero(visited & changes[:, 1:])[1]
        offsets = np.zeros(len(lattice) + 1, dtype=np.int32)
        offsets[1:] = np.bincount(line, minlength=len(lattice)).cumsum()
        arrays = offsets, start.astype(np.int32), (last + 1).astype(np.int32), lattice[line, start] == FULL
        return Runs(*(torch.from_numpy(x).to(kinds.device) for x in arrays))

    def lattice(self, across: int) -> Tensor:
        """The kind of every tile: (lines, across) int8, on the device of the runs."""
        offsets, start, stop, full = (x.cpu().numpy() for x in self.tensors)
        line = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        kind = np.where(full, FULL, PARTIAL).astype(np.int8)
        steps = np.zeros((len(offsets) - 1, across + 1), dtype=np.int8)
        steps[line, start] += kind  # no two runs start in one place, nor end there
        steps[line, stop] -= kind
        return torch.from_numpy(steps.cumsum(1, dtype=np.int8)[:, :-1]).to(self.start.device)

    @staticmethod
    def joined(parts: list[Runs]) -> Runs:
        """The lines of all parts, one after the other."""
        counts = torch.cat([part.offsets.diff() for part in parts])
        offsets = pad(counts.cumsum(0), (1, 0)).int()
        return Runs(offsets, *(torch.cat(x) for x in zip(*(part.tensors[1:] for part in parts), strict=True)))

    @staticmethod
    def from_stretches(lines: int, stretches: Stretches, device: torch.device) -> Runs:
        """Runs of disjoint stretches in any order; those that touch and are of one kind are joined.

        In numpy: the arrays are short, and handing each operation to threads would take longer than doing it.

        Args:
            lines: how many lines there are.
            stretches: of tiles, as above.
            device: where the runs are wanted.
        """
        line, start, stop, full = stretches.kept()
        same = line[1:] == line[:-1]
        if not ((line[1:] > line[:-1]) | same & (start[1:] > start[:-1])).all():
            order = np.lexsort((start, line))
            line, start, stop, full = line[order], start[order], stop[order], full[order]
            same = line[1:] == line[:-1]
        apart = ~same | (start[1:] != stop[:-1]) | (full[1:] != full[:-1])
        end = np.ones(min(1, len(line)), dtype=np.bool_)
        first, last = np.concatenate((end, apart)), np.concatenate((apart, end))
        offsets = np.zeros(lines + 1, dtype=np.int32)
        offsets[1:] = np.bincount(line[first], minlength=lines).cumsum()
        arrays = offsets, *(x.astype(np.int32, copy=False) for x in (start[first], stop[last])), full[first]
        return Runs(*(torch.from_numpy(x).to(device) for x in arrays))

    def transposed(self, lines: int, across: int) -> Runs:
        """Runs along columns of tiles as runs along rows, or the other way, at a cost that follows the runs.

        A run down a column of tiles begins, or ends, where a line differs from the line above:

            line 0    ▒ ▒ █ █      begin  ▒ ▒ █ █     end  . . . .
            line 1    · ▒ ▒ █             . . ▒ .          ▒ . █ .
            after     · · · ·             . . . .          . ▒ ▒ █

        Args:
            lines: lines of one unit (a batch row and head); each is over tiles 0 to `across`.
            across: tiles in a line.

        Returns:
            Runs of the same tiles, of lines (unit, t), t < across, each over tiles 0 to `lines`.
        """
        units, device = (len(self.offsets) - 1) // lines, self.offsets.device
        offsets = self.offsets.cpu().numpy()
        line = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        # With a line of nothing after each unit's last, in which all of its runs have ended.
        steps = _steps(line + line // lines, self, units * (lines + 1), across)
        place, kind, above = _differences(*steps, units, lines, across)
        unit_line, t = place // across, place % across
        unit, i = unit_line // (lines + 1), unit_line % (lines + 1)
        keys = (unit * across + t) * (lines + 1) + i  # down the columns
        order = keys.argsort(kind="stable")
        keys, kind, above = keys[order], kind[order], above[order]
        starts, stops = keys[kind != SKIP], keys[above != SKIP]  # each run has one of both: they pair up
        offsets = np.zeros(units * across + 1, dtype=np.int32)
        offsets[1:] = np.bincount(starts // (lines + 1), minlength=units * across).cumsum()
        start, stop = ((x % (lines + 1)).astype(np.int32) for x in (starts, stops))
        arrays = offsets, start, stop, kind[kind != SKIP] == FULL
        return Runs(*(torch.from_numpy(x).to(device) for x in arrays))


def _steps(line: IntArray, runs: Runs, lines: int, across: int) -> tuple[IntArray, IntArray]:
    """Lines as steps: ascending keys line * across + tile from which on a kind holds, from tile 0 of each line."""
    start, stop, full = (x.cpu().numpy() for x in (runs.start, runs.stop, runs.full))
    begins, ends = line * across + start, line * across + stop
    kind = np.where(full, FULL, PARTIAL)
    follows = np.zeros(len(ends), dtype=np.bool_)  # another run, or the next line, starts where this one stops
    follows[:-1] = ends[:-1] == begins[1:]
    gaps = ends[~follows & (stop < across)]
    bare = np.ones(lines, dtype=np.bool_)  # lines that begin with nothing
    bare[line[start == 0]] = False
    head = np.flatnonzero(bare) * across
    keys = np.concatenate((begins, gaps, head))
    order = keys.argsort(kind="stable")
    return keys[order], np.concatenate((kind, np.full(len(gaps) + len(head), SKIP)))[order]


def _differences(
    keys: IntArray, kinds: IntArray, units: int, lines: int, across: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Tiles that differ from the tile above, given the steps of all lines: their places, kinds, and the kinds above.

    A place is line * across + tile; above a unit's first line there is nothing.
    """
    size = (lines + 1) * across  # of a unit
    above = keys + across  # the steps of the line before, moved down
    inside = above % size >= across
    above, old = np.append(np.arange(units) * size, above[inside]), np.append(np.full(units, SKIP), kinds[inside])
    order = above.argsort(kind="stable")
    above, old = above[order], old[order]
    merged = np.sort(np.append(keys, above))  # np.unique would import numpy.ma: 30 ms of a first call
    merged = merged[np.append(True, merged[1:] != merged[:-1])]
    # Between neighbouring steps of either line both kinds stay.
    kind = kinds[np.searchsorted(keys, merged, side="right") - 1]
    kind_above = old[np.searchsorted(above, merged, side="right") - 1]
    differ = kind != kind_above
    begin, length = merged[differ], np.diff(merged, append=units * size)[differ]
    place = np.repeat(begin - (length.cumsum() - length), length) + np.arange(length.sum())
    return place, np.repeat(kind[differ], length), np.repeat(kind_above[differ], length)
