"""A problem -> the rows at which each column turns visible or hidden: exactly, and never from all pairs.

Where the intervals of rows that see a column are known, these are their ends. Else they are those of the column's
pieces, or come from the runs of the block map and the pairs of its partial tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import see
from maskflash.analysis.facts import Facts
from maskflash.analysis.intervals import Rows
from maskflash.analysis.problem import Problem
from maskflash.analysis.ways.columns import Pieces

_PIECES_AT_ONCE: Final = 1 << 18
_PAIRS_AT_ONCE: Final = 1 << 21


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """Rows at which columns turn; each column starts hidden, before row 0, so its first change makes it visible.

    Attributes:
        shape: (B, H) of the problem.
        column: (changes,) int64, (b*H + h) * kv_len + kv, ascending.
        row: (changes,) int64, from 0 to q_len - 1, ascending within a column.
    """

    shape: tuple[int, int]
    column: Tensor
    row: Tensor


def find_changes(problem: Problem) -> Changes:
    """The changes of all columns of a problem, for the batch rows and heads of its shape; on the CPU.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    facts = Facts(problem.on_host())
    problem = facts.problem
    if facts.columns is not None and bool(facts.columns.told.all()):
        found = list(_of_intervals(problem, facts.columns))
    elif facts.pieces is not None:
        found = list(_of_pieces(facts.pieces))
    else:
        found = list(_of_tiles(problem, see(facts).block_map))
    empty = torch.zeros(0, dtype=torch.int64, device=problem.device)
    column, row = (torch.cat([empty, *parts]) for parts in (zip(*found, strict=True) if found else ((), ())))
    order = (column * max(problem.q_len, 1) + row).argsort()
    return Changes(problem.shape[:2], column[order], row[order])


def _of_intervals(problem: Problem, columns: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    for start, stop in zip(columns.start, columns.stop, strict=True):
        some = (start < stop).flatten()
        column = some.nonzero()[:, 0]
        yield column, start.flatten()[column]
        within = column[stop.flatten()[column] < problem.q_len]
        yield within, stop.flatten()[within]


def _of_pieces(pieces: Pieces) -> Iterator[tuple[Tensor, Tensor]]:
    problem = pieces.problem
    batch, heads = problem.shape[:2]
    step = max(1, _PIECES_AT_ONCE // pieces.most)
    for b in range(batch):
        for h in range(heads):
            for low in range(0, problem.kv_len, step):
                part = slice(low, min(low + step, problem.kv_len))
                start, visible = (x[:, 0, 0].T for x in pieces.cut(slice(b, b + 1), slice(h, h + 1), part))
                end = torch.cat((start[:, 1:], start.new_full((len(start), 1), problem.q_len)), 1)
                column, piece = (end > start).nonzero(as_tuple=True)
                seen = visible[column, piece]
                before = torch.zeros_like(seen)  # the piece above, in the same column
                before[1:] = seen[:-1] & (column[1:] == column[:-1])
                turns = seen != before
                yield (b * heads + h) * problem.kv_len + low + column[turns], start[column, piece][turns]


def _of_tiles(problem: Problem, block_map: BlockMap) -> Iterator[tuple[Tensor, Tensor]]:
    """Changes inside partial tiles, then those between what lies above and below an edge of tiles."""
    heads, n_q, n_kv = block_map.shape[1:]
    rows, width = problem.block_size
    line, tile = block_map.columns.tiles(full=False)
    device = problem.device
    tops, bottoms = (torch.zeros(len(line), width, dtype=torch.bool, device=device) for _ in range(2))
    within = torch.arange(width, device=device)

    def places(line: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of lines, and which of them there are: (n, width) each."""
        kv = line[:, None] % n_kv * width + within
        return line[:, None] // n_kv * problem.kv_len + kv, kv < problem.kv_len

    at_once = max(1, _PAIRS_AT_ONCE // math.prod(problem.block_size))
    for low in range(0, len(line), at_once):
        part = slice(low, low + at_once)
        unit = line[part, None, None] // n_kv
        q = tile[part, None] * rows + torch.arange(rows, device=device)
        column, inside = places(line[part])
        kv = (column % problem.kv_len if problem.kv_len else column).masked_fill(~inside, 0)
        # Rows beyond the last repeat it: no change.
        bits = problem.visible(unit // heads, unit % heads, q.clamp(max=problem.q_len - 1)[:, :, None], kv[:, None])
        bits = bits & inside[:, None]
        tops[part], bottoms[part] = bits[:, 0], bits[:, -1]
        n, r, c = (bits[:, 1:] != bits[:, :-1]).nonzero(as_tuple=True)
        yield column[n, c], q[n, r + 1]

    # Partial tiles and runs of full ones, each with its bits at either end, by line and place.
    runs = block_map.columns
    full_line = runs.lines()[runs.full]
    column, inside = places(full_line)
    lines = torch.cat((line, full_line))
    start = torch.cat((tile, runs.start[runs.full].long()))
    stop = torch.cat((tile + 1, runs.stop[runs.full].long()))
    order = (lines * (n_q + 1) + start).argsort()
    lines, start, stop = lines[order], start[order], stop[order]
    tops, bottoms = torch.cat((tops, inside))[order], torch.cat((bottoms, inside))[order]
    follows = (lines[1:] == lines[:-1]) & (start[1:] == stop[:-1])
    above, below = torch.zeros_like(tops), torch.zeros_like(bottoms)
    above[1:] = bottoms[:-1] & follows[:, None]
    below[:-1] = follows[:, None]  # the next one compares, at the same edge
    column = places(lines)[0]
    n, c = (tops != above).nonzero(as_tuple=True)
    yield column[n, c], start[n] * rows
    n, c = (bottoms & ~below & (stop * rows < problem.q_len)[:, None]).nonzero(as_tuple=True)
    yield column[n, c], stop[n] * rows
