"""Shards and the keys that lines need -> which tokens travel from which rank to which, and back as gradients."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from maskflash.analysis.runs import IntArray
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
