"""Runs of a block map -> what the Triton kernels walk: full and partial tiles apart, and the order to take lines in.

    a line of the map       skip  FULL  FULL  part  part  FULL  part        seven tiles, five runs
    full walk                     1-3               5-6                     two runs, three tiles: no mask, no bounds
    partial walk                        3-5               6-7               two runs, three tiles

    ragged last column      a full last tile that reaches beyond the length is walked as a partial one
    order                   lines with most tiles first, so that no processor begins a long one when others are done
    forward, dQ             walk the map's rows
    dK and dV (dkdv)        walk its columns

And a mask's analysis -> which of the rows and columns that the kernels load are seen by nobody. All of it on
the CPU; `plan.py` takes it to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.runs import Runs
from maskflash.analysis.seen import Seen

_PAIRS_AT_ONCE: Final = 1 << 21  # pairs evaluated together
_MANY_PAIRS: Final = 1 << 19  # fewer are evaluated sooner than it is found what rows see


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
        """The fields in order."""
        return self.offsets, self.tiles, self.start, self.stop

    def named(self, kind: str) -> dict[str, Tensor]:
        """As arguments of a kernel."""
        return {f"{kind}_{field}": getattr(self, field) for field in self.__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class Walks:
    """One direction of a block map.

    Attributes:
        full: tiles that need neither mask nor bounds checks.
        partial: tiles that do: partial ones, and full ones in a ragged last column.
        counts: (2, maps, lines of a map) int64, full and partial tiles of each line; it stays on the CPU.
    """

    full: Walk
    partial: Walk
    counts: Tensor

    def order(self, tiles: int, per_line: int) -> Tensor:
        """The kernel's own tiles, `per_line` to a line of the map, those with most work first: (maps, tiles) int32."""
        weight = self.counts.sum(0).repeat_interleave(per_line, 1)[:, :tiles]
        return torch.sort(weight, dim=1, descending=True, stable=True).indices.int()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What goes to the device: the full walk, then the partial one."""
        return *self.full.tensors, *self.partial.tensors

    @property
    def named(self) -> dict[str, Tensor]:
        """As arguments of a kernel."""
        return {**self.full.named("full"), **self.partial.named("partial")}


def split_runs(runs: Runs, lines_per_map: int, across: int, ragged: bool) -> Walks:
    """Split the runs of one direction into a full and a partial walk.

    Args:
        runs: of rows or of columns.
        lines_per_map: lines that one (batch row, head) of the map has.
        across: tiles in a line.
        ragged: the last tile of a line reaches beyond the length.
    """
    lines, line = len(runs.offsets) - 1, runs.lines()
    edge = runs.full & (runs.stop == across) & ragged
    inner = runs.stop - edge.int()
    # A full run may end in a ragged tile. It is the last of its line, so it is in place as the line's last partial one.
    full = _walk_of(line, runs.start, inner, runs.full & (inner > runs.start), lines)
    partial = _walk_of(line, torch.where(edge, runs.stop - 1, runs.start), runs.stop, ~runs.full | edge, lines)
    counts = torch.stack((full.tiles, partial.tiles)).long()
    return Walks(full, partial, counts.view(2, -1, max(lines_per_map, 1)))


def _walk_of(line: Tensor, start: Tensor, stop: Tensor, kept: Tensor, lines: int) -> Walk:
    """The kept ones of runs sorted by line."""
    line, start, stop = line[kept], start[kept], stop[kept]
    runs = torch.bincount(line, minlength=lines)
    tiles = torch.zeros(lines, dtype=torch.int32).index_add_(0, line, stop - start)
    return Walk((runs.cumsum(0) - runs).int(), tiles, *(pad(end, (0, 1)) for end in (start, stop)))


def seen(found: Seen, *, rows: bool) -> Tensor | None:
    """Whether each row sees anything, or each column is seen: what nobody sees must be zeros before the kernels run.

    A full tile settles all of its rows and columns. For the others the analysis tells what rows see, or by which rows
    columns are seen; where it doesn't, or pairs are few, a few samples are taken, and then all pairs.

    Args:
        found: the mask's analysis.
        rows: rows, else columns.

    Returns:
        (B, H, q_len or kv_len) bool with the map's own B and H, True also where no visited tile is; None where all of
        it is True.
    """
    block_map = found.block_map
    batch, heads, *counts = block_map.shape
    axis = 0 if rows else 1
    n, size, step = counts[axis], block_map.block_size[axis], block_map.block_size[1 - axis]
    lengths = (block_map.q_len, block_map.kv_len)
    runs = block_map.rows if rows else block_map.columns
    line, position = runs.tiles(full=False)
    if not len(line):
        return None
    known = torch.arange(n * size).view(n, size) >= lengths[axis]
    known = known.repeat(batch * heads, 1)
    unsettled, settled = torch.zeros(2, len(known), dtype=torch.bool)
    unsettled[line] = True
    settled[runs.lines()[runs.full]] = True
    known |= (settled | ~unsettled)[:, None]

    own, other = torch.arange(size), torch.arange(step)
    # The ends of a tile's other side, and its diagonal: enough for most masks.
    ends = other[[0, -1]].expand(size, 2)
    samples = torch.cat((ends, (own * step // size)[:, None]), 1)
    every = other.expand(size, step)
    for places in (samples, every):
        left = (~known[line].all(1)).nonzero()[:, 0]
        if not len(left):
            return None
        line, position = line[left], position[left]
        if len(line) * every.numel() > _MANY_PAIRS and (told := found.rows() if rows else found.columns()):
            some = pad(told.count > 0, (0, n * size - lengths[axis]), value=True)
            known |= some.reshape(known.shape)
            break
        pieces = (x.split(max(1, _PAIRS_AT_ONCE // places.numel())) for x in (line, position))
        for some, at in zip(*pieces, strict=True):
            b, h = (some // n // heads)[:, None, None], (some // n % heads)[:, None, None]
            mine = (some % n * size)[:, None, None] + own[:, None]
            theirs = at[:, None, None] * step + places
            mine, theirs = mine.clamp(max=lengths[axis] - 1), theirs.clamp(max=lengths[1 - axis] - 1)
            q, kv = (mine, theirs) if rows else (theirs, mine)
            bits = found.problem.visible(b, h, q, kv).expand(len(some), *places.shape).any(2)
            # Tiles of one line may lie in one piece: add, since writes to one place would race.
            counted = torch.zeros(known.shape, dtype=torch.int32).index_add_(0, some, bits.int())
            known |= counted > 0
    return None if bool(known.all()) else known.view(batch, heads, n * size)[..., : lengths[axis]]
