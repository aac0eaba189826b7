"""A problem -> the rows at which each column turns visible or hidden: exactly, and never from all pairs.

Where the intervals of rows that see a column are known, these are their ends. Else they are those of the column's
pieces, or come from the runs of the block map, and where columns have gaps, from the pairs of its partial tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import see
from maskflash.analysis.facts import Facts
from maskflash.analysis.intervals import Rows
from maskflash.analysis.problem import Problem
from maskflash.analysis.rows import Strip, row_spans
from maskflash.analysis.ways.columns import Pieces


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
        found = list(_of_lines(problem, see(facts).block_map.turned(), facts.columns))
    empty = torch.zeros(0, dtype=torch.int64, device=problem.device)
    column, row = (torch.cat([empty, *parts]) for parts in (zip(*found, strict=True) if found else ((), ())))
    order = (column * max(problem.q_len, 1) + row).argsort()
    return Changes(problem.shape[:2], column[order], row[order])


def _of_intervals(problem: Problem, columns: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    for start, stop in zip(columns.start, columns.stop, strict=True):
        yield from _ends(start.flatten(), stop.flatten(), problem.q_len)


def _of_pieces(pieces: Pieces) -> Iterator[tuple[Tensor, Tensor]]:
    problem = pieces.problem
    for b, h, columns in pieces.parts():
        start, visible = (x.flatten(1).T for x in pieces.cut(b, h, columns))
        end = torch.cat((start[:, 1:], start.new_full((len(start), 1), problem.q_len)), 1)
        column, piece = (end > start).nonzero(as_tuple=True)
        seen = visible[column, piece]
        before = torch.zeros_like(seen)  # the piece above, in the same column
        before[1:] = seen[:-1] & (column[1:] == column[:-1])
        turns = seen != before
        first = (b.start * problem.shape[1] + h.start) * problem.kv_len + columns.start
        yield first + column[turns], start[column, piece][turns]


def _of_lines(problem: Problem, block_map: BlockMap, columns: Rows | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Changes by lines of columns, as the rows of the map turned over: one interval each, or strips of bits."""
    edges: list[tuple[Tensor, Tensor]] = []

    def evaluate(b: Tensor, h: Tensor, kv: Tensor, q: Tensor) -> Tensor:
        return problem.visible(b, h, q, kv)

    def take(strip: Strip) -> None:
        edges.append(_edges(strip, problem.q_len))

    for unit, (b, h) in enumerate(product(*map(range, problem.shape[:2]))):
        spans = row_spans(block_map, evaluate, b, h, take, rows=columns)
        ends = _ends(torch.from_numpy(spans.start), torch.from_numpy(spans.stop), problem.q_len)
        for column, row in (*ends, *edges):
            yield unit * problem.kv_len + column, row
        edges.clear()


def _ends(start: Tensor, stop: Tensor, q_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Where one interval of each column, half open, begins and ends."""
    column = (start < stop).nonzero()[:, 0]
    yield column, start[column]
    within = column[stop[column] < q_len]
    yield within, stop[within]


def _edges(strip: Strip, q_len: int) -> tuple[Tensor, Tensor]:
    """Where the bits of a line of columns differ from those before them."""
    column, place = np.nonzero(np.diff(strip.bits, axis=1, prepend=False, append=False))
    row = np.append(strip.columns, strip.columns[-1] + 1)[place]
    inside = row < q_len
    return torch.from_numpy(strip.top + column[inside]), torch.from_numpy(row[inside])
