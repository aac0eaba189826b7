"""The work of the turn of each role's loop, warps on one scheduler -> operations per cycle of a multiprocessor.

    warps    ##..####......##        each in order: an instruction is issued when its stalls, its scoreboards, its
             ..##....####....        pipe and what it waits for allow it; the warp that issued last goes first,
                                 then the one that waited longest
    tensor   ====..========..        one product after another, the groups of who waited longest first; a warp hands its
                                 next one in shortly before
    copies   ~~~~~~~~~~~             arrive in order, a latency after their bytes had their turn

Each warp repeats its turn for ever, and waits at mbarriers for copies, or for the warps of another role. Not in
the model: the prologue, what other programs leave in the cache, how clocks fall under load, register banks.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple

from benchmarks.sass.mbarriers import MBarriers
from benchmarks.sass.work import Kind, Work

# Copies from the L2 cache. Chosen so that the kernel with TMA in the validation has its known speed.
LATENCY: Final = 350.0
BYTES_PER_CYCLE: Final = 48.0
# Cycles before the tensor core is free at which a warpgroup hands in its next product: where it waits for all of them,
# and where it leaves some pending and goes on. The latter is chosen so that FlashAttention-3's overlap of softmax with
# products of the same warpgroup gains what its authors measured.
_QUEUE: Final = 8.0
_QUEUE_PENDING: Final = 512.0
_DRAIN: Final = 32.0  # from the last product of a group to its results
_READ: Final = 12.0  # until operands have been read
_JUMP: Final = 8.0
_JITTER: Final = 60.0  # that a turn may take longer, so that warps don't march in step
_BARRIER: Final = 14.0
_POLL: Final = 4.0  # until a wait at an mbarrier looks again


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a loop runs.

    Attributes:
        flops_per_cycle: of a multiprocessor.
        tensor_share: of the time that the tensor core computes.
        turn: cycles that a warp with products takes for it.
        lost: cycles of that turn in which it could not go on, by what it waited for.
    """

    flops_per_cycle: float
    tensor_share: float
    turn: float
    lost: Mapping[str, float]


class Part(NamedTuple):
    """What one role's turn does, and how many of its warps are on each scheduler: a fourth of a program's."""

    turn: Sequence[Work]
    warps: int


class Bulk(NamedTuple):
    """Bytes that an mbarrier expects of bulk copies (TMA); turns that warps copy ahead, 0 where another role does."""

    size: float = 0
    ahead: int = 0


