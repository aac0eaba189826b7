"""Instructions at which threads wait for others: barriers, mbarriers, registers; and those that let others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tests.ptx.faults import Unsupported
from tests.ptx.operands import Action, Reader, Scope, Waiting, integer, only
from tests.ptx.parse import Statement
from tests.ptx.threads import Threads
from tests.ptx.values import Array

_SCOPES = {"shared", "shared::cta", "b64"}


def build_barrier(statement: Statement, scope: Scope) -> Waiting:
    """Some warps of the block meet, or all of them; what they wrote and read before is settled."""
    only(statement, statement.words[2:], {"aligned"})
    scope.unguarded(statement)
    number, *counts = (integer(operand) for operand in statement.operands)
    count = counts[0] if counts else scope.program.threads
    if not 0 <= number <= 15 or count % 32 or not 0 < count <= scope.program.threads:
        raise Unsupported(f"barrier {number} of {count} threads")

    def ready(threads: Threads) -> Array:
        meetings = threads.launch.meetings
        if threads.whole and count == scope.program.threads and not meetings.come and not meetings.free:
            meetings.clocks.meet(threads.warps.reshape(-1, meetings.clocks.warps))
            return threads.every
        return threads.of_warps(meetings.come_to(number, threads.warps, count))

    return Waiting(
        ready,
        lambda threads: threads.launch.meetings.leave(threads.warps),
        lambda threads: threads.launch.meetings.at(number, int(threads.warps[0])),
    )


def build_init(statement: Statement, scope: Scope) -> Action:
    """Make an mbarrier."""
    only(statement, statement.words[2:], _SCOPES)
    count = scope.read(statement.operands[1], "u32")
    return _each(statement, scope, [count], lambda threads, *one: threads.launch.bulk.mbarriers.init(*one))


def build_inval(statement: Statement, scope: Scope) -> Action:
    """End an mbarrier."""
    only(statement, statement.words[2:], _SCOPES)
    return _each(statement, scope, [], lambda threads, *one: threads.launch.bulk.mbarriers.inval(*one))


def build_arrive(statement: Statement, scope: Scope) -> Action:
    """Arrive, and expect bytes if it says so, or only expect them."""
    words = statement.words[1:]
    only(statement, words, {*_SCOPES, "arrive", "expect_tx", "release", "relaxed", "cta"})
    arrives, expects = words[0] == "arrive", "expect_tx" in words
    operands = list(statement.operands)
    if arrives and operands.pop(0) != "_":
        raise Unsupported("a token of an mbarrier's phase")
    if arrives and "relaxed" in words:
        raise Unsupported("an arrival that orders nothing")
    counts = [scope.read(text, "u32") for text in operands[1:]]
    if len(counts) > 1 or (expects and not counts):
        raise Unsupported("a form of arriving")

    def arrive(threads: Threads, thread: int, address: int, count: int = 1) -> None:
        arrivals, nbytes = (int(arrives), count) if expects else (count, 0)
        threads.launch.bulk.mbarriers.arrive(thread, address, arrivals, nbytes)

    return _each(statement, scope, counts, arrive, operands[0])


def _each(
    statement: Statement,
    scope: Scope,
    more: list[Reader],
    do: Callable[..., None],
    place: str | None = None,
) -> Action:
    """Do something for each thread, its address and more operands."""
    address, active = scope.address(place or statement.operands[0], 4), scope.active(statement)

    def run(threads: Threads) -> None:
        given = [np.broadcast_to(read(threads), threads.count) for read in (address, *more)]
        for n in np.flatnonzero(active(threads)).tolist():
            do(threads, int(threads.ids[n]), *(int(column[n]) for column in given))

    return run


def build_wait(statement: Statement, scope: Scope) -> Waiting | Action:
    """Find whether an mbarrier's phase has ended. `try_wait` waits for it, and never gives up."""
    words = statement.words[2:]
    only(statement, words, {*_SCOPES, "parity", "acquire", "cta"})
    scope.unguarded(statement)
    if "parity" not in words or len(statement.operands) != 3:
        raise Unsupported("a wait by a token, or for some time")
    put = scope.write(statement.operands[0], "pred", None)
    address, parity = scope.address(statement.operands[1], 4), scope.read(statement.operands[2], "u32")

    def ended(threads: Threads) -> Array:
        out = np.zeros(threads.count, np.bool_)
        for thread, place, odd, same in _different(threads, address(threads), parity(threads)):
            one = threads.launch.bulk.mbarriers.find(thread, place)
            out[same] = one.phase % 2 != odd
            if out[same[0]]:
                one_warp = np.unique(threads.ids[same] // 32)
                threads.launch.bulk.clocks.acquire(one_warp, one.passed)
        return out

    def state(threads: Threads) -> str:
        thread, place, odd, _ = next(_different(threads, address(threads), parity(threads)))
        return f"parity {odd} at byte {place}, {threads.launch.bulk.mbarriers.find(thread, place)}"

    if statement.words[1] == "test_wait":
        return lambda threads: put(threads, ended(threads))
    return Waiting(ended, lambda threads: put(threads, threads.every), state)


def _different(threads: Threads, address: Array, parity: Array) -> Iterator[tuple[int, int, int, Array]]:
    """The mbarriers and parities that threads ask for: one of them, its address, the parity, and which threads do."""
    block = threads.ids // threads.launch.threads
    keys = np.stack([block, np.broadcast_to(address, threads.count), np.broadcast_to(parity, threads.count) & 1])
    found, first, which = np.unique(keys.astype(np.int64), axis=1, return_index=True, return_inverse=True)
    for n, (place, odd) in enumerate(found[1:].T.tolist()):
        yield int(threads.ids[first[n]]), place, odd, np.flatnonzero(which.reshape(-1) == n)


def build_setmaxnreg(statement: Statement, scope: Scope) -> Waiting:
    """Give registers back, or wait for more."""
    words = statement.words[1:]
    only(statement, words, {"inc", "dec", "sync", "aligned", "u32"})
    scope.unguarded(statement)
    count = integer(statement.operands[0])
    if scope.program.registers is None:
        raise Unsupported("registers of a kernel that says no .maxnreg")
    if not 24 <= count <= 256 or count % 8:
        raise Unsupported(f"{count} registers: they must be 24 to 256, in eights")

    def change(threads: Threads) -> None:
        threads.launch.room.set(threads.warps, count, more=words[0] == "inc")

    return Waiting(
        lambda threads: threads.of_warps(threads.launch.room.fits(threads.warps, count)),
        change,
        lambda threads: f"{count} registers for each thread: the block's warps have {threads.launch.room}",
    )
