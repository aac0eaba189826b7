"""A problem -> the rows at which each column turns visible or hidden: exactly, and never from all pairs.

Where the intervals of rows that see a column are known, these are their ends. Else they are those of the column's
pieces, or where two rows differ whose intervals or pieces are known. Else they come from the runs of the block map, and
where columns have gaps, from the pairs of its partial tiles.
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
    return _find(Facts(problem.on_host()))


def find_runs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The visible runs of all columns: the column of each, numbered as in `Changes`, its first row, one past its last.

    Raises:
        MaskIndexError: as `find_changes`.
    """
    facts = Facts(problem.on_host())
    if facts.columns is None or not bool(facts.columns.told.all()):
        changes = _find(facts)
        return _runs(changes.column, changes.row, problem.q_len)
    start, stop = (x.flatten(1).T for x in (facts.columns.start, facts.columns.stop))  # (columns, intervals of each)
    some = start < stop
    return some.nonzero()[:, 0], start[some], stop[some]


def _find(facts: Facts) -> Changes:
    problem = facts.problem
    found = _known(problem, facts.columns, facts.pieces)
    if found is None:
        across = _known(problem.turned(), facts.rows, facts.pieces_of_rows)
        if across is not None:
            return _turned(_sorted(problem.turned(), across), problem)
        found = _of_lines(problem, see(facts).block_map.turned(), facts.columns)
    return _sorted(problem, found)


def _known(problem: Problem, columns: Rows | None, pieces: Pieces | None) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Columns and rows of changes, where intervals or pieces of the columns tell; else None."""
    if columns is not None and bool(columns.told.all()):
        return _of_intervals(problem, columns)
    return None if pieces is None else _of_pieces(pieces)


def _sorted(problem: Problem, found: Iterator[tuple[Tensor, Tensor]]) -> Changes:
    parts = list(found)
    empty = torch.zeros(0, dtype=torch.int64)
    column, row = (torch.cat([empty, *part]) for part in (zip(*parts, strict=True) if parts else ((), ())))
    order = (column * max(problem.q_len, 1) + row).argsort()
    return Changes(problem.shape[:2], column[order], row[order])


def _turned(changes: Changes, problem: Problem) -> Changes:
    """The changes of a problem's columns from those of its rows.

    A column turns at the rows that see it and not the one before, or that one and not it: where the runs of two rows,
    one below the other, differ. These are the runs of all ends of both; two that are alike leave nothing between them.

        row 3    ■ ■ ■ ■ · ·    ends 0, 4
        row 4    · · ■ ■ ■ ·    ends 2, 5    columns 0, 1 and 4 turn at row 4
    """
    rows, columns = problem.q_len, problem.kv_len
    line, place = changes.column, changes.row
    goes_on = line % max(rows, 1) < rows - 1
    both, ends = torch.cat((line, line[goes_on] + 1)), torch.cat((place, place[goes_on]))
    order = (both * max(columns, 1) + ends).argsort()
    line, first, last = _runs(both[order], ends[order], columns)
    length = last - first
    owner = torch.repeat_interleave(torch.arange(len(line)), length)
    column = first[owner] + torch.arange(len(owner)) - (length.cumsum(0) - length)[owner]
    turned = line[owner] // max(rows, 1) * columns + column
    order = turned.argsort(stable=True)  # of one column the rows ascend already
    return Changes(changes.shape, turned[order], line[owner][order] % max(rows, 1))


def _runs(line: Tensor, place: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lines and the places at which they turn, sorted -> line, start and stop of runs; the last may go to the end."""
    turns = torch.bincount(line)
    before = turns.cumsum(0) - turns
    opens = (torch.arange(len(line)) - before[line]) % 2 == 0
    closes = torch.roll(place, -1)
    goes_on = torch.roll(line, -1) == line
    goes_on[-1:] = False
    return line[opens], place[opens], closes.where(goes_on, torch.full_like(closes, length))[opens]


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
