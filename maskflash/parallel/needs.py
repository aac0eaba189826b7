r"""A mask at the lengths of a sequence -> for each line of tokens its visible pairs, and the keys that it needs.

line 0   ■ · · · · ·  \  area 3     a line's keys are those that any of its rows sees,
         ■ ■ · · · ·  /  keys 0..2  in any batch row and head
line 1   · ■ ■ · · ·  \  area 4
         · · · ■ · ■  /  keys 1..4 and 5..6

What rows see tells them, or what columns are seen by, or what pairs at each distance are. Only where nothing of these
is known are the pairs of partial tiles evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.classify import see
from maskflash.analysis.facts import Facts
from maskflash.analysis.problem import LARGEST_SUM, Problem
from maskflash.analysis.runs import BoolArray, IntArray
from maskflash.parallel.alike import find_alike
from maskflash.parallel.distance import only_distance_counts
from maskflash.parallel.ranges import Ranges, closed, runs_of, spread, union
from maskflash.parallel.tiled import TiledNeeds, by_tiles

_WIDTH: Final = 128  # columns of a tile
_PAIRS_AT_ONCE: Final = 1 << 20
_MOST_RANGES: Final = 1 << 22  # of all lines: 100 MB


@dataclass(frozen=True, eq=False)
class Needs:
    """What lines of `tile` rows compute and need.

    Attributes:
        seq_len: tokens.
        tile: rows of a line; the last line may be shorter.
        area: (lines,) int64, visible pairs, summed over batch rows and query heads.
        offsets: (lines + 1,) int64; line i needs the ranges offsets[i] to offsets[i + 1].
        start: (ranges,) int64, first key of each; those of a line ascend and don't touch.
        stop: (ranges,) int64, one past its last key.
        exact: whether some row of a line sees each of its keys. Where there would be more than four million ranges,
            short gaps between them are closed, and the keys in these count as needed.
    """

    seq_len: int
    tile: int
    area: IntArray
    offsets: IntArray
    start: IntArray
    stop: IntArray
    exact: bool = True

    def of(self, lines: IntArray) -> tuple[IntArray, IntArray]:
        """The keys that some lines need together: ranges (start, stop) that ascend and don't touch."""
        chosen = spread(self.offsets[lines], np.diff(self.offsets)[lines])
        _, start, stop = union(np.zeros(len(chosen), dtype=np.int64), self.start[chosen], self.stop[chosen])
        return start, stop

    @cached_property
    def tiled(self) -> TiledNeeds:
        """The same by tiles."""
        line = np.repeat(np.arange(len(self.area)), np.diff(self.offsets))
        return by_tiles(self.tile, self.seq_len, (line, self.start, self.stop))


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """What a way finds: (rows,) visible pairs of each row, or (lines,) of each line; and the ranges of lines."""

    area: IntArray
    needed: Ranges
    exact: bool = True


