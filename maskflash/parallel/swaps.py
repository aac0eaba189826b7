r"""Chunks on ranks -> chunks on ranks, after swaps that balance work and shed keys that travel.

       needs of chunks      held by      needed by rank 0   by rank 1
a      ■ ■ · ·              0            ■ ■ · ·            ■ ■ ■ ■     rank 1 lacks a and b: two chunks of keys travel
b      · ■ · ·              0
c      ■ · ■ ·              1
d      · ■ · ■              1            after a <-> d: rank 0 needs b and d, which it holds; rank 1 lacks b

Each rank has as many slots, some of which may hold an empty chunk, so that a move is a swap too. A pass looks at all
swaps between some ranks at once: what a rank lacks after losing one chunk and gaining another is a sum of products of
matrices, but for keys of the two chunks themselves. So the best are then counted exactly, and done where they gain.

Source: pairs of swaps as in Kernighan and Lin (1970); the keys that travel are the cut of a hypergraph, as in DCP
(arXiv 2510.10620), with a net for each column of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from maskflash.analysis.runs import IntArray

_OVER: Final = 300  # what a rank's even share beyond the limit costs, beside the bytes of the rank that moves most: 1
_TRIES: Final = 48  # swaps of a pass that are counted exactly
_ROWS: Final = 512  # chunks of the ranks of a pass
_PASSES: Final = 30  # at most
_LEAST: Final = 1e-9  # gain of a swap: below it sums in another order would differ as much
_IDLE: Final = 1e-3  # of the cost: a pass that gains less has found nothing
_EACH: Final = 400  # multiplications that take as long as what a pass does for a pair of chunks beside them


@dataclass(frozen=True, slots=True)
class Aim:
    """What a rank's share costs: time beyond the limit above all, then the keys that it receives and sends.

    Attributes:
        work: pairs of an even share.
        forward: keys whose transfer forward takes as long as the forward work of an even share.
        backward: the same backward, where a rank receives as many keys as it sends.
        back: of the bytes of such a key backward, those that travel as a key; the others are its gradient.
        weight: of the time of an even share, the part that is forward.
        limit: of that time, what a rank's share may take.
        most: keys that a rank received or sent at most, at first.
    """

    work: float
    forward: float
    backward: float
    back: float
    weight: float
    limit: float
    most: float

    def cost(self, work: Any, received: Any, sent: Any) -> Any:
        """Of one rank, or of each, in the precision of what is given."""
        work = work * (1 / self.work)
        cost = np.maximum(received, sent)  # in place from here on: twice as fast
        both = np.minimum(received, sent)
        both *= self.back / self.backward
        both += cost * ((1 - self.back) / self.backward)
        np.maximum(both, work, out=both)
        both *= 1 - self.weight
        cost *= 1 / self.forward
        np.maximum(cost, work, out=cost)
        cost *= self.weight
        cost += both
        cost -= self.limit
        np.maximum(cost, 0, out=cost)
        cost *= _OVER
        come, go = received * (1 / self.most), sent * (1 / self.most)
        cost += (come + go) / 2
        for share in (come, go):
            share *= share
            share *= share
            cost += share
        return cost


class Chunks:
    """What chunks compute and need of one another.

    Args:
        sees: (chunks, columns) bool: whether rows of a chunk need keys of a column.
        width: (columns,) float64: the keys of a column.
        home: (columns,) int64: the chunk that a column belongs to, ascending.
        area: (chunks,) float64.
        ranks: how many.
    """

    def __init__(self, sees: Any, width: Any, home: IntArray, area: Any, ranks: int) -> None:
        self.slots = -(-len(sees) // ranks)
        empty = ranks * self.slots - len(sees)
        self.sees = np.pad(sees, ((0, empty), (0, 0)))
        self.area = np.pad(area, (0, empty))
        self.width, self.home, self.ranks = width, home, ranks
        self.first = np.searchsorted(home, np.arange(len(self.sees) + 1))
        self.own = sees[home, np.arange(len(home))]

    def columns(self, chunk: int) -> slice:
        """Those that belong to a chunk."""
        return slice(self.first[chunk], self.first[chunk + 1])


class Count(NamedTuple):
    """What ranks hold, need, compute and move."""

    holder: IntArray  # (columns,) the rank that holds each
    needing: IntArray  # (columns,) how many ranks need it
    kept: Any  # (columns,) whether one of these holds it
    work: Any  # (ranks,)
    received: Any  # (ranks,) keys
    sent: Any  # (ranks,) keys


class Swaps:
    """A deal of chunks to ranks, which swaps improve."""

    def __init__(self, chunks: Chunks, owner: IntArray) -> None:
        self.chunks = chunks
        ranks = chunks.ranks
        left = chunks.slots - np.bincount(owner, minlength=ranks)
        self.owner = np.concatenate((owner, np.repeat(np.arange(ranks), left)))
        self.members = np.argsort(self.owner, kind="stable").reshape(ranks, chunks.slots)
        self.needs = np.stack([chunks.sees[chunk].sum(0, dtype=np.int16) for chunk in self.members])
        self.turn = 0
        has = self.needs > 0
        holder, needing = self.owner[chunks.home], has.sum(0)
        kept = has[holder, np.arange(len(holder))]
        received = has @ chunks.width - np.bincount(holder, chunks.width * kept, ranks)
        work = chunks.area[self.members].sum(1)
        self.count = Count(holder, needing, kept, work, received, self._sent(holder, needing, kept))

    def _sent(self, holder: IntArray, needing: IntArray, kept: Any) -> Any:
        return np.bincount(holder, self.chunks.width * (needing - kept), self.chunks.ranks)

    def costs(self, aim: Aim) -> Any:
        """What the share of each rank costs."""
        return aim.cost(*self.count[3:])

    def improve(self, aim: Aim, steps: float = 1e12) -> int:
        """Swap while that gains, for about so many multiplications; how many it took."""
        slots, ranks = self.chunks.slots, self.chunks.ranks
        size = min(max(_ROWS // slots, 2), ranks)
        each = (size * slots) ** 2 * (len(self.chunks.home) + _EACH)
        most = min(_PASSES, math.ceil(steps / each))
        idle = passes = 0
        cost = self.costs(aim).sum()
        while idle < ranks and passes < most:
            before, cost = cost, self._pass(self._some_ranks(aim, size), aim, cost)
            idle = 0 if before - cost > _IDLE * before else idle + size
            passes += 1
        return passes * each

    def _some_ranks(self, aim: Aim, size: int) -> IntArray:
        """Ranks of a pass: those whose shares cost most, and others in turn."""
        order = np.argsort(-self.costs(aim), kind="stable")
        dear, others = order[: size // 2], np.sort(order[size // 2 :])
        self.turn += size - size // 2
        return np.concatenate((dear, np.roll(others, -self.turn)[: size - size // 2]))

    def _pass(self, ranks: IntArray, aim: Aim, cost: float) -> float:
        """Do the best of all swaps between ranks; what all shares cost then."""
        members = self.members[ranks].ravel()
        gains = self.estimate(ranks, aim)
        top = np.argpartition(gains, min(4 * _TRIES, gains.size - 1), axis=None)[: 4 * _TRIES]
        top = top[np.argsort(gains.ravel()[top], kind="stable")]
        swapped: set[int] = set()
        tries = 0
        for place in top[gains.ravel()[top] < -_LEAST]:
            one, other = int(members[place // len(members)]), int(members[place % len(members)])
            if tries == _TRIES:
                break
            if not swapped & {one, other}:
                tries += 1
                needs, count = self.swapped(one, other)
                now = float(aim.cost(*count[3:]).sum())
                if now < cost - _LEAST:
                    self._swap(one, other, needs, count)
                    swapped |= {one, other}
                    cost = now
        return cost

    def estimate(self, ranks: IntArray, aim: Aim) -> Any:
        """(chunks, chunks) float32: what a swap of two chunks of `ranks` costs more; infinite inside one rank."""
        chunks, count = self.chunks, self.count
        members = self.members[ranks].ravel()
        at = np.repeat(np.arange(len(ranks)), chunks.slots)
        # Sums of whole numbers: the same in any order, on any machine. Products of 32 bits, where exact, take half.
        width = chunks.width.astype(np.float32 if chunks.width.sum() < 2**24 else np.float64)
        sees = chunks.sees[members].astype(width.dtype)
        needs, away = self.needs[ranks], count.holder != ranks[:, None]
        # Of columns that others hold, a chunk brings those that its new rank lacks, and takes those it alone needs.
        only = sees * (width * ((needs == 1) & away))[at]
        brings = sees @ (width * ((needs == 0) & away)).T
        # Its own columns come along: its new rank receives them no more, and its old one does, if it still needs them.
        used = np.where(needs > 0, 1, chunks.own) * width
        sums = np.pad(used.cumsum(1), ((0, 0), (1, 0)))
        brings = brings - (sums[:, chunks.first[members + 1]] - sums[:, chunks.first[members]]).T
        still = self.needs[count.holder, np.arange(len(chunks.home))] > chunks.own
        leaves = np.bincount(chunks.home, width * still, len(chunks.area))[members] - only.sum(1)
        # [i, j]: the rank of i, once j has taken its place.
        received = (only @ sees.T).astype(np.float32)  # exact enough: the best are counted
        received += brings.T.astype(np.float32)[at]
        received += (count.received[ranks][at] + leaves).astype(np.float32)[:, None]
        work = (count.work[ranks][at] - chunks.area[members])[:, None] + chunks.area[members]
        now = aim.cost(work.astype(np.float32), received, count.sent[ranks][at].astype(np.float32)[:, None])
        now -= self.costs(aim)[ranks][at].astype(np.float32)[:, None]
        gains = now + now.T
        gains[at[:, None] >= at] = np.inf
        return gains

    def _swap(self, one: int, other: int, needs: IntArray, count: Count) -> None:
        ranks = self.owner[[one, other]]
        self.members[ranks[0]][self.members[ranks[0]] == one] = other
        self.members[ranks[1]][self.members[ranks[1]] == other] = one
        self.owner[[other, one]] = ranks
        self.needs[ranks] = needs
        self.count = count

    def swapped(self, one: int, other: int) -> tuple[IntArray, Count]:
        """What the ranks of two chunks need of each column, and what all ranks move, once they have swapped them."""
        chunks, count = self.chunks, self.count
        ranks = self.owner[[one, other]]
        change = chunks.sees[other].astype(np.int16) - chunks.sees[one]
        before = self.needs[ranks]
        needs = before + np.stack((change, -change))
        has = needs > 0
        holder = count.holder.copy()
        holder[chunks.columns(one)], holder[chunks.columns(other)] = ranks[1], ranks[0]
        holds = holder == ranks[:, None]
        needing = count.needing + has.sum(0) - (before > 0).sum(0)
        kept = np.where(holds[0], has[0], np.where(holds[1], has[1], count.kept))
        received, work = count.received.copy(), count.work.copy()
        received[ranks] = (has & ~holds) @ chunks.width
        work[ranks] += (chunks.area[other] - chunks.area[one]) * np.array([1, -1])
        return needs, Count(holder, needing, kept, work, received, self._sent(holder, needing, kept))
