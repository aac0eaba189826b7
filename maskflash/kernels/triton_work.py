"""Runs of a block map -> what the Triton kernels walk: full and partial tiles apart, and the order to take lines in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskflash.blocks.block_map import Runs


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """Tiles of one kind, line by line.

    Attributes:
        offsets: (lines,) int32, each line's first run.
        tiles: (lines,) int32, how many tiles its runs hold.
        start: (runs + 1,) int32, first tile of a run; one more than there are runs, since a cursor looks ahead.
        stop: (runs + 1,) int32, one past its last tile.
    """

    offsets: Tensor
    tiles: Tensor
    start: Tensor
    stop: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held by the four tensors."""
        return sum(x.nbytes for x in (self.offsets, self.tiles, self.start, self.stop))


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One direction of a block map.

    Attributes:
        full: tiles that need neither mask nor bounds checks.
        partial: tiles that do: partial ones, and full ones in a ragged last column.
        weight: (maps, lines of a map) int64, tiles per line.
    """

    full: Walk
    partial: Walk
    weight: Tensor

    def order(self, tiles: int, per_line: int) -> Tensor:
        """The kernel's own tiles, `per_line` to a line of the map, those with most work first: (maps, tiles) int32."""
        weight = self.weight.repeat_interleave(per_line, 1)[:, :tiles]
        return torch.sort(weight, dim=1, descending=True, stable=True).indices.int()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.full.nbytes + self.partial.nbytes + self.weight.nbytes


def work(runs: Runs, lines_per_map: int, across: int, ragged: bool) -> Work:
    """Split the runs of one direction.

    Args:
        runs: of rows or of columns.
        lines_per_map: lines that one (batch row, head) of the map has.
        across: tiles in a line.
        ragged: the last tile of a line reaches beyond the length.
    """
    line, start, stop = runs.lines(), runs.start.long(), runs.stop.long()
    edge = runs.full & (stop == across) & ragged
    inner = stop - edge.long()
    full = runs.full & (inner > start)
    partial = ~runs.full
    lines = len(runs.offsets) - 1
    # A full tile at a ragged edge becomes the last partial run of its line; sorting by place puts it there.
    places = torch.cat((line[partial] * across + start[partial], line[edge] * across + across - 1))
    order = places.argsort()
    partial_lines = torch.cat((line[partial], line[edge]))[order]
    partial_start = torch.cat((start[partial], stop[edge] - 1))[order]
    partial_stop = torch.cat((stop[partial], stop[edge]))[order]
    whole = _walk(line[full], start[full], inner[full], lines)
    broken = _walk(partial_lines, partial_start, partial_stop, lines)
    weight = (whole.tiles + broken.tiles).long().view(-1, max(lines_per_map, 1))
    return Work(whole, broken, weight)


def _walk(line: Tensor, start: Tensor, stop: Tensor, lines: int) -> Walk:
    """Runs sorted by line."""
    count = torch.bincount(line, minlength=lines)
    tiles = torch.zeros(lines, dtype=torch.int64, device=line.device).index_add_(0, line, stop - start)
    end = torch.zeros(1, dtype=torch.int64, device=line.device)
    return Walk(
        (count.cumsum(0) - count).int(),
        tiles.int(),
        torch.cat((start, end)).int(),
        torch.cat((stop, end)).int(),
    )
