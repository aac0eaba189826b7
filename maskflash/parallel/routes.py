"""Shards and the keys that lines need -> which tokens travel from which rank to which, and back as gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskflash.analysis.runs import IntArray
from maskflash.parallel.needs import Needs, union

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
        """(ranks, ranks) int64: how many keys of rank i rank j needs."""
        ranks = len(self.work)
        found = np.zeros((ranks, ranks), dtype=np.int64)
        np.add.at(found, (self.source, self.target), self.stop - self.start)
        return found

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
    """What travels where lines are computed by the ranks that hold them."""
    owner = owners(shards, needs.seq_len, needs.tile)
    by_rank = [needs.of(np.flatnonzero(owner == rank)) for rank in range(len(shards))]
    target = np.repeat(np.arange(len(shards)), [len(start) for start, _ in by_rank])
    start, stop = (np.concatenate(x) for x in zip(*by_rank, strict=True))
    # Cut at the lines of keys, each of which one rank holds; then join what one rank holds again.
    first, last = start // needs.tile, -(-stop // needs.tile)
    count = last - first
    piece = np.repeat(np.arange(len(start)), count)
    line = np.repeat(first - np.cumsum(count) + count, count) + np.arange(len(piece))
    start, stop = np.maximum(start[piece], line * needs.tile), np.minimum(stop[piece], (line + 1) * needs.tile)
    pair, start, stop = union(target[piece] * len(shards) + owner[line], start, stop)
    work = np.bincount(owner, weights=None, minlength=len(shards)) * 0
    np.add.at(work, owner, needs.area)
    return Routes(pair % len(shards), pair // len(shards), start, stop, work)
