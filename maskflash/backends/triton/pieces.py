"""Rows of a block map -> pieces of the tiles that they visit, cut evenly, each for one program. On the CPU.

    a row visits     FULL FULL FULL FULL part part part        seven tiles, however many it skips between
    three pieces     ---- ----|---- ----|---- ---- ----

Pieces are cut from what rows see, not from what is stored: a window over a long cache has as many as over a short one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.backends.triton.walks import Walk, Walks

_ROWS: Final = 64  # at most: with more, rows alone are work for all processors
_WIDE: Final = 16  # keys for each row, at least: else there is little to cut
_SHORTEST: Final = 256  # keys of a piece, at least: joining pieces costs time too


@dataclass(frozen=True, slots=True, eq=False)
class KeyPieces:
    """What programs compute.

    Attributes:
        table: (pieces, 10) int32: batch row and head of the map; row tile; part, the piece's number among those of its
            rows; then of the full walk, and of the partial one: run, first step, steps.
        counts: (maps, lines) int32, how many pieces each line of the map has; it stays on the CPU.
        most: the largest of them.
    """

    table: Tensor
    counts: Tensor
    most: int

    def starts(self, shape: tuple[int, int], rows: tuple[int, int, int], line_rows: int) -> Tensor:
        """Where the parts of each row begin among those of all, and how many there are: (rows + 1,) int32.

        Args:
            shape: batch rows and heads that have maps of their own.
            rows: batch rows, heads and q_len of the call.
            line_rows: rows of a line of the map.
        """
        each = self.counts.view(*shape, -1).repeat_interleave(line_rows, 2)[..., : rows[2]].expand(rows)
        return torch.nn.functional.pad(each.flatten().cumsum(0), (1, 0)).int()


def are_few(q_len: int, kv_len: int) -> bool:
    """Whether rows are so few that programs share them, by pieces of the keys."""
    return 0 < q_len <= _ROWS and _WIDE * q_len <= kv_len


def cut(
    walks: Walks,
    shape: tuple[int, int],
    tiles: int,
    per_line: int,
    tokens: int,
    per_tile: int,
    splits: int | None,
    programs: int,
    copies: int,
) -> KeyPieces:
    """Cut the rows of a map.

    Args:
        walks: of the rows, on the CPU.
        shape: batch rows and heads that have maps of their own.
        tiles: row tiles of the kernel in a map.
        per_line: how many of them are in a line of the map.
        tokens: of a step.
        per_tile: steps in a tile of the map.
        splits: pieces of each line, or as many as it has steps; None for pieces of equal length, so many that there
            are programs enough.
        programs: that should run at once.
        copies: programs for each piece.
    """
    steps = walks.counts.sum(0) * per_tile  # of each line: (maps, lines)
    line_of = torch.arange(tiles) // per_line
    if splits is None:
        all_steps = int(steps[:, line_of].sum()) * copies
        length = max(-(-all_steps // programs), -(-_SHORTEST // tokens))
        counts = -(-steps // length)
    else:
        counts = steps.clamp(max=splits)
    counts = counts.clamp(min=1)
    each = counts[:, line_of].flatten()  # pieces of each (map, row tile)
    owner = torch.repeat_interleave(each)
    part = torch.arange(len(owner)) - (each.cumsum(0) - each)[owner]
    unit, tile = owner // tiles, owner % tiles
    line = unit * steps.shape[1] + line_of[tile]
    whole, full = steps.flatten()[line], walks.counts[0].flatten()[line] * per_tile
    first, last = (whole * n // each[owner] for n in (part, part + 1))
    table = [unit // shape[1], unit % shape[1], tile, part]
    for walk, begin, end in (
        (walks.full, first.minimum(full), last.minimum(full)),
        (walks.partial, (first - full).clamp(min=0), (last - full).clamp(min=0)),
    ):
        table += [*_place(walk, line, begin, per_tile), end - begin]
    return KeyPieces(torch.stack(table, 1).int(), counts.int(), int(counts.max()))


def _place(walk: Walk, line: Tensor, step: Tensor, per_tile: int) -> tuple[Tensor, Tensor]:
    """The run of a line's walk in which so many steps are behind, and the step's number along the map."""
    start, stop = walk.start[:-1].long(), walk.stop[:-1].long()
    through = (stop - start).cumsum(0) * per_tile  # steps up to the end of each run
    offsets = walk.offsets.long()[line]
    before = torch.cat((through.new_zeros(1), through))
    at = before[offsets] + step
    run = torch.searchsorted(through, at, right=True)  # one past the last run where nothing is left to walk
    first = torch.cat((start, start.new_zeros(1)))[run]
    return run, first * per_tile + at - before[run]
