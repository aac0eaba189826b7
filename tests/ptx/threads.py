"""Threads that are at the same place of a program, with their registers, and the memory of their launch.

A thread's id is its number among all threads that run together: block * threads of a block + thread. Mostly a group has
all threads of some blocks. It has a part of a block's threads between a branch at which they part, or a place where
some of them wait, and the place where they meet again. Warps with work of their own may never meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.faults import Fault, Unsupported
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.in_flight import Copies, Products
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.values import Array

if TYPE_CHECKING:  # they have instructions, which act on threads
    from tests.ptx.bulk import Bulk
    from tests.ptx.meetings import Meetings, Room
    from tests.ptx.tensor_maps import TensorMap


@dataclass(slots=True)
class Launch:
    """What the threads that run together share.

    Attributes:
        memory: of all blocks.
        shared: of those that run together.
        copies: of theirs that are in flight.
        products: of theirs that are in flight.
        bulk: boxes of tensors that they copy, and their mbarriers.
        meetings: their barriers.
        room: their registers.
        params: the kernel's arguments: bits, or tensor maps.
        grid: blocks in all.
        first: the number of the first block that runs.
        threads: of a block.
    """

    memory: GlobalMemory
    shared: SharedMemory
    copies: Copies
    products: Products
    bulk: Bulk
    meetings: Meetings
    room: Room
    params: list[int | TensorMap]
    grid: int
    first: int
    threads: int


class Threads:
    """A group: who they are, their registers by number, and where they are: a block of statements, and a step of it."""

    def __init__(self, launch: Launch, ids: Array, registers: list[Array | None], at: tuple[int, int] = (0, 0)) -> None:
        self.launch, self.registers, self.at = launch, registers, at
        self._arrange(ids)

    def _arrange(self, ids: Array) -> None:
        threads = self.launch.threads
        self.ids, self.count = ids, len(ids)
        self.every = np.ones(len(ids), np.bool_)
        rest = ids % threads
        self.thread = rest.astype(np.uint32)
        self.whole = len(ids) % threads == 0 and bool((rest.reshape(-1, threads) == np.arange(threads)).all())
        self.blocks = np.unique(ids // threads)
        self.warps = np.unique(ids // 32)

    def register(self, number: int) -> Array:
        """A register's bits.

        Raises:
            Fault: no instruction has written it.
        """
        found = self.registers[number]
        if found is None:
            raise Fault("register", "it is read before anything is written to it")
        return found

    def complete(self, warps: int) -> Array:
        """Whose group of so many warps, of those that a block is divided into, is all here."""
        number = self.ids // (32 * warps)
        return np.asarray(np.bincount(number)[number] == 32 * warps)

    def of_warps(self, which: Array) -> Array:
        """A bool for each of the group's warps -> one for each thread."""
        return self.every if which.all() else which[np.searchsorted(self.warps, self.ids // 32)]

    def special(self, name: str) -> Array:
        """A special register: the block's number, the thread's, and so on. Grids and blocks have one dimension."""
        launch, axis = self.launch, name[-2:]
        if name == "%laneid":
            return self.thread % np.uint32(32)
        if axis not in (".x", ".y", ".z"):
            raise Unsupported(f"special register {name}")
        values = {
            "%tid": self.thread,
            "%ctaid": (launch.first + self.ids // launch.threads).astype(np.uint32),
            "%ntid": np.full(self.count, launch.threads, np.uint32),
            "%nctaid": np.full(self.count, launch.grid, np.uint32),
        }
        found = values[name[:-2]]
        return found if axis == ".x" else np.full(self.count, int(name[:3] == "%nt" or name[:3] == "%nc"), np.uint32)

    def part(self, leaving: Array, target: tuple[int, int]) -> Threads:
        """Those where `leaving` is True become a group of their own, on their way to another place."""
        other = Threads(
            self.launch, self.ids[leaving], [x if x is None else x[leaving] for x in self.registers], target
        )
        staying = ~leaving
        self.registers = [x if x is None else x[staying] for x in self.registers]
        self._arrange(self.ids[staying])
        return other

    def join(self, other: Threads) -> None:
        """Take in a group that is at the same place. What one of them never wrote, nobody wrote."""
        ids = np.concatenate((self.ids, other.ids))
        order = np.argsort(ids)
        self.registers = [
            None if x is None or y is None else np.concatenate((x, y))[order]
            for x, y in zip(self.registers, other.registers, strict=True)
        ]
        self._arrange(ids[order])
