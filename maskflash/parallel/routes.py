"""Shards and the keys that lines need -> which tokens travel from which rank to which, and back as gradients."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from maskflash.analysis.runs import IntArray
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.parallel.needs import Needs
from maskflash.parallel.ranges import spread

Shards = tuple[tuple[tuple[int, int], ...], ...]
"""For each rank its tokens, as (start, stop) that ascend and don't touch."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """What travels: ranges of tokens, each held by one rank and needed by another (or by the same: that stays).

    Attributes:
        source: (ranges,) int64, the rank that holds it.
        target: (ranges,) int64, the rank that needs it.
        start: (ranges,) int64, its first token.
        stop: (ranges,) int64, one past its last token. Ranges are sorted by target, then source, then start.
        work: (ranks,) int64, visible pairs of each rank's queries, summed over batch rows and query heads.
    """

    source: IntArray
    target: IntArray
    start: IntArray
    stop: IntArray
    work: IntArray

    def tokens(self) -> IntArray:
        """(ranks, ranks) int64: how many keys of rank i rank j needs; what it holds itself too."""
        ranks = len(self.work)
        length = (self.stop - self.start).astype(np.float64)  # exact up to 2**53
        found = np.bincount(self.source * ranks + self.target, length, minlength=ranks**2)
        return found.astype(np.int64).reshape(ranks, ranks)

    def between(self, source: int, target: int) -> list[tuple[int, int]]:
        """The tokens that one rank needs of another, as (start, stop)."""
        chosen = (self.source == source) & (self.target == target)
        return list(zip(self.start[chosen].tolist(), self.stop[chosen].tolist(), strict=True))


def checked(operation: str, shards: Any, seq_len: int, tile: int) -> Shards:
    """Shards as a caller passed them: every token on one rank, cut at multiples of `tile` alone.

    Raises:
        ArgumentError: a token is on no rank or on several, or a range is cut elsewhere.
        ArgumentTypeError: they are no ranges.
    """
    try:
        held = [[(operator.index(start), operator.index(stop)) for start, stop in ranges] for ranges in shards]
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"{operation}: shards is {arguments.by_type(shards)}, expected for each rank its tokens as (start, stop): "
            "[[(0, 128), (384, 512)], [(128, 384)]]"
        ) from None
    for rank, ranges in enumerate(held):
        ends = [-1, *(end for one in ranges for end in one)]
        if any(after <= before for before, after in pairwise(ends)):
            raise ArgumentError(
                f"{operation}: shards[{rank}] is {_short(ranges)}, expected ranges that ascend and are apart"
            )
        for end in ends[1:]:
            if end % tile and end != seq_len:
                raise ArgumentError(
                    f"{operation}: shards[{rank}] has the end {end}, expected multiples of {tile} tokens or "
                    f"{seq_len}, the end of the sequence; chunk= sets other multiples"
                )
    every = sorted((start, stop, rank) for rank, ranges in enumerate(held) for start, stop in ranges)
    place = 0
    for start, stop, _ in [*every, (seq_len, seq_len, 0)]:
        if start != place:
            where = f"token {min(start, place)} is on {'no rank' if start > place else 'several ranks'}"
            raise ArgumentError(f"{operation}: shards don't fit {seq_len} tokens: {where}, expected each on one rank")
        place = stop
    return tuple(map(tuple, held))


def _short(ranges: list[tuple[int, int]]) -> str:
    return f"{ranges}" if len(ranges) <= 4 else f"{ranges[:4]} and {len(ranges) - 4} more"


def owners(shards: Shards, seq_len: int, tile: int) -> IntArray:
    """The rank that holds each line: (lines,) int64."""
    found = np.full(-(-seq_len // tile), -1, dtype=np.int64)
    for rank, ranges in enumerate(shards):
        for start, stop in ranges:
            found[start // tile : -(-stop // tile)] = rank
    return found


def find_routes(needs: Needs, shards: Shards) -> Routes:
    """What travels where lines are computed by the ranks that hold them.

    Args:
        needs: of lines.
        shards: every line on one rank, as `owners` finds it.
    """
    ranks, owner = len(shards), owners(shards, needs.seq_len, needs.tile)
    by_rank = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[by_rank], np.arange(ranks + 1))
    needed = [needs.of(by_rank[first:last]) for first, last in pairwise(ends.tolist())]
    target = np.repeat(np.arange(ranks), [len(start) for start, _ in needed])
    start, stop = (np.concatenate(x) for x in zip(*needed, strict=True))
    # Cut where another rank's tokens begin.
    held = np.append(True, owner[1:] != owner[:-1])[: len(owner)].nonzero()[0]
    begin, owner_of = held * needs.tile, owner[held]
    first, last = np.searchsorted(begin, start, side="right") - 1, np.searchsorted(begin, stop, side="left")
    which, of = np.repeat(np.arange(len(start)), last - first), spread(first, last - first)
    after = np.append(begin[1:], needs.seq_len)
    start, stop = np.maximum(start[which], begin[of]), np.minimum(stop[which], after[of])
    order = np.argsort(target[which] * ranks + owner_of[of], kind="stable")
    work = np.zeros(ranks, dtype=np.int64)
    np.add.at(work, owner, needs.area)
    return Routes(owner_of[of][order], target[which][order], start[order], stop[order], work)
