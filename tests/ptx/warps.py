"""Instructions between the threads of a warp: shuffles, votes, elections; and fences."""

from __future__ import annotations

import numpy as np

from tests.ptx.faults import Unsupported
from tests.ptx.operands import Action, Scope, integer, only
from tests.ptx.parse import Statement
from tests.ptx.threads import Threads
from tests.ptx.values import Array

_ALL_LANES = (-1, 0xFFFFFFFF)


def build_warp_barrier(statement: Statement, scope: Scope) -> Action:
    """The threads of a warp run in step anyway."""
    scope.unguarded(statement)
    return lambda threads: None


def build_proxy_fence(statement: Statement, scope: Scope) -> Action:
    """Let the asynchronous proxy rely on what these warps know to have happened to shared memory."""
    only(statement, statement.words[3:], {"shared::cta"})
    scope.unguarded(statement)

    def run(threads: Threads) -> None:
        threads.launch.shared.clocks.fence(threads.warps)

    return run


def build_mbarrier_fence(statement: Statement, scope: Scope) -> Action:
    """Let the asynchronous proxy use the mbarriers that these warps initialised."""
    only(statement, statement.words[2:], {"release", "cluster"})
    scope.unguarded(statement)
    return lambda threads: threads.launch.bulk.mbarriers.fence(threads.warps)


def build_elect(statement: Statement, scope: Scope) -> Action:
    """Elect one lane of the warp: here the first, though any may be."""
    (target, _, predicate), members = statement.operands[0].partition("|"), statement.operands[1]
    if integer(members) not in _ALL_LANES or not predicate:
        raise Unsupported("an election of some of the lanes")
    scope.unguarded(statement)
    put, elect = (scope.write(text.strip(), kind, None) for text, kind in ((target, "u32"), (predicate, "pred")))

    def run(threads: Threads) -> None:
        put(threads, np.zeros(threads.count, np.uint32))
        elect(threads, threads.thread % 32 == 0)

    return run


def build_shuffle(statement: Statement, scope: Scope) -> Action:
    """Take the value of another lane: the one at `lane` (idx), or as far away as it says (bfly, up, down).

    `clamp` has the last lane that may be taken, and in bits 8 to 12 a mask of the lane's bits that stay its own.
    """
    mode, (target, *sources, members) = statement.words[2], statement.operands
    only(statement, statement.words[2:], {mode, "b32"})
    if mode not in ("bfly", "idx", "up", "down") or integer(members) not in _ALL_LANES or "|" in target:
        raise Unsupported("a form of shfl")
    value, lane, clamp = (scope.read(text, "u32") for text in sources)
    put = scope.write(target, "u32", statement.guard)

    def run(threads: Threads) -> None:
        given = (np.broadcast_to(read(threads), threads.count).reshape(-1, 32) for read in (value, lane, clamp))
        put(threads, _shuffled(mode, *given).reshape(-1))

    return run


def _shuffled(mode: str, value: Array, lane: Array, clamp: Array) -> Array:
    own, lane, clamp = np.arange(32), lane.astype(np.int64) & 31, clamp.astype(np.int64)
    segment = clamp >> 8 & 31
    least = own & segment
    most = least | clamp & ~segment & 31
    source = {"bfly": own ^ lane, "idx": least | lane & ~segment, "up": own - lane, "down": own + lane}[mode]
    inside = source >= most if mode == "up" else source <= most
    return np.take_along_axis(value, np.where(inside, source, own), 1)


def build_ballot(statement: Statement, scope: Scope) -> Action:
    """A bit for each lane of the warp."""
    only(statement, statement.words[3:], {"b32"})
    target, source, members = statement.operands
    if integer(members) not in _ALL_LANES:
        raise Unsupported("a vote of some of the lanes")
    read, put = scope.read(source, "pred"), scope.write(target, "u32", statement.guard)

    def run(threads: Threads) -> None:
        bits = np.broadcast_to(read(threads), threads.count).reshape(-1, 32)
        words = (bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        put(threads, np.repeat(words.astype(np.uint32), 32))

    return run
