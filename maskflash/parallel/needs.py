r"""A mask at the lengths of a sequence -> for each line of tokens its visible pairs, and the keys that it needs.

line 0   ■ · · · · ·  \  area 3     a line's keys are those that any of its rows sees,
         ■ ■ · · · ·  /  keys 0..2  in any batch row and head
line 1   · ■ ■ · · ·  \  area 4
         · · · ■ · ■  /  keys 1..4 and 5..6
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import IntArray
from maskflash.forms.row_intervals import find_row_intervals


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """What lines of `tile` rows compute and need.

    Attributes:
        seq_len: tokens.
        tile: rows of a line; the last line may be shorter.
        area: (lines,) int64, visible pairs, summed over batch rows and query heads.
        offsets: (lines + 1,) int64; line i needs the ranges offsets[i] to offsets[i + 1].
        start: (ranges,) int64, first key of each; those of a line ascend and don't touch.
        stop: (ranges,) int64, one past its last key.
    """

    seq_len: int
    tile: int
    area: IntArray
    offsets: IntArray
    start: IntArray
    stop: IntArray

    def of(self, lines: IntArray) -> tuple[IntArray, IntArray]:
        """The keys that some lines need together: ranges (start, stop) that ascend and don't touch."""
        count = np.diff(self.offsets)[lines]
        first = np.repeat(self.offsets[lines] - np.cumsum(count) + count, count)
        chosen = first + np.arange(len(first))
        _, start, stop = union(np.zeros(len(chosen), dtype=np.int64), self.start[chosen], self.stop[chosen])
        return start, stop


def union(line: IntArray, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Ranges of lines, in any order -> the same tokens in ranges that ascend, line by line, and don't touch."""
    if not len(line):
        return line, start, stop
    order = np.lexsort((start, line))
    line, start, stop = line[order], start[order], stop[order]
    far = int(stop.max()) + 1
    reach = np.maximum.accumulate(stop + line * far)
    begins = np.ones(len(line), dtype=np.bool_)
    begins[1:] = start[1:] + line[1:] * far > reach[:-1]
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(line)) - 1
    return line[first], start[first], reach[last] - line[first] * far


def find_needs(problem: Problem, tile: int) -> Needs:
    """What the lines of a square problem compute and need.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    seen = find_row_intervals(problem)
    lines = -(-problem.q_len // tile)
    row, start, stop = (x.numpy() for x in (seen.rows, seen.start, seen.stop))
    line = row % problem.q_len // tile
    same = problem.batch * problem.heads // (seen.shape[0] * seen.shape[1])
    area = np.zeros(lines, dtype=np.int64)
    np.add.at(area, line, (stop - start) * same)
    line, start, stop = union(line, start, stop)
    offsets = np.concatenate(([0], np.bincount(line, minlength=lines).cumsum()))
    return Needs(problem.q_len, tile, area, offsets, start, stop)
