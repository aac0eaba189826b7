"""The work of a loop's turn, warps on one scheduler -> floating-point operations per cycle of a multiprocessor.

    warps    ##..####......##        each in order: an instruction is issued when its stalls, its scoreboards, its
             ..##....####....        pipe and what it waits for allow it; the warp that issued last goes first
    tensor   ====..========..        one product after another; a warp hands its next one in shortly before
    copies   ~~~~~~~~~~~             arrive in order, a latency after their bytes had their turn

Each warp repeats the turn for ever. Whatever is not in the model: the prologue, what other programs leave in the cache,
how clocks fall under load, register banks.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.sass.work import Kind, Work

# Copies from the L2 cache. Chosen so that the kernel with TMA in the validation has its known speed.
LATENCY: Final = 350.0
BYTES_PER_CYCLE: Final = 48.0
_QUEUE: Final = 8.0  # cycles before a warpgroup's product ends at which the next is taken
_DRAIN: Final = 32.0  # from the last product of a group to its results
_READ: Final = 12.0  # until operands have been read
_JUMP: Final = 8.0
_JITTER: Final = 60.0  # that a turn may take longer, so that warps don't march in step
_BARRIER: Final = 14.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a loop runs: operations per cycle, the tensor core's busy share, cycles that a warp takes for a turn."""

    flops_per_cycle: float
    tensor_share: float
    turn: float


@dataclass(slots=True, eq=False)
class _Program:
    """What the warps of a program share: when bulk copies arrive, who waits at its barrier."""

    arrivals: list[float]
    waiting: list[_Warp] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Warp:
    program: _Program
    first: bool  # of its program, and so the one that issues bulk copies
    ready: float
    place: int = 0
    turns: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    products: list[float] = field(default_factory=list)  # when each group ends
    copies: list[float] = field(default_factory=list)  # when each group is there
    copied: float = 0.0  # when the copies of the next group are there
    bulk_waits: int = 0


class _Scheduler:
    """One scheduler, its pipes, and the warps of all programs on it."""

    def __init__(self, turn: Sequence[Work], warps: int, programs: int, bulk: tuple[int, int], seed: int) -> None:
        self.turn, self.warps, (self.bulk_bytes, ahead) = turn, warps, bulk
        self.random = random.Random(seed)
        self.free: dict[str, float] = defaultdict(float)
        self.memory = self.now = self.busy = 0.0
        self.flops = 0
        bulks = sum(work.kind is Kind.BULK_COPY for work in turn)
        cycles = 1.6 * sum(max(1, work.stall) for work in turn)
        self.residents: list[_Warp] = []
        for _ in range(programs):
            program, start = _Program([0.0] * bulks * ahead), self.random.random() * cycles
            self.residents += [_Warp(program, rank == 0, start if rank == 0 else 0.0) for rank in range(warps)]
        self.last = self.residents[0]

    def run(self, until: float) -> None:
        """Go on to a cycle."""
        while self.now < until:
            soonest = self.now + 1000
            for warp in (self.last, *self.residents):
                work = self.turn[warp.place]
                start = self.start(warp, work)
                if start <= self.now:
                    self.issue(warp, work)
                    self.last, soonest = warp, self.now + 1
                    break
                soonest = min(soonest, start)
            self.now = max(self.now + 1, math.ceil(soonest))

    def start(self, warp: _Warp, work: Work) -> float:
        """When a warp's next instruction can be issued, as far as is known now."""
        time = warp.ready
        if time > self.now:  # all of the rest is looked at again then
            return time
        for board in work.waits:
            time = max(time, warp.boards[board])
        if work.pipe:
            time = max(time, self.free[work.pipe.name] - (_QUEUE if work.kind is Kind.PRODUCT else 0))
        if work.kind is Kind.WAIT_PRODUCTS:
            time = max(time, _all_but(warp.products, work.left))
        elif work.kind is Kind.WAIT_COPIES:
            time = max(time, _all_but(warp.copies, work.left))
        elif work.kind is Kind.WAIT_BULK:
            arrivals = warp.program.arrivals
            time = max(time, arrivals[warp.bulk_waits] if warp.bulk_waits < len(arrivals) else self.now + 4)
        return time

    def issue(self, warp: _Warp, work: Work) -> None:
        """Issue a warp's next instruction now."""
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
        if warp.place == len(self.turn):
            warp.place, warp.turns = 0, warp.turns + 1
            warp.ready = max(warp.ready, self.now + _JUMP + self.random.random() * _JITTER)

    def effect(self, warp: _Warp, work: Work) -> None:
        """What an instruction changes beside its pipe and its scoreboards."""
        if work.closes:
            warp.products.append(self.free["tensor"] + _DRAIN)
        elif work.kind is Kind.COPY:
            warp.copied = max(warp.copied, self.copied(work.size))
        elif work.kind is Kind.COMMIT:
            warp.copies.append(max(warp.copied, self.now))
        elif work.kind is Kind.BULK_COPY and warp.first:
            warp.program.arrivals.append(self.copied(self.bulk_bytes))
        elif work.kind is Kind.WAIT_BULK:
            warp.bulk_waits += 1
        elif work.kind is Kind.BARRIER:
            self.meet(warp)

    def copied(self, size: float) -> float:
        """When bytes asked for now are there."""
        self.memory = max(self.memory, self.now) + size / BYTES_PER_CYCLE
        return self.memory + LATENCY

    def meet(self, warp: _Warp) -> None:
        """Wait at the barrier until all warps of the program are there."""
        waiting, after = warp.program.waiting, warp.ready
        waiting.append(warp)
        warp.ready = math.inf
        if len(waiting) == self.warps:
            for each in waiting:
                each.ready = max(after, self.now + _BARRIER)
            waiting.clear()


def simulate(
    turn: Sequence[Work],
    warps: int,
    programs: int,
    *,
    bulk: tuple[int, int] = (0, 0),
    cycles: int = 50_000,
    seed: int = 1,
) -> Speed:
    """How fast a loop runs, without its first fifth.

    Args:
        turn: what each turn does.
        warps: of a program on each scheduler: a fourth of the program's.
        programs: that a multiprocessor holds.
        bulk: bytes of one bulk copy (TMA), and how many turns ahead the program copies.
        cycles: to simulate.
        seed: of the jitter.
    """
    scheduler = _Scheduler(turn, warps, programs, bulk, seed)
    scheduler.run(cycles / 5)
    begin, flops, busy = scheduler.now, scheduler.flops, scheduler.busy
    before = sum(warp.turns for warp in scheduler.residents)
    scheduler.run(cycles)
    passed = scheduler.now - begin
    turns = (sum(warp.turns for warp in scheduler.residents) - before) / len(scheduler.residents)
    return Speed((scheduler.flops - flops) / passed, (scheduler.busy - busy) / passed, passed / max(turns, 1.0))


def _all_but(ends: Sequence[float], left: int) -> float:
    """When all but the last `left` groups have ended."""
    return ends[-1 - left] if len(ends) > left else 0.0
