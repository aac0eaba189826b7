"""Shared memory of several blocks side by side, that knows who wrote and who read each of its units, and when.

    tag of a unit     who wrote it last, and at what time of his clock: see `clocks`
    NEVER             nobody wrote it
    IN_FLIGHT         a copy is still to fill it
    MBARRIER          it is a part of an mbarrier

A warp may read what another one wrote, or write what another one wrote or read, only if it knows that to have happened.
Threads of one warp run in step here, so what they do to one another is not looked at.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tests.ptx.clocks import AGENTS, BEYOND, Clocks
from tests.ptx.faults import Fault
from tests.ptx.values import UNSIGNED, Array

NEVER, IN_FLIGHT, MBARRIER = (BEYOND + AGENTS * n for n in range(3))
_WARP: Final = 32  # threads
_NOBODYS: Final = {
    NEVER: ("shared uninitialised", "it was never written"),
    IN_FLIGHT: ("shared in flight", "a copy is still to fill it"),
    MBARRIER: ("shared mbarrier", "it is a part of an mbarrier"),
}


class SharedMemory:
    """The memory of `blocks` blocks.

    Args:
        blocks: how many.
        size: bytes that the kernel asked for.
        unit: bytes of the smallest store.
        threads: of a block.
        clocks: of its warps.
    """

    def __init__(self, blocks: int, size: int, unit: int, threads: int, clocks: Clocks) -> None:
        self.size, self.unit, self.threads, self.clocks = size, unit, threads, clocks
        self.room = -(-max(size, 16) // 1024) * 1024
        self.data = np.zeros(blocks * self.room, np.uint8)
        self.wrote = np.full(blocks * self.room // unit, NEVER, np.int32)
        self.read = np.zeros((clocks.loads, blocks * self.room // unit), np.int32)  # by each agent, at what time
        self.readers = np.zeros(clocks.loads, np.bool_)  # agents that have read anything

    def load(self, ids: Array, address: Array, count: int, size: int) -> Array:
        """(threads, count) numbers of `size` bytes, for threads by their ids.

        Raises:
            Fault: the place is out of bounds, misaligned, never written, or another warp's without an order.
        """
        places, warps = self._places(ids, address, count * size), ids // _WARP
        spots = places * count * size // self.unit if count * size < self.unit else places
        tags = self._units(self.wrote, count * size)[spots]
        wrong = self.clocks.unknown(warps, tags)
        if wrong.any():
            self._refuse("a read", ids, address, wrong, tags)
        own = self.clocks.tags(warps)
        self._rows(self.read, count * size)[own % AGENTS, spots] = (own // AGENTS)[:, None]
        self.readers[own % AGENTS] = True
        return self._numbers(count, size)[places]

    def store(self, ids: Array, address: Array, values: Array, size: int) -> None:
        """Write (threads, count) numbers of `size` bytes.

        Raises:
            Fault: as `load`, or two threads write different values to one place.
        """
        count = values.shape[1]
        places, data = self._places(ids, address, count * size), self._numbers(count, size)
        self._claim(ids, address, places, count * size, same=(data[places] == values).all(1))
        data[places] = values
        if (data[places] != values).any():
            raise Fault("shared race", "threads of one store write different values to one place")
        self._units(self.wrote, count * size)[places] = self.clocks.tags(ids // _WARP)[:, None]

    def start_copy(self, ids: Array, address: Array, nbytes: int, *, proxy: bool = False) -> Array:
        """Reserve places that a copy is to fill: until it has arrived they are nobody's.

        Args:
            ids: of the threads that begin it.
            address: of each part.
            nbytes: of each part.
            proxy: it is the asynchronous proxy that fills them.

        Returns:
            The places, for `end_copy`.
        """
        places = self._places(ids, address, nbytes)
        self._claim(ids, address, places, nbytes, same=None)
        tags = self._units(self.wrote, nbytes)
        if proxy and (wrong := self.clocks.unfenced(ids // _WARP, tags[places]) & (tags[places] < BEYOND)).any():
            at = int(address[wrong.any(1)][0])
            raise Fault("shared proxy", f"a copy to byte {at}, written with no fence.proxy.async since")
        tags[places] = IN_FLIGHT
        return places

    def end_copy(self, places: Array, rows: Array, tags: Array) -> None:
        """Fill them: (places, nbytes) bytes, which carry these tags from now on."""
        nbytes = rows.shape[1]
        self.data.reshape(-1, nbytes)[places] = rows
        self._units(self.wrote, nbytes)[places] = tags[:, None]

    def read_aside(self, warps: Array, address: Array, size: int, readers: Array, times: Array) -> Array:
        """Read by the asynchronous proxy, some time from now on: a wgmma's operand, or what a copy takes.

        Args:
            warps: (n, any number of) warps that begin it, of one block in each row.
            address: (n, ...) of each element in its block's memory.
            size: bytes of an element.
            readers: (n, warps) the agents that read, one for each of them.
            times: (n, warps) by their clocks: who knows of one, knows that its reading has ended.

        Returns:
            The elements' bits.

        Raises:
            Fault: they are out of bounds, never written, on their way, not ordered before, or not fenced.
        """
        if (address < 0).any() or (address + size > self.size).any():
            raise Fault("shared bounds", f"bytes up to {int(address.max()) + size} of {self.size}")
        rows = len(warps)
        start = (warps[:, 0] // self.clocks.warps * self.room).reshape(rows, *[1] * (address.ndim - 1))
        places = (address + start) // size
        units = (places * size // self.unit).reshape(rows, -1)
        tags = self.wrote[units]
        for warp in warps.T:
            if (wrong := self.clocks.unknown(warp, tags)).any():
                self._refuse("an asynchronous read", warp * _WARP, address.reshape(rows, -1), wrong, tags)
            if (wrong := self.clocks.unfenced(warp, tags)).any():
                at = int(np.broadcast_to(address, places.shape).reshape(rows, -1)[wrong].min())
                raise Fault("shared proxy", f"byte {at} was written, and no fence.proxy.async came between")
        for reader, time in zip(readers.T, times.T, strict=True):
            self.read[reader[:, None], units] = time[:, None]
        self.readers[readers] = True
        return self.data.view(UNSIGNED[size])[places]

    def become_mbarrier(self, ids: Array, address: Array) -> None:
        """8 bytes are an mbarrier from now on: claimed by a thread each."""
        places = self._places(ids, address, 8)
        self._claim(ids, address, places, 8, same=None)
        self._units(self.wrote, 8)[places] = MBARRIER

    def end_mbarrier(self, ids: Array, address: Array) -> None:
        """They hold no value."""
        self._units(self.wrote, 8)[self._places(ids, address, 8)] = NEVER

    def _places(self, ids: Array, address: Array, nbytes: int) -> Array:
        """In units of nbytes."""
        offset = address.astype(np.int64)
        wrong, kind = (offset < 0) | (offset + nbytes > self.size), "shared bounds"
        if not wrong.any():
            wrong, kind = offset % nbytes != 0, "shared alignment"
        if wrong.any():
            thread = int(ids[wrong][0]) % self.threads
            raise Fault(kind, f"{nbytes} bytes at {int(offset[wrong][0])} of {self.size}, thread {thread}")
        return np.asarray((offset + ids // self.threads * self.room) // nbytes)

    def _units(self, tags: Array, nbytes: int) -> Array:
        return tags.reshape(-1, max(1, nbytes // self.unit))

    def _rows(self, times: Array, nbytes: int) -> Array:
        return times.reshape(len(times), -1, max(1, nbytes // self.unit))

    def _numbers(self, count: int, size: int) -> Array:
        return self.data.view(UNSIGNED[size]).reshape(-1, count)

    def _claim(self, ids: Array, address: Array, places: Array, nbytes: int, same: Array | None) -> None:
        """Check that places may be written; `same`: which of them hold the new value already."""
        warps = ids // _WARP
        agents = np.flatnonzero(self.readers)
        times = self._rows(self.read, nbytes)[agents[:, None], places].max(2).T  # (threads, agents)
        wrong = times > self.clocks.known[warps[:, None], agents]
        if wrong.any():
            tags = np.where(wrong, times * AGENTS + agents, 0).max(1)[:, None]
            self._refuse("a write after a read", ids, address, tags > 0, tags)
        tags = self._units(self.wrote, nbytes)[places]
        wrong = self.clocks.unknown(warps, tags) & (tags != NEVER)
        if wrong.any() and not (same is not None and (tags < BEYOND)[wrong].all() and same[wrong.any(1)].all()):
            self._refuse("a second write", ids, address, wrong, tags)

    def _refuse(self, what: str, ids: Array, address: Array, wrong: Array, tags: Array) -> None:
        row, unit = (int(n) for n in np.unravel_index(int(wrong.argmax()), wrong.shape))
        tag, warp = int(tags[row, unit]), int(ids[row]) // _WARP
        kind, why = _NOBODYS.get(tag) or self._other(tag, warp - warp % self.clocks.warps)
        at = int(np.ravel(address[row])[0]) + (unit * self.unit if address.ndim == 1 else 0)
        raise Fault(kind, f"{what} of byte {at} by warp {warp % self.clocks.warps}: {why}")

    def _other(self, tag: int, first: int) -> tuple[str, str]:
        """What is wrong with a tag, in the block whose first warp this is."""
        clocks, agent = self.clocks, tag % AGENTS
        if agent < clocks.products:
            return "shared race", f"warp {agent} used it, and nothing orders them"
        if agent >= clocks.loads:
            return "shared in flight", "a copy from global memory is to fill it, and its mbarrier was not waited for"
        owner = agent % clocks.warps
        what = f"a {'product' if agent < clocks.stores else 'copy to global memory'} of warp {owner}"
        if tag // AGENTS > clocks.known[first + owner, agent]:
            return "shared in flight", f"{what} still reads it"
        return "shared race", f"{what} has read it, and nothing orders them"
