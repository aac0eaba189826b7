"""Runs of a block map -> what the Triton kernels walk: full and partial tiles apart, and the order to take lines in.

And a mask with its block map -> which of the rows and columns that the kernels load are seen by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.problem import Problem
from maskflash.blocks.runs import Runs

_PAIRS_AT_ONCE: Final = 1 << 21  # pairs evaluated together


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
    def tensors(self) -> tuple[Tensor, ...]:
        """As a kernel's signature has them."""
        return self.offsets, self.tiles, self.start, self.stop


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
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return *self.full.tensors, *self.partial.tensors, self.weight


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


def seen(problem: Problem, block_map: BlockMap, *, rows: bool) -> Tensor | None:
    """Whether each row sees anything, or each column is seen: what nobody sees must be zeros before the kernels run.

    A full tile settles all of its rows and columns; the others take a few samples, then all their pairs.

    Args:
        problem: the mask.
        block_map: of the mask.
        rows: rows, else columns.

    Returns:
        (B, H, q_len or kv_len) bool with the map's own B and H, True also where no visited tile is; None where all of
        it is True.
    """
    batch, heads, *counts = block_map.shape
    axis = 0 if rows else 1
    n, size, step = counts[axis], block_map.block_size[axis], block_map.block_size[1 - axis]
    lengths = (block_map.q_len, block_map.kv_len)
    runs = block_map.rows if rows else block_map.columns
    known = torch.ones(batch * heads * n, size, dtype=torch.bool, device=block_map.device)
    line, position = runs.tiles(full=False)
    known[line] = False
    known[runs.lines()[runs.full]] = True
    inside = torch.arange(n * size, device=known.device).view(n, size) < lengths[axis]
    known |= ~inside.repeat(batch * heads, 1)

    own, other = torch.arange(size, device=known.device), torch.arange(step, device=known.device)
    # The ends of a tile's other side, and its diagonal: enough for most masks.
    ends = other[[0, -1]].expand(size, 2)
    samples = torch.cat((ends, (own * step // size)[:, None]), 1)
    for places in (samples, other.expand(size, step)):
        open_tiles = ~known[line].all(1)
        line, position = line[open_tiles], position[open_tiles]
        pieces = (x.split(max(1, _PAIRS_AT_ONCE // places.numel())) for x in (line, position))
        for some, at in zip(*pieces, strict=True):
            b, h = (some // n // heads)[:, None, None], (some // n % heads)[:, None, None]
            mine = (some % n * size)[:, None, None] + own[:, None]
            theirs = at[:, None, None] * step + places
            mine, theirs = mine.clamp(max=lengths[axis] - 1), theirs.clamp(max=lengths[1 - axis] - 1)
            q, kv = (mine, theirs) if rows else (theirs, mine)
            bits = problem.visible(b, h, q, kv).expand(len(some), *places.shape).any(2)
            # Tiles of one line may lie in one piece: add, since writes to one place would race.
            counted = torch.zeros(known.shape, dtype=torch.int32, device=known.device).index_add_(0, some, bits.int())
            known |= counted > 0
    return None if bool(known.all()) else known.view(batch, heads, n * size)[..., : lengths[axis]]
