"""A problem whose rows, and whose columns, fall into few groups that its mask treats alike -> its map and rows' hulls.

What a mask makes of a row alone (`cell[q]`, `q // 64`, `flag[q]`) says which group the row is in, wherever it stands.
Two rows of one group see the same columns, so one pair of each two groups is all that is evaluated:

    cell of each row                     what groups see         a tile of rows and columns
    0 0 0 1 1 | 1 1 2 2 0 | ...              0 1 2               its rows are of groups 1, 2 and 0,
                                           0 █ █ ·               its columns of groups 0 and 1:
    groups of each tile                    1 █ █ █   ->          full, if they all see those,
    0 1       | 1 2 0     | ...            2 · █ █               skip, if none does; here partial

The groups that a tile has are joined by `or` and by `and` of whole lines of bits, first along rows, then along columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import BoolArray, IntArray, Runs
from maskflash.analysis.ways.separate import one_sided
from maskflash.expr.evaluate import every_value, reached
from maskflash.expr.nodes import Expr

_Words = npt.NDArray[np.uint64]  # bits, 64 in each, along the last axis

_TOKENS: Final = 4  # for each group, on average along both sides
_FEW_PAIRS: Final = 1 << 20  # of groups; for more of them
_MORE_TOKENS: Final = 16
_MOST_PAIRS: Final = 1 << 29  # their bits take 64 MiB
_PAIRS_AT_ONCE: Final = 1 << 21  # evaluated together
_WORDS_AT_ONCE: Final = 1 << 20  # joined together
_LINES_AT_ONCE: Final = 512  # of tiles


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """The groups of one side's tokens, for one batch row and head; numbered as they first occur.

    Attributes:
        first: (groups,) the first token of each.
        start: (runs,) where neighbours of one group begin.
        stop: (runs,) where they end.
        group: (runs,) their group.
    """

    first: Tensor
    start: Tensor
    stop: Tensor
    group: Tensor

    def of_tiles(self, block: int) -> tuple[IntArray, IntArray]:
        """The groups that tiles of `block` tokens have, tile by tile, each once; and where each tile's begin."""
        start, stop, group = (x.numpy() for x in (self.start, self.stop, self.group))
        groups, first = len(self.first), start // block
        count = (stop - 1) // block - first + 1
        tile = np.repeat(first - (count.cumsum() - count), count) + np.arange(count.sum())
        keys = np.sort(tile * groups + np.repeat(group, count))
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        return keys % groups, np.searchsorted(keys, np.arange(-(-stop[-1] // block)) * groups)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Of each group one past its last token, and how many it has."""
        last, count = torch.zeros_like(self.first), torch.zeros_like(self.first)
        last.scatter_reduce_(0, self.group, self.stop, "amax")
        return last, count.scatter_add_(0, self.group, self.stop - self.start)

    def of_tokens(self) -> Tensor:
        """The group of each token."""
        return torch.from_numpy(np.repeat(self.group.numpy(), (self.stop - self.start).numpy()))


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups of a problem's rows and columns, for each batch row and head of its shape, in order.

    Attributes:
        problem: what was asked.
        rows: of the rows.
        columns: of the columns.
    """

    problem: Problem
    rows: tuple[Alike, ...]
    columns: tuple[Alike, ...]

    def block_map(self) -> BlockMap:
        """The map, from one pair of each two groups."""
        rows = Runs.joined([Runs.from_lattice(torch.from_numpy(kinds)) for kinds in self._kinds()])
        return self.problem.block_map(rows)

    def turned(self) -> Groups:
        """The groups of the problem with rows and columns swapped."""
        return Groups(self.problem.turned(), self.columns, self.rows)

    def seen(self) -> Rows:
        """What rows see: their hulls, and how many columns."""
        problem = self.problem
        found = torch.empty(3, len(self.rows), problem.q_len, dtype=torch.int64)
        for unit, (rows, columns) in enumerate(zip(self.rows, self.columns, strict=True)):
            last, count = columns.ends()
            order = last.argsort(descending=True)
            parts = []
            for bits in map(torch.from_numpy, self._evaluated(unit)):
                number = (bits.double() @ count.double()).long()
                # The first group that is seen, in order of their first tokens, and of their last.
                start, stop = columns.first[_first(bits)], last[order[_first(bits[:, order])]]
                parts.append(torch.stack((start, torch.where(number > 0, stop, start), number)))
            found[:, unit] = torch.cat(parts, 1)[:, rows.of_tokens()]
        start, stop, number = found.view(3, *problem.shape[:2], problem.q_len)
        group = torch.stack([rows.of_tokens() for rows in self.rows]).view(number.shape)
        return Rows(start[None], stop[None], number, group)

    def _kinds(self) -> Iterator[npt.NDArray[np.int8]]:
        """Kinds of all tiles, some lines of tiles at a time."""
        height, width = self.problem.block_size
        for unit, (rows, columns) in enumerate(zip(self.rows, self.columns, strict=True)):
            seen = np.concatenate([_packed(bits) for bits in self._evaluated(unit)])
            of_rows, of_columns = rows.of_tiles(height), columns.of_tiles(width)
            groups, lines = len(columns.first), len(of_rows[1])
            for top in range(0, lines, _LINES_AT_ONCE):
                bottom = min(top + _LINES_AT_ONCE, lines)
                kinds = np.zeros((bottom - top, len(of_columns[1])), dtype=np.int8)
                for join in (np.bitwise_or, np.bitwise_and):  # some of a tile's groups see some, all see all
                    bits = _unpacked(_joined(join, seen, *of_rows, top, bottom), groups)
                    kinds += _unpacked(_joined(join, _packed(bits.T), *of_columns), bottom - top).T
                yield kinds

    def _evaluated(self, unit: int) -> Iterator[BoolArray]:
        """What the groups of rows of one batch row and head see of its groups of columns, some at a time."""
        b, h = torch.tensor(divmod(unit, self.problem.shape[1])).unbind()
        columns = self.columns[unit].first
        for rows in self.rows[unit].first.split(max(1, _PAIRS_AT_ONCE // len(columns))):
            yield self.problem.visible(b, h, rows[:, None], columns).expand(len(rows), len(columns)).numpy()


def find_groups(problem: Problem) -> Groups | None:
    """The groups of a problem on the CPU; None where there are so many that nothing is gained."""
    if 0 in problem.shape:
        return None
    pairs = problem.q_len * problem.kv_len
    most = min(pairs // _TOKENS**2, max(_FEW_PAIRS, pairs // _MORE_TOKENS**2), _MOST_PAIRS)
    of_rows, of_columns = one_sided(problem.expr)
    least = _least(of_columns, "kv", problem.kv_len)
    if _least(of_rows, "q", problem.q_len) * least > most:
        return None
    rows = _alike(problem, of_rows, 0, most // least)
    if rows is None:
        return None
    columns = _alike(problem, of_columns, 1, most // max(len(alike.first) for alike in rows))
    return None if columns is None else Groups(problem, rows, columns)


def _least(parts: tuple[Expr, ...], index: str, length: int) -> int:
    """How many groups there are at least, at a glance."""
    return length if any(part.nodes[-1].op == index for part in parts) else 1


def _alike(problem: Problem, parts: tuple[Expr, ...], axis: int, most: int) -> tuple[Alike, ...] | None:
    """The groups of tokens of which all these parts are the same, by batch row and head; None where too many."""
    batch, heads = problem.shape[:2]
    length, pairs = (problem.q_len, problem.kv_len)[axis], problem.along(axis)
    keys = [key for part in parts for key in _keys(problem, part, pairs)]
    known: dict[tuple[int, ...], Alike] = {}  # of those keys that a batch row and head has
    found: list[Alike] = []
    for b in range(batch):
        for h in range(heads):
            at = [(min(b, len(key) - 1), min(h, key.shape[1] - 1)) for key in keys]
            own = tuple(x for place in at for x in place)
            if own not in known:
                values = [key[place].expand(length) for key, place in zip(keys, at, strict=True)]
                known[own] = _grouped(values, length)
                if len(known[own].first) > most:
                    return None
            found.append(known[own])
    return tuple(found)


def _keys(problem: Problem, part: Expr, pairs: dict[str, Tensor]) -> list[Tensor]:
    """A part's value at every token, and where it fails: integers (B or 1, H or 1, length or 1)."""
    values, faults = every_value(part, problem.inputs, pairs)
    keys = [_exact(values[-1])]
    if any(fault is not None and bool(fault.any()) for fault in faults):
        truth = [value.to(torch.bool) for value in values]
        reach = reached(part, truth, truth)
        keys += [(fault & here).long() for fault, here in zip(faults, reach, strict=True) if fault is not None]
    return [key[(None,) * (3 - key.ndim)] for key in keys]


def _exact(values: Tensor) -> Tensor:
    """Integers that are equal only where the values are, to the bit."""
    if values.dtype.is_floating_point:
        values = values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])
    return values.long()


def _grouped(keys: list[Tensor], length: int) -> Alike:
    """The groups of tokens with equal keys, each (length,)."""
    changed = np.zeros(length, dtype=np.bool_)
    changed[0] = True
    arrays = [key.numpy() for key in keys]
    for key in arrays:
        changed[1:] |= key[1:] != key[:-1]
    start = np.flatnonzero(changed)
    group = np.zeros_like(start)
    for key in arrays:
        number = _numbered(key[start])
        group = _numbered(group * (number.max() + 1) + number)
    # Numbered anew, as they first occur.
    first = np.empty(group.max() + 1, dtype=np.int64)
    first[group[::-1]] = start[::-1]
    order = first.argsort()
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Alike(*map(torch.from_numpy, (first[order], start, np.append(start[1:], length), place[group])))


def _numbered(values: IntArray) -> IntArray:
    """Values as numbers from 0, in their order. In numpy: torch hands the sort to threads, and waits for them."""
    order = values.argsort(kind="stable")
    ordered = values[order]
    number = np.empty_like(order)
    number[order] = np.append(0, (ordered[1:] != ordered[:-1]).cumsum())
    return number


def _first(bits: Tensor) -> Tensor:
    """The first bit of each line that is set; 0 where none is."""
    return torch.from_numpy(bits.numpy().argmax(1))


def _joined(
    join: np.ufunc, words: _Words, groups: IntArray, begins: IntArray, top: int = 0, bottom: int | None = None
) -> _Words:
    """The words of the groups that each tile has, joined; of tiles top to bottom."""
    bottom = len(begins) if bottom is None else bottom
    ends = np.append(begins, len(groups))
    most = max(1, _WORDS_AT_ONCE // words.shape[1])  # groups whose words are held together
    parts: list[_Words] = []
    while top < bottom:
        after = int(np.searchsorted(ends, ends[top] + most, side="right")) - 1
        after = min(max(after, top + 1), bottom)
        parts.append(join.reduceat(words[groups[ends[top] : ends[after]]], ends[top:after] - ends[top], axis=0))
        top = after
    return np.concatenate(parts)


def _packed(bits: BoolArray) -> _Words:
    """Bits (n, m) in words (n, ceil(m / 64)), the rest 0."""
    packed = np.packbits(np.ascontiguousarray(bits), axis=1)  # several times faster where it lies in order
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def _unpacked(words: _Words, count: int) -> BoolArray:
    """The first bits of words: (n, count)."""
    return np.unpackbits(words.view(np.uint8), axis=1, count=count).view(np.bool_)