NO_BULK: Final = Bulk()
_NO_DEPTHS: Final[Mapping[int, int]] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class _Warp:
    mbarriers: MBarriers  # of its program
    part: Part
    mates: list[_Warp]  # of its role, those that wait at its barrier
    first: bool  # of its role, and so the one that issues bulk copies
    ready: float
    queue: float
    place: int = 0
    turns: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    products: list[float] = field(default_factory=list)  # when each group ends
    copies: list[float] = field(default_factory=list)  # when each group is there
    grouped: bool = False  # in the midst of a group of products
    copied: float = 0.0  # when the copies of the next group are there
    met: dict[tuple[Kind, int | None], int] = field(default_factory=lambda: defaultdict(int))  # at each mbarrier
    why: str = "others issue"  # it could not go on when it was last looked at
    since: float = 0.0
    lost: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class _Scheduler:
    """One scheduler, its pipes, and the warps of all programs on it."""

    def __init__(self, parts: Sequence[Part], programs: int, bulk: Bulk, depths: Mapping[int, int], seed: int) -> None:
        self.bulk = bulk
        self.random = random.Random(seed)
        self.free: dict[str, float] = defaultdict(float)
        self.memory = self.now = self.busy = 0.0
        self.flops = 0
        self.residents: list[_Warp] = []
        for _ in range(programs):
            mbarriers = MBarriers(parts, depths, bulk.ahead)
            for part in parts:
                cycles, mates = 1.6 * sum(max(1, work.stall) for work in part.turn), list[_Warp]()
                pending = any(work.kind is Kind.WAIT_PRODUCTS and work.left for work in part.turn)
                queue = _QUEUE_PENDING if pending else _QUEUE
                for rank in range(part.warps):
                    start = self.random.random() * cycles if rank == 0 else 0.0
                    self.residents.append(_Warp(mbarriers, part, mates, rank == 0, start, queue))
        self.last = self.residents[0]

    def run(self, until: float) -> None:
        """Go on to a cycle."""
        while self.now < until:
            soonest = self.now + 1000
            for warp in sorted(self.residents, key=self.rank):
                work = warp.part.turn[warp.place]
                start = self.start(warp, work)
                if start <= self.now:
                    self.issue(warp, work)
                    self.last, soonest = warp, self.now + 1
                    break
                soonest = min(soonest, start)
            self.now = max(self.now + 1, math.ceil(soonest))

    def rank(self, warp: _Warp) -> tuple[bool, float]:
        """Who goes first: the warp that issued last, but for a new group of products; then who waited longest."""
        new = warp.part.turn[warp.place].kind is Kind.PRODUCT and not warp.grouped
        return warp is not self.last or (new and warp.ready < self.now), warp.ready

    def start(self, warp: _Warp, work: Work) -> float:
        """When a warp's next instruction can be issued, as far as is known now."""
        if warp.ready > self.now:  # all of the rest is looked at again then
            return warp.ready
        reasons = [(warp.boards[board], "results") for board in work.waits]
        if work.pipe:
            queue = warp.queue if work.kind is Kind.PRODUCT else 0
            reasons.append((self.free[work.pipe.name] - queue, work.pipe.name))
        if work.kind is Kind.WAIT_PRODUCTS:
            reasons.append((_all_but(warp.products, work.left), "products"))
        elif work.kind is Kind.WAIT_COPIES:
            reasons.append((_all_but(warp.copies, work.left), "copies"))
        elif work.kind is Kind.WAIT_BARRIER:
            ready = warp.mbarriers.ready(work, warp.met[work.kind, work.place])
            reasons.append((self.now + _POLL if ready is None else ready, "mbarriers"))
        time, why = max(reasons, default=(warp.ready, ""))
        if time > self.now and why != warp.why:
            self.charge(warp, why)
        return max(time, warp.ready)

    def charge(self, warp: _Warp, why: str) -> None:
        """Book what a warp has lost since it could last have issued; from now on it waits for something else."""
        warp.lost[warp.why] += self.now - max(warp.since, warp.ready)
        warp.since, warp.why = self.now, why

    def issue(self, warp: _Warp, work: Work) -> None:
        """Issue a warp's next instruction now."""
        self.charge(warp, "others issue")
        result, operands = self.now, self.now + _READ
        if work.pipe:
            begin = max(self.now, self.free[work.pipe.name])
            end = self.free[work.pipe.name] = begin + work.pipe.cycles
            result = end + work.pipe.latency
            if work.kind is Kind.PRODUCT:
                self.busy += work.pipe.cycles
                self.flops += work.flops
                operands = end - work.pipe.cycles / 2
        if work.result_board is not None:
            warp.boards[work.result_board] = max(warp.boards[work.result_board], result)
        if work.operands_board is not None:
            warp.boards[work.operands_board] = max(warp.boards[work.operands_board], operands)
        warp.ready = self.now + max(1, work.stall)
        self.effect(warp, work)
        warp.place += 1
        if warp.place == len(warp.part.turn):
            warp.place, warp.turns = 0, warp.turns + 1
            warp.ready = max(warp.ready, self.now + _JUMP + self.random.random() * _JITTER)

    def effect(self, warp: _Warp, work: Work) -> None:
        """What an instruction changes beside its pipe and its scoreboards."""
        if work.kind is Kind.PRODUCT:
            warp.grouped = not work.closes
        if work.kind is Kind.PRODUCT and work.closes:
            warp.products.append(self.free["tensor"] + _DRAIN)
        elif work.kind is Kind.COPY:
            warp.copied = max(warp.copied, self.copied(work.size))
        elif work.kind is Kind.COMMIT:
            warp.copies.append(max(warp.copied, self.now))
        elif work.kind is Kind.BULK_COPY and warp.first:
            warp.mbarriers.copy(work, self.copied(self.bulk.size * work.share))
        elif work.kind is Kind.WAIT_BARRIER:
            warp.met[work.kind, work.place] += 1
        elif work.kind is Kind.ARRIVE:
            warp.mbarriers.arrive(work, warp.met[work.kind, work.place], self.now)
            warp.met[work.kind, work.place] += 1
        elif work.kind is Kind.BARRIER:
            self.meet(warp)

    def copied(self, size: float) -> float:
        """When bytes asked for now are there."""
        self.memory = max(self.memory, self.now) + size / BYTES_PER_CYCLE
        return self.memory + LATENCY

    def meet(self, warp: _Warp) -> None:
        """Wait at the barrier until all warps of the role are there."""
        mates, after = warp.mates, warp.ready
        mates.append(warp)
        warp.ready = math.inf
        if len(mates) == warp.part.warps:
            for each in mates:
                each.ready = max(after, self.now + _BARRIER)
            mates.clear()


def simulate(
    parts: Sequence[Part],
    programs: int,
    *,
    bulk: Bulk = NO_BULK,
    depths: Mapping[int, int] = _NO_DEPTHS,
    cycles: int = 50_000,
    seed: int = 1,
) -> Speed:
    """How fast a loop runs, without its first fifth.

    Args:
        parts: of a program, those with products first.
        programs: that a multiprocessor holds.
        bulk: how it copies.
        depths: how many mbarriers the ring at each place has.
        cycles: to simulate.
        seed: of the jitter.
    """
    scheduler = _Scheduler(parts, programs, bulk, depths, seed)
    scheduler.run(cycles / 5)
    begin, flops, busy = scheduler.now, scheduler.flops, scheduler.busy
    computing = [warp for warp in scheduler.residents if any(work.kind is Kind.PRODUCT for work in warp.part.turn)]
    before = sum(warp.turns for warp in computing)
    for warp in computing:
        warp.lost.clear()
    scheduler.run(cycles)
    passed = scheduler.now - begin
    turns = max(sum(warp.turns for warp in computing) - before, 1)
    lost = dict[str, float]()
    for warp in computing:
        for why, spent in warp.lost.items():
            lost[why] = lost.get(why, 0) + spent / turns
    return Speed(
        (scheduler.flops - flops) / passed, (scheduler.busy - busy) / passed, passed * len(computing) / turns, lost
    )


def _all_but(ends: Sequence[float], left: int) -> float:
    """When all but the last `left` groups have ended."""
    return ends[-1 - left] if len(ends) > left else 0.0
