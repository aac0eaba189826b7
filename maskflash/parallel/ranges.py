"""Ranges of tokens along lines, in any order -> the same tokens in ranges that ascend, line by line, and don't touch.

line 0    [0, 3) [2, 5) [7, 9)   ->   [0, 5) [7, 9)
line 1    [4, 6) [0, 4)          ->   [0, 6)
"""

from __future__ import annotations

import numpy as np

from maskflash.analysis.runs import BoolArray, IntArray

Ranges = tuple[IntArray, IntArray, IntArray]
"""The line of each range, its first token, and one past its last: three (n,) int64."""


def union(line: IntArray, start: IntArray, stop: IntArray) -> Ranges:
    """Ranges of lines, in any order and none of them empty -> the same tokens in ranges that ascend and don't touch."""
    if not len(line):
        return line, start, stop
    far = int(stop.max()) + 1
    key = line * far + start
    if (key[1:] < key[:-1]).any():
        order = key.argsort(kind="stable")  # which goes through what is sorted in parts at once
        line, stop, key = line[order], stop[order], key[order]
    reach = np.maximum.accumulate(stop + line * far)
    begins = np.ones(len(line), dtype=np.bool_)
    begins[1:] = key[1:] > reach[:-1]
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(line)) - 1
    line = line[first]
    return line, key[first] - line * far, reach[last] - line * far


def closed(ranges: Ranges, gap: int) -> Ranges:
    """Ranges as `union` returns them, without the gaps between those of a line that are shorter than `gap`."""
    line, start, stop = ranges
    apart = (line[1:] != line[:-1]) | (start[1:] - stop[:-1] >= gap)
    first = np.flatnonzero(np.append(True, apart)[: len(line)])
    last = np.append(first[1:], len(line))[: len(first)] - 1
    return line[first], start[first], stop[last]


def spread(first: IntArray, count: IntArray) -> IntArray:
    """`count` consecutive numbers from each `first`, one after the other: (sum of counts,) int64."""
    return np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())


def runs_of(bits: BoolArray) -> Ranges:
    """Where the bits of lines (n, m) are set."""
    padded = np.zeros((len(bits), bits.shape[1] + 2), dtype=np.bool_)
    padded[:, 1:-1] = bits
    line, edge = np.divmod(np.flatnonzero(padded[:, 1:] != padded[:, :-1]), bits.shape[1] + 1)
    return line[::2], edge[::2], edge[1::2]
