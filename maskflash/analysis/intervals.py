"""Pieces of rows, or their bits -> what each row sees: up to four intervals, or else its hull, and how many columns.

columns    0 1 2 3 4 5 6 7 8 9      intervals          count
row 0      # # . . # # # . . .      [0, 2) [4, 7)      5
row 1      . . # # # . . . . .      [2, 5)             3
row 2      . . . . . . . . . .                         0
row 3      # . # . # . # . # .      [0, 9), its hull   5: fewer than lie between
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.runs import BoolArray, IntArray

MOST_INTERVALS: Final = 4  # of one row; each of them is one more call whose results are merged


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What rows see, for each batch row and head of the problem's shape.

    Attributes:
        start: (n, B, H, q_len) int64, the first columns of each row's intervals, in ascending order and apart; n is at
            most MOST_INTERVALS. A row with more intervals has its hull here: the only one of its length.
        stop: likewise, one past their last columns; not after start where the row has no such interval, and 0 beside
            another interval of the row.
        count: (B, H, q_len) int64, how many columns each row sees.
        group: (B, H, q_len) int64, numbers of rows; those with one number see the same. None where that isn't known.
    """

    start: Tensor
    stop: Tensor
    count: Tensor
    group: Tensor | None = None

    @property
    def hulls(self) -> tuple[Tensor, Tensor]:
        """First column that each row sees, and one past the last, not after it where there is none: (B, H, q_len)."""
        return self.start[0], self.stop[0] if len(self.stop) == 1 else self.stop.amax(0)

    @property
    def told(self) -> Tensor:
        """Whether a row sees all of its intervals: (B, H, q_len) bool."""
        return (self.stop - self.start).clamp_(min=0).sum(0) == self.count

    def unit(self, b: int, h: int) -> Rows:
        """The rows of one batch row and head: (n, q_len), and (q_len,)."""
        group = None if self.group is None else self.group[b, h]
        return Rows(self.start[:, b, h], self.stop[:, b, h], self.count[b, h], group)

    @staticmethod
    def from_pieces(start: Tensor, stop: Tensor) -> Rows:
        """What rows see of disjoint pieces in ascending order, (pieces, B, H, q_len), some of them empty."""
        first, last, count = _hull(start, stop)
        if torch.equal(count, (last - first).clamp_(min=0)):
            return Rows(first[None], last[None], count)
        starts, stops = torch.zeros(2, MOST_INTERVALS, *count.shape, dtype=torch.int64)
        number, end = torch.zeros_like(count), torch.full_like(count, -1)
        for piece, (a, z) in enumerate(zip(start, stop, strict=True)):
            some = a < z
            begins = some & (a != end)  # else it goes on where the row's last piece ended
            number += begins
            end = torch.where(some, z, end)
            for place in range(min(piece + 1, MOST_INTERVALS)):
                mine = some & (number == place + 1)
                starts[place] = torch.where(mine & begins, a, starts[place])
                stops[place] = torch.where(mine, z, stops[place])
        many = number > MOST_INTERVALS
        starts.masked_fill_(many, 0)
        stops.masked_fill_(many, 0)
        starts[0], stops[0] = torch.where(many, first, starts[0]), torch.where(many, last, stops[0])
        most = int(number.masked_fill(many, 1).max())
        return Rows(starts[:most], stops[:most], count)

    @staticmethod
    def joined(parts: Iterable[Rows]) -> Rows:
        """The rows of all parts, one after the other."""
        found = list(parts)
        most = max(len(part.start) for part in found)
        start, stop = (
            torch.cat([pad(x, (0, 0) * 3 + (0, most - len(x))) for x in ends], -1)
            for ends in zip(*((part.start, part.stop) for part in found), strict=True)
        )
        return Rows(start, stop, torch.cat([part.count for part in found], -1))


def in_lines(values: Tensor, lines: int, rows: int) -> npt.NDArray[Any]:
    """Something of rows (..., q_len), in lines of tiles: a copy (..., lines, rows), filled up with the last row's."""
    known = values.numpy()
    found = np.empty((*known.shape[:-1], lines * rows), dtype=known.dtype)  # np.pad takes several times as long
    found[..., : known.shape[-1]] = known
    found[..., known.shape[-1] :] = known[..., -1:]
    return found.reshape(*known.shape[:-1], lines, rows)


def intervals_of(bits: BoolArray) -> tuple[IntArray, IntArray] | None:
    """Starts and stops of rows' intervals, (n, rows), from bits (rows, columns); None if a row has too many."""
    rows, columns = bits.shape
    padded = np.zeros((rows, columns + 2), dtype=np.bool_)
    padded[:, 1:-1] = bits
    edge = padded[:, 1:] != padded[:, :-1]
    per_row = np.count_nonzero(edge, axis=1)
    most = int(per_row.max()) // 2
    if most > MOST_INTERVALS:
        return None
    row, column = np.divmod(np.flatnonzero(edge), columns + 1)
    # The edges of a row alternate: where an interval starts, where it stops.
    number = np.arange(len(row)) - (per_row.cumsum() - per_row)[row]
    found = np.zeros((2 * max(most, 1), rows), dtype=np.int64)
    found[number, row] = column
    return found[::2], found[1::2]


def _hull(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First column, one past the last, and how many, of disjoint pieces (n, ...), some of them empty."""
    # Piece by piece: reductions over a short first dimension are ten times slower.
    first, last, count = torch.full_like(start[0], torch.iinfo(torch.int64).max), torch.zeros_like(stop[0]), 0
    for a, z in zip(start, stop, strict=True):
        some = a < z
        first = torch.minimum(first, a.masked_fill(~some, torch.iinfo(torch.int64).max))
        last = torch.maximum(last, z * some)
        count = count + (z - a) * some
    return first, last, torch.as_tensor(count)