def find_needs(problem: Problem, tile: int) -> Needs:
    """What the lines of a square problem compute and need.

    Args:
        problem: as many keys as queries.
        tile: rows of a line.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    facts = Facts(replace(problem.on_host(), block_size=(tile, _WIDTH)))
    found = _by_rows(facts) or _by_distances(facts.problem) or _by_columns(facts) or _by_tiles(facts)
    batch, heads, lines, _ = facts.problem.shape
    area = found.area
    if len(area) != lines:
        area = np.add.reduceat(area, np.arange(0, len(area), tile))
    line, start, stop = found.needed
    gap = 1
    while len(line) > _most(lines):
        gap *= 2
        line, start, stop = closed((line, start, stop), gap)
    offsets = np.concatenate(([0], np.bincount(line, minlength=lines).cumsum()))
    alike = problem.batch * problem.heads // (batch * heads)
    return Needs(problem.q_len, tile, area * alike, offsets, start, stop, found.exact and gap == 1)


def _by_rows(facts: Facts) -> _Told | None:
    """Where the intervals of rows are known."""
    rows, tile = facts.rows, facts.problem.block_size[0]
    if rows is None or not bool(rows.told.all()):
        return None
    area = rows.count.sum((0, 1)).numpy()
    line = np.arange(len(area)) // tile
    parts = []
    for b, h in product(*map(range, facts.problem.shape[:2])):
        start, stop = rows.start[:, b, h].numpy(), rows.stop[:, b, h].numpy()
        some = start < stop
        parts.append(union(np.broadcast_to(line, start.shape)[some], start[some], stop[some]))
    return _Told(area, _joined(parts))


def _by_distances(problem: Problem) -> _Told | None:
    """Where a pair is visible by its distance alone: one pair of each distance is evaluated.

    Rows t to e see keys at distances a to z (half open) where they are at [t - z + 1, e - a).
    """
    if not only_distance_counts(problem.expr) or problem.largest() >= LARGEST_SUM:
        return None
    length, (tile, _) = problem.q_len, problem.block_size
    area = np.zeros(length, dtype=np.int64)
    parts, exact = [], True
    for b, h in product(*map(range, problem.shape[:2])):
        bits = _at_distances(problem, b, h)
        before = np.concatenate(([0], bits.cumsum()))
        area += before[length : 2 * length] - before[:length]  # row q has the distances q - length + 1 to q
        _, start, stop = runs_of(bits[None])
        found, whole = _of_distances(start - length + 1, stop - length + 1, length, tile)
        parts.append(found)
        exact &= whole
    return _Told(area, _joined(parts), exact)


def _at_distances(problem: Problem, b: int, h: int) -> BoolArray:
    """Whether pairs at distances 1 - q_len to q_len - 1 are visible."""
    distance = torch.arange(1 - problem.q_len, problem.q_len)
    at = torch.tensor(b), torch.tensor(h)
    parts = [
        problem.visible(*at, part.clamp(min=0), (-part).clamp(min=0)).expand(len(part))
        for part in distance.split(_PAIRS_AT_ONCE)
    ]
    bits: BoolArray = torch.cat(parts).numpy()
    return bits


def _of_distances(start: IntArray, stop: IntArray, length: int, tile: int) -> tuple[Ranges, bool]:
    """What lines need of the distances at which keys are visible, and whether that is exact."""
    whole, rest = divmod(length, tile)
    parts, exact = [], True
    for first, last, rows in ((0, whole, tile), (whole, whole + 1, rest)):
        gap = rows  # the ranges of distances closer than this have keys without a gap
        while rows and first < last:
            _, near, far = closed((np.zeros_like(start), start, stop), gap)
            low = np.clip((near - rows) // tile + 1, first, last)
            count = np.clip(-(-(length + far - 1) // tile), low, last) - low
            if count.sum() <= _most(whole + 1):
                line, which = spread(low, count), np.repeat(np.arange(len(low)), count)
                begin, end = line * tile - far[which] + 1, line * tile + rows - near[which]
                parts.append((line, np.maximum(begin, 0), np.minimum(end, length)))
                break
            gap, exact = gap * 2, False
    return _joined(parts), exact


def _by_columns(facts: Facts) -> _Told | None:
    """Where the intervals of rows that see a column are known: they are lines that need it."""
    columns, problem = facts.columns, facts.problem
    if columns is None or not bool(columns.told.all()):
        return None
    tile, length = problem.block_size[0], problem.q_len
    start, stop = columns.start.numpy(), columns.stop.numpy()
    some = start < stop
    column = np.broadcast_to(np.arange(length), start.shape)[some]
    turns = np.bincount(start[some], minlength=length + 1) - np.bincount(stop[some], minlength=length + 1)
    seen_by = union(column, start[some] // tile, -(-stop[some] // tile))
    width = 1
    while True:
        first, count = _differences(*seen_by, problem.shape[2])
        if count.sum() <= 2 * _most(problem.shape[2]):
            break
        width *= 2  # columns are taken together, before their lines are listed
        seen_by = union(seen_by[0] // 2, *seen_by[1:])
    across = -(-length // width) + 1
    column, line = np.divmod(spread(first, count), problem.shape[2] + 1)
    ends = np.sort(line * across + column)  # by turns where a line's ranges start and stop
    line, start = np.divmod(ends[::2], across)
    needed = line, start * width, np.minimum((ends[1::2] - line * across) * width, length)
    return _Told(turns.cumsum()[:-1], needed, width == 1)


def _differences(column: IntArray, start: IntArray, stop: IntArray, lines: int) -> tuple[IntArray, IntArray]:
    """Where a line has a column and not the one before it, or that one and not it: column * (lines + 1) + line.

    Columns' ranges of lines are as `union` returns them. The ends of two columns' ranges, taken together and sorted,
    are by turns where such lines begin and end.

    Returns:
        first, count: (n,) int64, the first of consecutive numbers, and how many there are, which may be none.
    """
    far = lines + 1
    own = np.concatenate((column * far + start, column * far + stop))
    ends = np.sort(np.concatenate((own, own + far)))
    return ends[::2], ends[1::2] - ends[::2]


def _by_tiles(facts: Facts) -> _Told:
    """Of the tiles that are visited: all keys of full ones, and those that some row sees of partial ones."""
    problem, block_map = facts.problem, see(facts).block_map
    (tile, width), length, lines = problem.block_size, problem.q_len, problem.shape[2]
    runs = block_map.rows
    line, start, stop = (x[runs.full].numpy().astype(np.int64) for x in (runs.lines() % lines, runs.start, runs.stop))
    parts = [(line, start * width, np.minimum(stop * width, length))]
    area = np.zeros(lines, dtype=np.int64)
    np.add.at(area, line, (parts[0][2] - parts[0][1]) * np.minimum(tile, length - line * tile))
    partial = block_map.partial_tiles()
    count, needed, kind = _of_kinds(problem, partial)
    _, _, line, column = partial.numpy().T
    np.add.at(area, line, count[kind])
    place, start, stop = runs_of(needed)
    each = np.bincount(place, minlength=len(needed))
    chosen, first = spread((each.cumsum() - each)[kind], each[kind]), np.repeat(column * width, each[kind])
    parts.append((np.repeat(line, each[kind]), start[chosen] + first, stop[chosen] + first))
    return _Told(area, _joined(parts))


def _of_kinds(problem: Problem, tiles: Tensor) -> tuple[IntArray, BoolArray, IntArray]:
    """Visible pairs of each kind of tile, (kinds,); the columns that its rows see, (kinds, width); each tile's kind."""
    kind = find_alike(problem, tiles)
    examples = tiles[torch.from_numpy(np.unique(kind, return_index=True)[1])]
    rows, width = problem.block_size
    count, needed = np.zeros(len(examples), dtype=np.int64), np.zeros((len(examples), width), dtype=np.bool_)
    done = 0
    for some in examples.split(max(1, _PAIRS_AT_ONCE // (rows * width))):
        bits, here = _bits(problem, some), slice(done, done := done + len(some))
        count[here], needed[here] = np.count_nonzero(bits, axis=(1, 2)), np.any(bits, axis=1)
    return count, needed, kind


def _bits(problem: Problem, tiles: Tensor) -> BoolArray:
    """Every pair of some tiles, given as (b, h, i, j): (n, rows, columns), False beyond the lengths."""
    rows, columns = problem.block_size
    b, h, i, j = (x[:, None, None] for x in tiles.T)
    q, kv = i * rows + torch.arange(rows)[:, None], j * columns + torch.arange(columns)
    last = problem.q_len - 1
    visible = problem.visible(b, h, q.clamp(max=last), kv.clamp(max=last))
    bits: BoolArray = (visible & (q <= last) & (kv <= last)).numpy()
    return bits


def _most(lines: int) -> int:
    """How many ranges lines may have together: at least one each."""
    return max(_MOST_RANGES, lines)


def _joined(parts: list[Ranges]) -> Ranges:
    """The ranges of all parts."""
    return union(*(np.concatenate(x) for x in zip(*parts, strict=True)))
