"""Where threads of a block wait for one another: `bar.sync` of some of its warps, mbarriers, the room for registers.

An mbarrier is a word in shared memory that counts the phases of a piece of work:

    phase 0                           phase 1
    init n -> n arrivals expected     n again, at once
              arrive   -> one less    a phase ends when no arrival and no byte is missing; who waits for it by its
              expect_tx -> more bytes parity, phase % 2, then knows what those knew who arrived, and may read the bytes
              a copy's bytes are here -> so many less

Source: NVIDIA, PTX ISA 8.7, sections on bar, mbarrier and setmaxnreg.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tests.ptx.clocks import AGENTS, MBARRIERS, Clocks
from tests.ptx.faults import Fault
from tests.ptx.parse import ALL_REGISTERS
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.values import Array

_MOST: Final = (1 << 20) - 1  # arrivals or bytes that an mbarrier can count


class Meetings:
    """Barriers that are numbers: `bar.sync number, threads`.

    Attributes:
        come: (block, number) -> the warps that wait there.
        free: warps that were let go and have not gone on yet.
    """

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.come: dict[tuple[int, int], set[int]] = {}
        self.counts: dict[tuple[int, int], int] = {}
        self.free: set[int] = set()

    def come_to(self, number: int, warps: Array, threads: int) -> Array:
        """These warps wait until `threads` threads of their block do, themselves among them.

        Returns:
            Which of them may go on.

        Raises:
            Fault: others wait for another number of threads, or more come than are waited for.
        """
        for warp in warps.tolist():
            if warp not in self.free:
                self._come(warp // self.clocks.warps, number, warp, threads)
        return np.isin(warps, list(self.free)) if self.free else np.zeros(len(warps), np.bool_)

    def _come(self, block: int, number: int, warp: int, threads: int) -> None:
        place = block, number
        come = self.come.setdefault(place, set())
        if come and self.counts[place] != threads:
            raise Fault("barrier", f"barrier {number} of {threads} threads, where others wait for {self.counts[place]}")
        self.counts[place] = threads
        come.add(warp)
        if 32 * len(come) > threads:
            raise Fault("barrier", f"{32 * len(come)} threads come to barrier {number}, which is of {threads}")
        if 32 * len(come) == threads:
            self.clocks.meet(np.array([sorted(come)]))
            self.free |= come
            del self.come[place]

    def leave(self, warps: Array) -> None:
        """They go on."""
        self.free -= set(warps.tolist())

    def at(self, number: int, warp: int) -> str:
        """Who is there."""
        place = warp // self.clocks.warps, number
        come = sorted(one % self.clocks.warps for one in self.come.get(place, ()))
        return f"barrier {number} of {self.counts.get(place)} threads, where warps {come} are"


@dataclass(slots=True)
class Mbarrier:
    """One of them.

    Attributes:
        agent: that copies the bytes which it counts: see `clocks`.
        expected: arrivals in each phase.
        pending: arrivals that are missing.
        nbytes: that are missing.
        phase: that has not ended.
        loaded: the phase with whose end the last bytes that have come are known to be there, and one.
        born: the tag of its initialisation.
        fenced: `fence.mbarrier_init` has followed.
        arriving: (2, agents) what those who arrived knew.
        passed: the same, up to the last phase that has ended.
    """

    agent: int
    expected: int
    pending: int
    born: int
    arriving: Array
    passed: Array
    nbytes: int = 0
    phase: int = 0
    loaded: int = 0
    fenced: bool = False

    def add(self, arrivals: int, nbytes: int) -> None:
        """So many have arrived, and so many more bytes, or less, are missing.

        Raises:
            Fault: more arrive than are expected in a phase, or more bytes are missing than it can count.
        """
        if arrivals > self.pending:
            raise Fault("mbarrier arrivals", f"{arrivals} more arrive in {self}")
        self.pending, self.nbytes = self.pending - arrivals, self.nbytes + nbytes
        if abs(self.nbytes) > _MOST:
            raise Fault("mbarrier bytes", f"more than it can count: {self}")
        if self.pending == 0 and self.nbytes == 0:
            self.phase, self.pending = self.phase + 1, self.expected
            np.maximum(self.passed, self.arriving, out=self.passed)
            self.passed[0, self.agent] = self.phase

    def __str__(self) -> str:
        arrivals = f"{self.expected - self.pending} of {self.expected} arrivals"
        return f"phase {self.phase} of an mbarrier: {arrivals}, {self.nbytes} bytes missing"


@dataclass(slots=True)
class Mbarriers:
    """The mbarriers of all blocks: (block, address) -> one."""

    clocks: Clocks
    shared: SharedMemory
    all: dict[tuple[int, int], Mbarrier] = field(default_factory=dict)

    def init(self, thread: int, address: int, count: int) -> None:
        """A thread makes one that expects `count` arrivals.

        Raises:
            Fault: there is one, it is misaligned, others use the place, or it can't count so many.
        """
        warp, place = thread // 32, (thread // self.shared.threads, address)
        if place in self.all:
            raise Fault("mbarrier", f"there is one at byte {address} already")
        if not 1 <= count <= _MOST:
            raise Fault("mbarrier arrivals", f"it can't expect {count}")
        born = int(self.clocks.tags(np.array([warp]))[0])
        self.shared.become_mbarrier(np.array([thread]), np.array([address]))
        taken = {one.agent for (block, _), one in self.all.items() if block == place[0]}
        agent = next(n for n in range(self.clocks.loads, self.clocks.loads + MBARRIERS + 1) if n not in taken)
        if agent == self.clocks.loads + MBARRIERS:
            raise Fault("mbarrier", f"more than {MBARRIERS} in a block")
        known = np.zeros((2, self.clocks.known.shape[1]), np.int32)
        # An agent whose mbarrier is gone leaves its clock to the next one.
        phase = int(self.clocks.known[:, agent].max())
        phase += phase % 2
        known[0, agent] = phase
        self.all[place] = Mbarrier(agent, count, count, born, known, known.copy(), phase=phase)

    def inval(self, thread: int, address: int) -> None:
        """Its word becomes memory that holds no value.

        Raises:
            Fault: there is none, or bytes are still to come.
        """
        one = self.find(thread, address)
        if one.nbytes:
            raise Fault("mbarrier bytes", f"it ends in {one}")
        del self.all[thread // self.shared.threads, address]
        self.shared.end_mbarrier(np.array([thread]), np.array([address]))

    def find(self, thread: int, address: int) -> Mbarrier:
        """The one that a thread uses.

        Raises:
            Fault: there is none, or nothing orders its initialisation before.
        """
        one = self.all.get((thread // self.shared.threads, address))
        if one is None:
            raise Fault("mbarrier", f"there is none at byte {address}: it was not initialised, or is gone")
        if self.clocks.unknown(np.array([thread // 32]), np.array([[one.born]])).any():
            raise Fault("mbarrier init", f"warp {one.born % AGENTS} initialised it, and nothing orders that before")
        return one

    def arrive(self, thread: int, address: int, count: int, nbytes: int) -> None:
        """A thread arrives, as `count`, and expects `nbytes` more bytes."""
        one = self.find(thread, address)
        if count:
            self.clocks.release(thread // 32, one.arriving)
        one.add(count, nbytes)

    def fence(self, warps: Array) -> None:
        """What these warps initialised, the asynchronous proxy may use."""
        for (block, _), one in self.all.items():
            one.fenced |= block * self.clocks.warps + one.born % AGENTS in warps

    def check_fenced(self, thread: int, one: Mbarrier) -> None:
        """A copy is to count its bytes there.

        Raises:
            Fault: no fence came between initialising it and this.
        """
        if not one.fenced and self.clocks.unfenced(np.array([thread // 32]), np.array([[one.born]])).any():
            raise Fault("mbarrier init", "a copy uses it, and no fence has followed its initialisation")

    def check_end(self) -> None:
        """All blocks have ended.

        Raises:
            Fault: bytes were expected that did not come, or came and were not expected.
        """
        for (_, address), one in self.all.items():
            if one.nbytes:
                raise Fault("mbarrier bytes", f"at byte {address}, at the end, {one}")


class Room:
    """The registers of a block: `setmaxnreg` gives some back, or waits for some.

    Attributes:
        each: registers of a thread, by warp.
    """

    def __init__(self, blocks: int, warps: int, each: int) -> None:
        self.warps, self.each = warps, np.full(blocks * warps, each)
        self.whole = max(ALL_REGISTERS // 32, each * warps)

    def fits(self, warps: Array, count: int) -> Array:
        """Which of these warps may have `count` from now on, one after the other."""
        out = np.zeros(len(warps), np.bool_)
        more = {
            block: self.whole - int(self.each.reshape(-1, self.warps)[block].sum()) for block in self._blocks(warps)
        }
        for n, warp in enumerate(warps.tolist()):
            need = count - int(self.each[warp])
            out[n] = need <= max(0, more[warp // self.warps])
            more[warp // self.warps] -= need if out[n] else 0
        return out

    def set(self, warps: Array, count: int, *, more: bool) -> None:
        """They have them.

        Raises:
            Fault: they had more and ask for more, or had less and give some back.
        """
        had = self.each[warps]
        if ((had > count) if more else (had < count)).any():
            raise Fault(
                "registers", f"setmaxnreg.{'inc' if more else 'dec'} to {count}, of warps that have {set(had.tolist())}"
            )
        self.each[warps] = count

    def __str__(self) -> str:
        return str(self.each.reshape(-1, self.warps).tolist())

    def _blocks(self, warps: Array) -> list[int]:
        return np.unique(warps // self.warps).tolist()
