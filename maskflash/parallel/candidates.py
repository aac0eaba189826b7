r"""What lines compute and need -> ways to give them to ranks: those of the field, and searched ones start from them.

Tokens are dealt in units: lines, or chunks of lines. A way is an int64 array with the rank of each unit.

contiguous    0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3
zigzag        0 0 1 1 2 2 3 3 3 3 2 2 1 1 0 0    balanced under a causal mask
level         0 1 2 3 0 0 0 0 1 1 1 2 2 2 3 3    runs of even work; the lightest units go where runs leave room
heap          2 0 1 3 2 1 0 3 3 0 1 2 1 0 3 2    the largest first, each to the rank with the least work
affinity      2 2 1 0 0 1 3 3 2 1 1 0 0 3 2 3    likewise, but to one that has what it needs, while balance allows
documents     0 0 0 1 3 3 2 2 2 2 3 3 1 1 1 0    each whole, or zigzag over as few ranks as can bear it

No rank gets more than `room` units, which is its even share, rounded up.

Sources: zigzag as in Zhu's ring-flash-attention; the heap is Graham's longest processing time first (1969), with the
affinity of MagiAttention's dispatch; documents as in Wang et al., WLB-LLM, 2025 (arXiv 2503.17924).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from maskflash.analysis.runs import IntArray
from maskflash.parallel.needs import Needs
from maskflash.parallel.routes import Shards
from maskflash.parallel.tiled import set_bits

_HEAPS: Final = (2, 4, 8, 16)  # chunks of a rank
_AFFINITIES: Final = (4, 8)

Pick = Callable[[IntArray, Any], int]
"""Units that are to be given away together, and whether each rank has room for them -> a rank that has."""


def ways(layers: Sequence[Needs], area: IntArray, unit: int, ranks: int) -> Iterator[tuple[str, IntArray]]:
    """All of them, with their names; the simple ones first.

    Args:
        layers: what the lines of each kind of layer need.
        area: (units,) int64, visible pairs of all layers together.
        unit: lines of a unit.
        ranks: how many.
    """
    room = -(-len(area) // ranks)
    tokens = unit * layers[0].tile
    yield "contiguous", contiguous(len(area), ranks)
    yield "zigzag", zigzag(len(area), ranks)
    yield "level", level(area, ranks)
    yield "documents", documents(area, find_cuts(layers, unit), ranks)
    for grain in sorted({max(room // parts, 1) for parts in (*_HEAPS, room)}, reverse=True):
        yield f"heap of {grain * tokens}", heap(area, ranks, grain)
    for grain in sorted({max(room // parts, 1) for parts in _AFFINITIES}, reverse=True):
        sees = find_sees(layers, grain * unit, grain * unit)
        yield f"affinity of {grain * tokens}", affinity(area, sees, ranks, grain)


def contiguous(units: int, ranks: int) -> IntArray:
    """Neighbours together, as many to each rank."""
    return np.repeat(np.arange(ranks), _even(units, ranks))


def zigzag(units: int, ranks: int) -> IntArray:
    """Rank r has the r-th part from the front and the r-th from the back."""
    share = _even(units, ranks)
    rank = np.arange(ranks)
    return np.repeat(np.concatenate((rank, rank[::-1])), np.concatenate((share - share // 2, (share // 2)[::-1])))


def level(area: IntArray, ranks: int) -> IntArray:
    """Runs of even work of all but the lightest units, which are dealt to where room is left.

    So windows stay in runs, though the first rank has less to do: the others take some of its first rows. As many are
    lightest as make the largest work least.
    """
    room = -(-len(area) // ranks)
    order = np.argsort(area, kind="stable")
    best, least = contiguous(len(area), ranks), np.inf
    light = 0
    while light < len(area):
        owner = np.full(len(area), -1)
        heavy = np.sort(order[light:])
        owner[heavy] = _runs(area[heavy], ranks, room)
        work = np.bincount(owner[heavy], area[heavy], ranks)
        left = room - np.bincount(owner[heavy], minlength=ranks)
        for unit in order[:light][::-1]:
            rank = int(np.where(left > 0, work, np.inf).argmin())
            owner[unit] = rank
            work[rank] += area[unit]
            left[rank] -= 1
        if work.max() < least:
            best, least = owner, work.max()
        light = 2 * light or ranks
    return best


def _runs(area: IntArray, ranks: int, room: int) -> IntArray:
    """The rank of each unit: runs of at most `room` units, whose largest work is least."""
    before = [0, *area.cumsum().tolist()]

    def cut(most: int) -> list[int]:
        ends = [0]
        for _ in range(ranks):
            end = bisect_right(before, before[ends[-1]] + most) - 1
            ends.append(min(end, ends[-1] + room))
        return ends

    low, high = int(area.max(initial=0)), before[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle)[-1] == len(area) else (middle + 1, high)
    return np.repeat(np.arange(ranks), np.diff(cut(low)))


def _even(units: int, parts: int) -> IntArray:
    return np.diff(np.arange(parts + 1) * units // parts)


def heap(area: IntArray, ranks: int, grain: int) -> IntArray:
    """Chunks of `grain` units, the largest area first, each to the rank with the least work of those with room."""
    return deal(area, ranks, _chunks(len(area), grain), lambda _, work: int(work.argmin()))


def affinity(area: IntArray, sees: Any, ranks: int, grain: int) -> IntArray:
    """Likewise, to the rank that lacks the fewest keys, of those that stay within their even share of the work.

    Args:
        area: (units,) int64.
        sees: (chunks, layers, chunks) bool: whether rows of a chunk of `grain` units need keys of another.
        ranks: how many.
        grain: units of a chunk.
    """
    share = max(area.sum() / ranks, 1)
    own = np.eye(len(sees), sees.shape[2], dtype=np.bool_)[:, None]
    needs, holds = (_packed(x.reshape(len(sees), -1)) for x in (sees, sees | own))
    has = np.zeros((ranks, needs.shape[1]), dtype=needs.dtype)

    def pick(units: IntArray, work: Any) -> int:
        chunk = units[0] // grain
        words = np.flatnonzero(needs[chunk])
        lacks = set_bits(needs[chunk, words] & ~has[:, words]).astype(np.float64)
        fits = work + area[units].sum() <= share
        rank = int(np.where(fits, lacks * len(area) + work / share, np.inf).argmin() if fits.any() else work.argmin())
        has[rank] |= holds[chunk]
        return rank

    return deal(area, ranks, _chunks(len(area), grain), pick)


def _packed(bits: Any) -> Any:
    """Rows of bits as words, filled up with zeros."""
    return np.packbits(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 64))), axis=1).view(np.uint64)


def _chunks(units: int, grain: int) -> list[IntArray]:
    every = np.arange(units)
    return [every[first : first + grain] for first in range(0, units, grain)]


def documents(area: IntArray, cuts: IntArray, ranks: int) -> IntArray:
    """Each document whole, or where it is more than a rank's share, zigzag in as many parts as it has shares."""
    share, room = max(area.sum() / ranks, 1), -(-len(area) // ranks)
    pieces = []
    for units in np.split(np.arange(len(area)), cuts):
        parts = min(max(round(area[units].sum() / share), -(-len(units) // room), 1), ranks)
        order = zigzag(len(units), parts)
        pieces += [units[order == part] for part in range(parts)]
    return deal(area, ranks, pieces, lambda _, work: int(work.argmin()))


def deal(area: IntArray, ranks: int, pieces: Sequence[IntArray], pick: Pick) -> IntArray:
    """Give pieces away, the largest area first; a piece that no rank has room for is cut.

    Args:
        area: (units,) int64.
        ranks: how many.
        pieces: the units of each.
        pick: a piece and the work of each rank, infinite where the piece finds no room -> a rank.
    """
    room = np.full(ranks, -(-len(area) // ranks))
    work, owner = np.zeros(ranks), np.zeros(len(area), dtype=np.int64)
    order = np.argsort([-area[piece].sum() for piece in pieces], kind="stable")
    size, fits = 0, work  # the work of ranks with room for a piece of this size
    for piece in (part for place in order for part in _fitting(pieces[place], room)):
        if len(piece) != size:
            size, fits = len(piece), np.where(room >= len(piece), work, np.inf)
        rank = pick(piece, fits)
        owner[piece] = rank
        work[rank] += area[piece].sum()
        room[rank] -= size
        fits[rank] = work[rank] if room[rank] >= size else np.inf
    return owner


def _fitting(piece: IntArray, room: IntArray) -> Iterator[IntArray]:
    while len(piece):
        size = min(len(piece), int(room.max()))
        yield piece[:size]
        piece = piece[size:]


def divide(owner: IntArray, head_ranks: int) -> IntArray:
    """Units of groups of ranks -> units of ranks: each group's evenly, in ascending order, to its ranks."""
    found = owner * head_ranks
    for group in range(int(owner.max(initial=-1)) + 1 if head_ranks > 1 else 0):
        units = np.flatnonzero(owner == group)
        found[units] += contiguous(len(units), head_ranks)
    return found


def find_area(layers: Sequence[tuple[Needs, int]], unit: int) -> IntArray:
    """(units,) int64: visible pairs of a unit's rows, in as many layers as there are of each kind."""
    area: IntArray = np.sum([needs.area * count for needs, count in layers], axis=0)
    found: IntArray = np.add.reduceat(area, np.arange(0, len(area), unit))
    return found


def find_sees(layers: Sequence[Needs], rows: int, columns: int) -> Any:
    """(chunks, layers, columns) bool: whether a chunk of `rows` lines needs keys of a column of `columns` lines."""
    return np.stack([needs.tiled.seen(rows, columns) for needs in layers], axis=1)


def find_cuts(layers: Sequence[Needs], unit: int) -> IntArray:
    """Units at which a document begins, other than the first: nothing before and nothing after sees across it.

    Args:
        layers: what the lines of each kind of layer need.
        unit: lines of a unit.
    """
    tokens = unit * layers[0].tile
    units = -(-layers[0].seq_len // tokens)
    low, high = np.full(units, layers[0].seq_len), np.zeros(units, dtype=np.int64)
    for needs in layers:
        some = np.flatnonzero(np.diff(needs.offsets))  # lines with ranges, which ascend
        np.minimum.at(low, some // unit, needs.start[needs.offsets[some]])
        np.maximum.at(high, some // unit, needs.stop[needs.offsets[some + 1] - 1])
    begin = np.arange(1, units)
    before = np.maximum.accumulate(high)[:-1]
    after = np.minimum.accumulate(low[::-1])[::-1][1:]
    clean = (before <= begin * tokens) & (after >= begin * tokens)
    # A unit with rows of two documents goes with the second: those before it and those after it see apart.
    behind = np.append(after[1:], 0)
    mixed = (before <= np.minimum(behind, (begin + 1) * tokens)) & (behind >= begin * tokens)
    mixed &= ~(clean | np.append(clean[1:], True))
    found: IntArray = begin[clean | mixed]
    return found


def as_shards(owner: IntArray, ranks: int, tokens: int, seq_len: int) -> Shards:
    """The tokens of each rank, from the rank of each unit of `tokens` tokens."""
    bounds = np.flatnonzero(np.diff(owner)) + 1
    first, last = np.append(0, bounds), np.append(bounds, len(owner))
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for rank, start, stop in zip(owner[first].tolist(), first.tolist(), last.tolist(), strict=True):
        found[rank].append((start * tokens, min(stop * tokens, seq_len)))
    return tuple(map(tuple, found))
