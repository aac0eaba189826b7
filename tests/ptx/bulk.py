"""`cp.async.bulk.tensor`: boxes of tensors that the copy engine moves between global and shared memory.

global -> shared   begins, is in flight, arrives when the scheduler says so; then an mbarrier counts its bytes
shared -> global   begins, and reads until its thread has waited for the group that it committed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.clocks import AGENTS
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.meetings import Mbarrier, Mbarriers
from tests.ptx.operands import Action, Scope, integer, only, vector
from tests.ptx.parse import Statement, split
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.tensor_maps import PARAMETERS, TensorMap
from tests.ptx.threads import Threads
from tests.ptx.values import UNSIGNED, Array

_PART = 16
_ALIGNED = 128  # bytes, in shared memory


@dataclass(slots=True)
class Load:
    """One copy to shared memory: whereto, what, who counts its bytes, and where it was begun."""

    places: Array
    rows: Array
    counts: Mbarrier
    begun_at: str


class Bulk:
    """The copies of blocks that run together.

    Attributes:
        loads: that have not arrived, oldest first; those that several blocks began at once, together.
        begun: copies from shared memory of each warp.
        groups: of each warp, how many of them had begun at each commit.
        alive: threads of each block that have not returned.
    """

    def __init__(self, shared: SharedMemory, mbarriers: Mbarriers) -> None:
        self.shared, self.mbarriers, self.clocks = shared, mbarriers, shared.clocks
        self.loads: list[list[Load]] = []
        warps = len(self.clocks.known)
        self.begun, self.alive = np.zeros(warps, np.int64), np.full(warps // self.clocks.warps, shared.threads)
        self.groups: list[list[int]] = [[] for _ in range(warps)]

    def arrive(self, number: int) -> None:
        """Some of the loads fill their places.

        Raises:
            Fault: an mbarrier can't count the bytes.
        """
        for load in self.loads.pop(number):
            load.counts.loaded = load.counts.phase + 1
            tag = load.counts.loaded * AGENTS + load.counts.agent
            self.shared.end_copy(load.places, load.rows, np.full(len(load.places), tag))
            try:
                load.counts.add(0, -load.rows.nbytes)
            except Fault as fault:
                raise fault.at(load.begun_at) from None

    def commit(self, warps: Array) -> None:
        """End these warps' group of copies from shared memory."""
        for warp in warps.tolist():
            self.groups[warp].append(int(self.begun[warp]))

    def wait(self, warps: Array, left: int) -> None:
        """All but the last `left` groups have read."""
        for warp in warps.tolist():
            ended = self.groups[warp][: len(self.groups[warp]) - left]
            if ended:
                own = warp % self.clocks.warps + self.clocks.stores
                self.clocks.known[warp, own] = max(self.clocks.known[warp, own], ended[-1])

    def leave(self, ids: Array) -> None:
        """These threads return.

        Raises:
            Fault: a copy that one of their warps began may still read, or one to a block that ends may still write.
        """
        warps = np.unique(ids // 32)
        own = warps % self.clocks.warps + self.clocks.stores
        if (wrong := self.clocks.known[warps, own] < self.begun[warps]).any():
            warp = int(warps[wrong][0]) % self.clocks.warps
            raise Fault("copy not waited for", f"warp {warp} returns, and its copy to global memory may still read")
        self.alive -= np.bincount(ids // self.shared.threads, minlength=len(self.alive))
        for (block, address), one in self.mbarriers.all.items():
            if not self.alive[block]:
                known = self.clocks.known.reshape(len(self.alive), self.clocks.warps, -1)[block, :, one.agent].max()
                if known < one.loaded or any(load.counts is one for loads in self.loads for load in loads):
                    at = f"the mbarrier at byte {address} was not waited for"
                    raise Fault("copy not waited for", f"a block ends, a copy to it may still write: {at}")


def build_tensor(statement: Statement, scope: Scope) -> Action:
    """Copy a box, to shared memory or from it."""
    return (_store if "bulk_group" in statement.words else _load)(statement, scope)


def _load(statement: Statement, scope: Scope) -> Action:
    """Copy a box to shared memory, some time later."""
    words, (target, source, barrier) = statement.words[4:], statement.operands[:3]
    rank = _rank(words[0])
    spaces = {"shared::cta", "shared::cluster", "global", "tile", "mbarrier::complete_tx::bytes"}
    only(statement, words[1:], spaces)
    if len(statement.operands) != 3 or words[-1] != "mbarrier::complete_tx::bytes":
        raise Unsupported("a copy to several blocks, with a hint, or that no mbarrier counts")
    find, at = _box(source, rank, scope), scope.address(target, 4)
    counted, active = scope.address(barrier, 4), scope.active(statement)

    def run(threads: Threads) -> None:
        launch, some = threads.launch, np.flatnonzero(active(threads))
        loads = []
        starts, counters = (np.broadcast_to(read(threads), threads.count) for read in (at, counted))
        for n in some.tolist():
            thread, start = int(threads.ids[n]), int(starts[n])
            box, coordinates = find(threads, n)
            counts = launch.bulk.mbarriers.find(thread, int(counters[n]))
            launch.bulk.mbarriers.check_fenced(thread, counts)
            places = box.places(_aligned(start))
            places = launch.shared.start_copy(np.full(len(places), thread), places, _PART, proxy=True)
            address, inside = box.elements(coordinates)
            taken = launch.memory.load(address, inside, 1, box.size)
            rows = np.where(inside[:, None], taken, UNSIGNED[box.size](0)).view(np.uint8).reshape(-1, _PART)
            begun_at = f"{scope.program.place(statement)}\n    in block {launch.first + thread // launch.threads}"
            loads.append(Load(places, rows, counts, begun_at))
        if loads:
            launch.bulk.loads.append(loads)

    return run


def _store(statement: Statement, scope: Scope) -> Action:
    """Copy a box from shared memory: of it, what is the tensor's."""
    words, (target, source) = statement.words[4:], statement.operands
    rank = _rank(words[0])
    only(statement, words[1:], {"global", "shared::cta", "tile", "bulk_group"})
    find, at, active = _box(target, rank, scope), scope.address(source, 4), scope.active(statement)

    def run(threads: Threads) -> None:
        launch, bulk = threads.launch, threads.launch.bulk
        starts = np.broadcast_to(at(threads), threads.count)
        for n in np.flatnonzero(active(threads)).tolist():
            warp = np.array([[int(threads.ids[n]) // 32]])
            box, coordinates = find(threads, n)
            places = box.places(_aligned(int(starts[n])))
            bytes_at = (places[:, None] + np.arange(0, _PART, box.size)).reshape(1, -1)
            bulk.begun[warp] += 1
            reader = warp % bulk.clocks.warps + bulk.clocks.stores
            taken = launch.shared.read_aside(warp, bytes_at, box.size, reader, bulk.begun[warp])
            address, inside = box.elements(coordinates)
            launch.memory.store(address, inside, taken.reshape(-1, 1), box.size)

    return run


def _rank(word: str) -> int:
    if not (len(word) == 2 and word[0] in "12345" and word[1] == "d"):
        raise Unsupported(f"a copy of {word}")
    return int(word[0])


def _aligned(start: int) -> int:
    if start % _ALIGNED:
        raise Fault("shared alignment", f"a copy at byte {start}, which is no multiple of {_ALIGNED}")
    return start


def _box(text: str, rank: int, scope: Scope) -> Callable[[Threads, int], tuple[TensorMap, list[int]]]:
    """ "[%rd1, {%r1, %r2}]" -> the n-th thread's tensor map, and the box's coordinates, outermost first."""
    pointer, coordinates = split(text.strip("[] "))
    address, reads = scope.read(pointer, "u64"), [scope.read(one, "s32") for one in vector(coordinates)]
    if len(reads) != rank:
        raise Unsupported(f"{len(reads)} coordinates of {rank} dimensions")

    def find(threads: Threads, n: int) -> tuple[TensorMap, list[int]]:
        number, rest = divmod(int(np.broadcast_to(address(threads), threads.count)[n]) - PARAMETERS, 4096)
        params = threads.launch.params
        found = params[number] if 0 <= number < len(params) and rest == 0 else None
        if not isinstance(found, TensorMap):
            raise Fault("tensor map", "there is none at that address: only parameters can be")
        if len(found.box) != rank:
            raise Fault("tensor map", f"{found.buffer.name} has {len(found.box)} dimensions, not {rank}")
        return found, [int(np.broadcast_to(read(threads), threads.count)[n]) for read in reversed(reads)]

    return find


def build_commit(statement: Statement, scope: Scope) -> Action:
    """End the group of copies from shared memory."""
    scope.unguarded(statement)
    return lambda threads: threads.launch.bulk.commit(threads.warps)


def build_wait(statement: Statement, scope: Scope) -> Action:
    """Wait until all but the last groups have read."""
    scope.unguarded(statement)
    only(statement, statement.words[4:], {"read"})
    left = integer(statement.operands[0])
    return lambda threads: threads.launch.bulk.wait(threads.warps, left)
