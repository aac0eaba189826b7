"""Tensors -> global memory at addresses of its own, that knows which bytes are whose and which hold a value.

    buffer     0                1 << 36             2 << 36
    address    |  lead | bytes  |   lead | bytes    |    each far from the next: past the end of one lies nothing
                       ^ a view's extent: `OWNED` where an element is, `FOREIGN` in the gaps of its strides

The bytes are the tensor's own, in place. A fake address has the same remainder modulo 256 as the true one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final

import numpy as np

from tests.ptx.faults import Fault
from tests.ptx.values import UNSIGNED, Array

# Not the tensor's; with a value; without; written by this launch; added to by it.
FOREIGN, READY, EMPTY, WRITTEN, ADDED = range(5)
_ALIGNED: Final = 256
_SPACING: Final = 36  # bits


class Buffer:
    """A tensor's bytes, and the state of each.

    Args:
        name: of the kernel's argument.
        pointer: the true address of its first element.
        shape: its sizes.
        strides: in elements, not negative.
        size: bytes of an element.
        empty: it holds no value yet.
        shift: bytes by which its alignment is worse than the true one.
    """

    def __init__(
        self,
        name: str,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        size: int,
        *,
        empty: bool = False,
        shift: int = 0,
    ) -> None:
        self.name, self.number = name, 0
        self.lead = (pointer % _ALIGNED + shift) if shape and 0 not in shape else 0
        self.length = (sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1) * size
        self.length = 0 if 0 in shape else self.length
        whole = -(-(self.lead + self.length) // _ALIGNED) * _ALIGNED
        memory = (ctypes.c_uint8 * whole).from_address(pointer - self.lead) if self.length else bytearray(whole)
        self.data = np.frombuffer(memory, np.uint8)
        self.state = np.zeros(whole, np.uint8)  # FOREIGN
        if self.length:
            owned = self.state[self.lead : self.lead + self.length]
            bytes_of = (*shape, size), (*(step * size for step in strides), 1)
            np.lib.stride_tricks.as_strided(owned, *bytes_of)[...] = EMPTY if empty else READY

    @property
    def address(self) -> int:
        """What the kernel is given."""
        return (self.number << _SPACING) + self.lead

    def unwritten(self) -> int:
        """Bytes that no thread wrote, of a tensor of which some were written."""
        if not (self.state == WRITTEN).any():
            return 0
        return int(((self.state == READY) | (self.state == EMPTY)).sum())


class GlobalMemory:
    """All tensors of a launch."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = buffers
        for number, buffer in enumerate(buffers, 1):
            buffer.number = number

    def load(self, address: Array, active: Array, count: int, size: int) -> Array:
        """(threads, count) numbers of `size` bytes; 0 for threads that are not active.

        Raises:
            Fault: the place is no tensor's, misaligned, or holds no value or one of this launch.
        """
        out = np.zeros((len(address), count), UNSIGNED[size])
        for buffer, some in self._parts(address, active):
            places = self._places(buffer, address, some, count * size)
            states = _rows(buffer.state, count, size)[places[some]]
            if (states != _all(READY, size)).any():
                self._refuse(buffer, places, some, count * size, "a load from", (READY,))
            found = _rows(buffer.data, count, size)[places]
            out = found if some.all() else np.where(some[:, None], found, out)
        return out

    def store(self, address: Array, active: Array, values: Array, size: int) -> None:
        """Write (threads, count) numbers of `size` bytes.

        Raises:
            Fault: the place is no tensor's, misaligned, or gets two different values in one launch.
        """
        count = values.shape[1]
        for buffer, some in self._parts(address, active):
            places, new = self._places(buffer, address, some, count * size)[some], values[some]
            states, data = _rows(buffer.state, count, size), _rows(buffer.data, count, size)
            before = states[places].view(np.uint8)
            if (before == FOREIGN).any():
                row = int((before == FOREIGN).any(1).argmax())
                raise Fault("global foreign", f"a store to {self._spot(buffer, places[row], count * size)}")
            if (before == ADDED).any():
                row = int((before == ADDED).any(1).argmax())
                raise Fault("global race", f"a store to {self._spot(buffer, places[row], count * size)}, added to here")
            again = (before == WRITTEN).any(1)
            if again.any() and (data[places] != new)[again].any():
                spot = self._spot(buffer, places[int(again.argmax())], count * size)
                raise Fault("global double write", f"another value for {spot}")
            data[places] = new
            if (data[places] != new).any():
                raise Fault("global double write", f"threads of one store write different values to {buffer.name}")
            states[places] = _all(WRITTEN, size)

    def add(self, address: Array, active: Array, values: Array, size: int) -> None:
        """Add unsigned numbers (threads,) of `size` bytes, any number of them to a place; sums wrap.

        Raises:
            Fault: the place is no tensor's, misaligned, or holds no value or one that this launch stored.
        """
        for buffer, some in self._parts(address, active):
            places = self._places(buffer, address, some, size)
            states, data = _rows(buffer.state, 1, size)[:, 0], _rows(buffer.data, 1, size)[:, 0]
            before = states[places[some]]
            if ((before != _all(READY, size)) & (before != _all(ADDED, size))).any():
                self._refuse(buffer, places, some, size, "an addition to", (READY, ADDED))
            np.add.at(data, places[some], values[some])
            states[places[some]] = _all(ADDED, size)

    def _parts(self, address: Array, active: Array) -> Iterator[tuple[Buffer, Array]]:
        """Active threads by buffer; nearly always they are all in one."""
        numbers = address >> np.uint64(_SPACING)
        for number in np.unique(numbers[active]):
            some = active & (numbers == number)
            if not 1 <= number <= len(self.buffers):
                at = int(address[int(some.argmax())])
                raise Fault("global bounds", f"address {at:#x} is in no tensor")
            yield self.buffers[int(number) - 1], some

    def _places(self, buffer: Buffer, address: Array, active: Array, nbytes: int) -> Array:
        """Offsets into a buffer in units of nbytes; of those that are not active, any."""
        offset = np.where(active, (address & np.uint64((1 << _SPACING) - 1)).astype(np.int64), 0)
        wrong = active & ((offset < buffer.lead) | (offset + nbytes > buffer.lead + buffer.length))
        kind = "global bounds"
        if not wrong.any():
            wrong, kind = offset % nbytes != 0, "global alignment"
        if wrong.any():
            at = int(offset[int(wrong.argmax())])
            what = f"{nbytes} bytes at {buffer.name} + {at - buffer.lead} of {buffer.length}"
            raise Fault(kind, f"{what}, address {at % nbytes} mod {nbytes}, thread {int(wrong.argmax())}")
        return np.asarray(offset // nbytes)

    def _refuse(
        self, buffer: Buffer, places: Array, some: Array, nbytes: int, what: str, fine: tuple[int, ...]
    ) -> None:
        wrong = ~np.isin(buffer.state.reshape(-1, nbytes)[places], fine)
        place = int((some & wrong.any(1)).argmax())
        kind, why = _WRONG[int(buffer.state.reshape(-1, nbytes)[places[place]][wrong[place]][0])]
        raise Fault(kind, f"{what} {self._spot(buffer, places[place], nbytes)}, which is {why}")

    @staticmethod
    def _spot(buffer: Buffer, place: int, nbytes: int) -> str:
        return f"{nbytes} bytes at {buffer.name} + {int(place) * nbytes - buffer.lead}"


_WRONG: Final = {
    FOREIGN: ("global foreign", "not the tensor's"),
    EMPTY: ("global uninitialised", "never written"),
    WRITTEN: ("global race", "written by this very launch"),
    ADDED: ("global race", "added to by this very launch"),
}


def _rows(array: Array, count: int, size: int) -> Array:
    """Bytes as rows of `count` numbers of `size` bytes."""
    return array.view(UNSIGNED[size]).reshape(-1, count)


def _all(state: int, size: int) -> int:
    """A number of `size` bytes that are all `state`."""
    return UNSIGNED[size](int.from_bytes(bytes([state]) * size, "little"))
