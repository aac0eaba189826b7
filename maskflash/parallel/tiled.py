r"""The keys that lines need, as ranges -> the same by tiles of the sequence: any lines together are soon counted.

                  tile 0          tile 1          tile 2
line 0    needs   0 1 1 0         1 1 1 1         · · · ·      a part: bits; a whole tile; nothing
line 1            1 1 0 0         · · · ·         1 1 1 1
both need         3 keys          4 keys          4 keys       the bits of both, or a tile that one needs whole

Where half of a sequence is forgotten at random, lines have thousands of ranges each. Sorting all of them again for each
way to share lines would take most of the time of planning; bits are a hundredth of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from maskflash.analysis.runs import IntArray
from maskflash.parallel.ranges import Ranges, closed

_WORD: Final = 64
_SET: Final = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)
_ONES: Final = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True, eq=False)
class TiledNeeds:
    """What lines of `tile` rows need of tiles of as many keys.

    Attributes:
        width: (tiles,) int64, the keys of a tile, of which there are as many as lines.
        touched: tiles of which a line needs any key, as ranges that ascend and are apart.
        whole: tiles of which a line needs every key, as ranges that ascend.
        place: (parts,) int64, line * tiles + tile, ascending, of tiles of which a line needs some keys.
        bits: (words, parts) uint64, which of them.
    """

    width: IntArray
    touched: Ranges
    whole: Ranges
    place: IntArray
    bits: Any

    def counted(self, owner: IntArray, groups: int) -> IntArray:
        """(groups, tiles) int64: how many of a tile's keys the lines of a group need together.

        Args:
            owner: (lines,) int64, the group of each line.
            groups: how many.
        """
        tiles = len(self.width)
        line, first, last = self.whole
        found = np.where(_covered(owner[line], first, last, groups, tiles), self.width, 0)
        of, tile = np.divmod(self.place, tiles)
        place = owner[of] * tiles + tile
        order = np.argsort(place, kind="stable")
        place, bits = _together(place[order], self.bits.take(order, 1))
        some = set_bits(bits.T)
        every = found.reshape(-1)
        every[place] = np.maximum(every[place], some)
        return found

    def seen(self, rows: int, columns: int) -> Any:
        """(chunks, columns) bool: whether a chunk of `rows` lines needs any key of a column of `columns` tiles."""
        line, first, last = self.touched
        lines = len(self.width)
        chunks, wide = -(-lines // rows), -(-lines // columns)
        return _covered(line // rows, first // columns, (last - 1) // columns + 1, chunks, wide)


def by_tiles(tile: int, seq_len: int, ranges: Ranges) -> TiledNeeds:
    """What lines need by tiles.

    Args:
        tile: rows of a line.
        seq_len: tokens.
        ranges: the keys of lines, in ranges that ascend and don't touch.
    """
    line, start, stop = ranges
    tiles = -(-seq_len // tile)
    width = np.diff(np.minimum(np.arange(tiles + 1) * tile, seq_len))
    first, last = start // tile, (stop - 1) // tile
    touched = closed((line, first, last + 1), 1)
    # The whole tiles of a range lie between its ends; the last tile of a sequence may be shorter.
    low, high = -(-start // tile), np.where(stop == seq_len, tiles, stop // tile)
    inner = low < high
    whole = line[inner], low[inner], high[inner]
    head = np.flatnonzero((start % tile > 0) | (low >= high))  # a range in one tile has a head alone
    tail = np.flatnonzero((last > first) & (high <= last))
    ends = _bits(tile, line[head], first[head], start[head], stop[head], tiles)
    others = _bits(tile, line[tail], last[tail], last[tail] * tile, stop[tail], tiles)
    place, bits = (np.concatenate(x, -1) for x in zip(ends, others, strict=True))
    order = np.argsort(place, kind="stable")
    return TiledNeeds(width, touched, whole, *_together(place[order], bits.take(order, 1)))


def _bits(tile: int, line: IntArray, of: IntArray, start: IntArray, stop: IntArray, tiles: int) -> tuple[IntArray, Any]:
    """Places, and the bits in them, of ranges that ascend: of each the keys in one tile."""
    begin, end = start - of * tile, np.minimum(stop - of * tile, tile)
    words = [_below(end, word) & ~_below(begin, word) for word in range(-(-tile // _WORD))]
    return _together(line * tiles + of, np.stack(words))


def _together(place: IntArray, bits: Any) -> tuple[IntArray, Any]:
    """Places that ascend, each once, and all bits in them."""
    runs = _begins(place)
    return place[runs], np.bitwise_or.reduceat(bits, runs, axis=1) if len(runs) else bits


def set_bits(words: Any) -> IntArray:
    """How many bits are set in each row of uint64 (rows, words)."""
    found: IntArray = _SET[np.ascontiguousarray(words).view(np.uint16)].sum(1, dtype=np.int64)
    return found


def _below(edge: IntArray, word: int) -> Any:
    """A word of the bits below an edge."""
    count = np.clip(edge - word * _WORD, 0, _WORD).astype(np.uint64)
    return np.where(count > 0, _ONES >> (np.uint64(_WORD) - np.maximum(count, np.uint64(1))), np.uint64(0))


def _begins(place: IntArray) -> IntArray:
    """Where equal places begin in a sorted array."""
    begins: IntArray = np.flatnonzero(np.append(True, place[1:] != place[:-1])[: len(place)])
    return begins


def _covered(line: IntArray, first: IntArray, last: IntArray, lines: int, columns: int) -> Any:
    """(lines, columns) bool: whether a column lies in any of a line's ranges, half open."""
    far = columns + 1
    size = lines * far
    changes = np.bincount(line * far + first, minlength=size) - np.bincount(line * far + last, minlength=size)
    return changes.reshape(lines, far).cumsum(1)[:, :-1] > 0
