"""Shared memory of several blocks side by side, that knows who wrote and read each of its units since the last barrier.

    tag of a unit     64 * (how many barriers the block has passed) + warp
    NEVER             nobody wrote it
    IN_FLIGHT         a copy is still to fill it, or a product still reads it
    SEVERAL           instead of a warp: more than one

A warp may read what another one wrote, or write what another one wrote or read, only with a barrier between. Threads of
one warp run in step here, so what they do to one another is not looked at.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tests.ptx.faults import Fault
from tests.ptx.values import UNSIGNED, Array

NEVER: Final = -1
IN_FLIGHT: Final = 1 << 30
SEVERAL: Final = 63
_WARPS: Final = 64


class SharedMemory:
    """The memory of `blocks` blocks.

    Args:
        blocks: how many.
        size: bytes that the kernel asked for.
        unit: bytes of its smallest access.
        threads: of a block.
    """

    def __init__(self, blocks: int, size: int, unit: int, threads: int) -> None:
        self.size, self.unit, self.threads = size, unit, threads
        self.room = -(-max(size, 16) // 1024) * 1024
        self.data = np.zeros(blocks * self.room, np.uint8)
        self.wrote = np.full(blocks * self.room // unit, NEVER, np.int32)
        self.read = np.full(blocks * self.room // unit, NEVER, np.int32)
        self.barriers = np.zeros(blocks, np.int32)
        self.fenced = np.zeros(blocks, np.int32)  # what was written before so many barriers, products may read

    def pass_barrier(self, blocks: Array) -> None:
        """All threads of these blocks have met."""
        self.barriers[blocks] += 1

    def fence(self, blocks: Array) -> None:
        """What these blocks have written so far, products may read."""
        self.fenced[blocks] = self.barriers[blocks] + 1

    def load(self, ids: Array, address: Array, count: int, size: int) -> Array:
        """(threads, count) numbers of `size` bytes, for threads by their ids.

        Raises:
            Fault: the place is out of bounds, misaligned, never written, or another warp's since the last barrier.
        """
        places = self._places(ids, address, count * size)
        now, mine = self._tags(ids)
        tags = self._units(self.wrote, count * size)[places]
        wrong = (tags >= now) & (tags != mine) | (tags == NEVER)
        if wrong.any():
            self._refuse("a read", ids, address, wrong, tags)
        self._mark_read(self._units(self.read, count * size), places, now, mine)
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
        self._units(self.wrote, count * size)[places] = self._tags(ids)[1]

    def start_copy(self, ids: Array, address: Array, nbytes: int) -> Array:
        """Reserve places that a copy is to fill: until it has arrived they are nobody's.

        Returns:
            The places, for `end_copy`.
        """
        places = self._places(ids, address, nbytes)
        self._claim(ids, address, places, nbytes, same=None)
        self._units(self.wrote, nbytes)[places] = IN_FLIGHT
        return places

    def end_copy(self, ids: Array, places: Array, rows: Array) -> None:
        """Fill them: (threads, nbytes) bytes, written just now by those who waited."""
        nbytes = rows.shape[1]
        self.data.reshape(-1, nbytes)[places] = rows
        self._units(self.wrote, nbytes)[places] = self._tags(ids)[1]

    def start_product(self, address: Array, block: Array, size: int) -> tuple[Array, Array]:
        """Read one operand of a wgmma, by the asynchronous proxy.

        Args:
            address: of each element in its block's memory.
            block: that each is of; broadcasts with address.
            size: bytes of an element.

        Returns:
            The elements' bits, and the units that are read until the product has ended.

        Raises:
            Fault: they are out of bounds, never written, on their way, or not fenced and behind a barrier.
        """
        if (address < 0).any() or (address + size > self.size).any():
            raise Fault("shared bounds", f"wgmma reads byte {int(address.max())} of {self.size}")
        places = (address + block * self.room) // size
        units = places * size // self.unit
        tags, barriers = self.wrote[units], self.barriers[block]
        for wrong, kind, why in (
            (tags == NEVER, "shared uninitialised", "was never written"),
            (tags == IN_FLIGHT, "shared cp.async", "a copy is still to fill"),
            (tags >= barriers * _WARPS, "shared race", "was written since the last barrier"),
            (tags // _WARPS >= self.fenced[block], "shared proxy", "was written since the last fence.proxy.async"),
        ):
            if wrong.any():
                raise Fault(kind, f"wgmma reads byte {int(address[wrong].min())}, which {why}")
        self.read[units] = IN_FLIGHT
        return self.data.view(UNSIGNED[size])[places], np.unique(units)

    def end_product(self, units: Array) -> None:
        """They have been read just now, by several warps."""
        self.read[units] = self.barriers[self.block_of(units)] * _WARPS + SEVERAL

    def block_of(self, units: Array) -> Array:
        """The block whose memory they are in."""
        return np.asarray(units * self.unit // self.room)

    def hold(self, units: Array) -> None:
        """A product still reads them."""
        self.read[units] = IN_FLIGHT

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

    def _numbers(self, count: int, size: int) -> Array:
        return self.data.view(UNSIGNED[size]).reshape(-1, count)

    def _tags(self, ids: Array) -> tuple[Array, Array]:
        """The least tag since the last barrier, and the thread's own: (threads, 1) each."""
        now = self.barriers[ids // self.threads] * _WARPS
        return now[:, None], (now + ids % self.threads // 32)[:, None]

    @staticmethod
    def _mark_read(read: Array, places: Array, now: Array, mine: Array) -> None:
        before = read[places]
        after = np.where((before >= now) & (before != mine) & (before != IN_FLIGHT), now + SEVERAL, mine)
        after = np.where(before == IN_FLIGHT, before, after)
        read[places] = after
        both = (read[places] != after).any(1)  # threads of several warps at one place
        if both.any():
            read[places[both]] = np.broadcast_to(now + SEVERAL, after.shape)[both]

    def _claim(self, ids: Array, address: Array, places: Array, nbytes: int, same: Array | None) -> None:
        """Check that places may be written; `same`: which of them hold the new value already."""
        now, mine = self._tags(ids)
        tags = self._units(self.read, nbytes)[places]
        wrong = (tags >= now) & (tags != mine)
        if wrong.any():
            self._refuse("a write after a read", ids, address, wrong, tags)
        tags = self._units(self.wrote, nbytes)[places]
        wrong = (tags >= now) & (tags != mine)
        if wrong.any() and not (same is not None and (tags != IN_FLIGHT)[wrong].all() and same[wrong.any(1)].all()):
            self._refuse("a second write", ids, address, wrong, tags)

    def _refuse(self, what: str, ids: Array, address: Array, wrong: Array, tags: Array) -> None:
        row, unit = (int(n) for n in np.unravel_index(int(wrong.argmax()), wrong.shape))
        tag, warp = int(tags[row, unit]), int(ids[row]) % self.threads // 32
        kind, why = "shared race", f"warp {tag % _WARPS} used it since the last barrier"
        if tag == NEVER:
            kind, why = "shared uninitialised", "it was never written"
        elif tag == IN_FLIGHT:
            kind, why = "shared cp.async", "a copy to it, or a product that reads it, is in flight"
        elif tag % _WARPS == SEVERAL:
            why = "several warps read it since the last barrier"
        raise Fault(kind, f"{what} of byte {int(address[row]) + unit * self.unit} by warp {warp}: {why}")
