"""A tensor and a box -> where a copy of the box begins and ends: what `cuTensorMapEncodeTiled` makes, as an argument.

    global memory                          shared memory: the box's elements one after the other, lines of its last
    +-----------------------+              dimension; then 16 bytes are moved within their line, as `swizzle` says
    |      +-----+          |
    |      | box |  <- coordinates of its  128 bytes   bits 4-6 of an address xor bits 7-9
    |      +-----+     first element        64 bytes   bits 4-5 xor bits 7-8
    +-----------------------+               32 bytes   bit 4 xor bit 7

What of a box lies outside is filled with zeros, and not stored. Dimensions are outermost first, as Triton has them; the
instructions have coordinates the other way round.
Source: NVIDIA, CUDA driver API, tensor map object management; PTX ISA 8.7, section on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.ptx.faults import Fault
from tests.ptx.global_memory import Buffer
from tests.ptx.values import Array

PARAMETERS: Final = 0x7E << 56  # addresses of parameters: this, and their number in units of 4096
_PART: Final = 16  # bytes that a swizzle moves together
_SWIZZLES: Final = (0, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class TensorMap:
    """An argument of a kernel.

    Attributes:
        buffer: the tensor's memory.
        shape: sizes.
        strides: bytes.
        box: sizes.
        size: bytes of an element.
        swizzle: bytes: 0, 32, 64 or 128.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int
    swizzle: int

    def __post_init__(self) -> None:
        rank, line = len(self.shape), self.box[-1] * self.size
        for wrong, why in (
            (not 1 <= rank <= 5 or len(self.strides) != rank or len(self.box) != rank, "1 to 5 dimensions"),
            (self.buffer.address % _PART != 0, "an address that is a multiple of 16"),
            (any(step % _PART or not 0 <= step < 1 << 40 for step in self.strides[:-1]), "strides of 16 bytes each"),
            (self.strides[-1] != self.size, "elements side by side"),
            (not all(1 <= n <= 1 << 32 for n in self.shape), "sizes from 1 to 2**32"),
            (not all(1 <= n <= 256 for n in self.box), "a box of 1 to 256 elements each way"),
            (line % _PART != 0, "lines of a box that are multiples of 16 bytes"),
            (self.swizzle not in _SWIZZLES, "a swizzle of 0, 32, 64 or 128 bytes"),
            (self.swizzle > 0 and line > self.swizzle, "lines of a box no longer than its swizzle"),
        ):
            if wrong:
                raise Fault(
                    "tensor map", f"{self.buffer.name} wants {why}: {self.shape}, {self.strides}, box {self.box}"
                )

    @property
    def nbytes(self) -> int:
        """Of a box."""
        return int(np.prod(self.box)) * self.size

    def elements(self, coordinates: list[int]) -> tuple[Array, Array]:
        """Addresses of a box's elements in global memory, and which of them are the tensor's."""
        address, inside = np.full(self.box, self.buffer.address, np.int64), np.ones(self.box, np.bool_)
        for axis, (first, step, size) in enumerate(zip(coordinates, self.strides, self.shape, strict=True)):
            place = (first + np.arange(self.box[axis])).reshape(-1, *[1] * (len(self.box) - 1 - axis))
            address, inside = address + place * step, inside & (place >= 0) & (place < size)
        return np.where(inside, address, 0).astype(np.uint64).ravel(), inside.ravel()

    def places(self, start: int) -> Array:
        """Addresses in shared memory of a box's parts of 16 bytes, in their order."""
        address = start + np.arange(0, self.nbytes, _PART)
        return address ^ (address >> 7 & max(0, self.swizzle // _PART - 1)) << 4
