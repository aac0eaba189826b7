"""An architecture -> what a chip of it has, and how many programs fit one of its multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Processor:
    """What the best known chip of an architecture has.

    Attributes:
        shared: bytes of shared memory for all programs of a multiprocessor.
        warps: that a multiprocessor holds.
        multiprocessors: how many there are.
        gigahertz: its clock under load.
        product_cycles: that a warp's product of 16 x 8 x 16 takes in 16 bits; None where products run apart from warps.
    """

    shared: int
    warps: int
    multiprocessors: int
    gigahertz: float
    product_cycles: float | None


# CUDA C++ Programming Guide, table of technical specifications by compute capability; NVIDIA's whitepapers: A100 SXM,
# A40, L40S, H100 SXM, B200. Hopper reaches five eighths of its peak with a warp's products.
PROCESSORS: Final = {
    80: Processor(164 * 1024, 64, 108, 1.41, 8),
    86: Processor(100 * 1024, 48, 84, 1.74, 16),
    89: Processor(100 * 1024, 48, 142, 2.52, 16),
    90: Processor(228 * 1024, 64, 132, 1.755, 6.4),
    100: Processor(228 * 1024, 64, 148, 1.85, None),
}
# Bytes of a compute unit, or of two that share them: AMD's ISA guides of CDNA 3 and 4, RDNA 4.
AMD_SHARED: Final = {"gfx942": 64 * 1024, "gfx950": 160 * 1024, "gfx1201": 128 * 1024}


def programs_at_once(arch: int, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many programs fit a multiprocessor: the least of what its limits allow.

    Registers come by eights to a thread, and in four banks of 16,384; a program's shared memory costs another KiB;
    tensor memory has 512 columns.
    """
    processor = PROCESSORS[arch]
    by_registers = 4 * (16384 // (32 * -(-registers // 8) * 8)) // warps
    by_shared = processor.shared // (shared + 1024)
    by_tensor_memory = 512 // tensor_memory if tensor_memory else by_shared
    return min(by_registers, by_shared, processor.warps // warps, by_tensor_memory)
