"""Architecture, dtype, head dims and pass -> the table's tile, each row with where it came from.

Unmeasured: every row has been compiled and looked at (`benchmarks/static_gates.py`), none has been timed on a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch

from maskflash.backends.triton.signature import OF_KEYS, PassName
from maskflash.errors import BackendError
from maskflash.ground.eight_bits import FORMAT

WARPGROUP: Final = 4  # warps that share a product of Hopper's
Arch = int | str
"""A device's compute capability times ten, or AMD's name of its architecture."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work, and what its compiler is told.

    Attributes:
        block_m: rows of a tile, in tokens.
        block_n: columns of a tile, in tokens.
        warps: of a program.
        stages: of the pipeline that loads what a program walks over.
        registers: most that a thread may have, so that more programs fit a multiprocessor; None for no limit.
        consumers: warpgroups that compute, with `registers` each thread, where another warp copies (pass "hopper");
            0 where all warps do both. No choice: the kernel has two, of 64 rows each, and so 128 rows and 12 warps.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None
    consumers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told; where warps have roles, of the first of them."""
        if self.consumers:
            return {"num_warps": WARPGROUP}
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        arch: that it was chosen for: compute capability times ten, 80, 86, 90, 100; or one of AMD's, "gfx942".
        pass_name: which kernel.
        bits: of the input dtype, 8, 16 or 32.
        head_dim: largest D and DV that it serves.
        tile: the choice.
        source: "static gate": compiled and checked, never timed; or the device it was measured on.
    """

    arch: Arch
    pass_name: PassName
    bits: int
    head_dim: int
    tile: Tile
    source: str = "static gate"


_Numbers = tuple[int, int, int, int] | tuple[int, int, int, int, int] | tuple[int, int, int, int, int, int]


def _rows() -> tuple[Row, ...]:
    rows = []
    for arch, table in _TABLE.items():
        for (pass_name, bits), tiles in table.items():
            rows += [Row(arch, pass_name, bits, dim, Tile(*tile)) for dim, tile in tiles.items()]
    return tuple(rows)


# (block_m, block_n, warps, stages, registers, consumers) by head dim. dK/dV holds block_n keys and walks block_m
# queries. Kernels compute in powers of two; masking what a head dim leaves of one takes registers, which is what the
# rows for 120 are about.
_FLOAT32: Final[dict[tuple[PassName, int], dict[int, _Numbers]]] = {
    ("forward", 32): {64: (64, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    ("split", 32): {64: (32, 32, 4, 2), 128: (16, 16, 4, 2), 256: (16, 16, 4, 1)},
    ("dkdv", 32): {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    ("dq", 32): {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
}
_CDNA: Final[dict[tuple[PassName, int], dict[int, _Numbers]]] = {
    ("forward", 16): {64: (128, 32, 4, 2), 128: (128, 32, 4, 2), 256: (64, 32, 4, 1)},
    ("split", 16): {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 4, 1)},
    ("dkdv", 16): {64: (32, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 1)},
    ("dq", 16): {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
    **_FLOAT32,
}
_TABLE: Final[dict[Arch, dict[tuple[PassName, int], dict[int, _Numbers]]]] = {
    80: {
        ("forward", 16): {64: (128, 64, 8, 3, 128), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
        ("split", 16): {64: (32, 64, 4, 3), 128: (32, 32, 4, 3), 256: (32, 32, 4, 3)},
        ("dkdv", 16): {64: (32, 64, 4, 2), 128: (32, 64, 4, 3), 256: (32, 64, 8, 3)},
        ("dq", 16): {64: (128, 32, 4, 3), 120: (32, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 3)},
        **_FLOAT32,
    },
    86: {
        ("forward", 8): {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},  # of 8.9 and 12.x
        ("forward", 16): {64: (64, 64, 4, 3), 120: (128, 32, 8, 3), 128: (128, 64, 8, 2), 256: (64, 16, 8, 3)},
        ("split", 16): {64: (32, 64, 4, 3), 128: (32, 32, 4, 3), 256: (32, 32, 4, 2)},
        ("dkdv", 16): {64: (32, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 1)},
        ("dq", 16): {64: (128, 32, 4, 3), 120: (32, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        **_FLOAT32,
    },
    90: {
        ("forward", 8): {64: (128, 64, 8, 3, 128), 128: (128, 128, 8, 3), 256: (64, 64, 8, 3)},
        ("forward", 16): {64: (128, 64, 8, 3, 128), 128: (128, 64, 8, 2, 128), 256: (128, 32, 8, 3)},
        ("hopper", 16): {
            64: (128, 128, 12, 4, 240, 2),
            128: (128, 128, 12, 2, 240, 2),
            256: (128, 64, 12, 2, 240, 2),
        },
        ("hopper_dkdv", 16): {64: (128, 128, 12, 2, 240, 2), 128: (64, 128, 12, 2, 232, 2)},
        ("hopper_dq", 16): {64: (128, 128, 12, 2, 240, 2), 128: (128, 64, 12, 2, 240, 2)},
        ("split", 16): {64: (32, 64, 4, 3), 128: (32, 32, 4, 4), 256: (32, 32, 4, 3)},
        ("dkdv", 16): {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (32, 64, 8, 1)},
        ("dq", 16): {64: (128, 64, 8, 3, 128), 128: (128, 64, 8, 3), 256: (64, 32, 8, 1)},
        **_FLOAT32,
    },
    100: {
        ("forward", 8): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        ("forward", 16): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        ("split", 16): {64: (32, 64, 4, 3), 128: (32, 32, 4, 3), 256: (32, 32, 8, 3)},
        ("dkdv", 16): {64: (64, 128, 8, 2), 120: (32, 64, 8, 2), 128: (32, 128, 8, 2), 256: (64, 64, 8, 1)},
        ("dq", 16): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
        **_FLOAT32,
    },
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    # RDNA 4 has no matrix products of float32, and at 256 dims no tile of dK and dV fits its registers. In RDNA 3 none
    # does at any dim.
    "gfx1201": {
        ("forward", 16): {64: (64, 32, 8, 1), 128: (64, 32, 8, 1)},
        ("split", 16): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1)},
        ("dkdv", 16): {64: (32, 32, 4, 1), 128: (16, 32, 4, 1)},
        ("dq", 16): {64: (32, 32, 4, 1), 128: (32, 16, 4, 1)},
    },
}

ROWS: Final = _rows()
HOPPER_DIM: Final = max(_TABLE[90]["hopper", 16])  # largest head dim of Hopper's own forward
HOPPER_BACKWARD_DIM: Final = min(max(_TABLE[90][name, 16]) for name in ("hopper_dkdv", "hopper_dq"))  # and backward
DIM_IN_8_BITS: Final = max(row.head_dim for row in ROWS if row.bits == 8)  # likewise of forward in 8 bits
DELTA: Final = Tile(16, 16, 4, 1)  # bound by memory; its products are few with few rows
PARTS: Final = 16  # of a row that are joined at once
COMBINE: Final = Tile(16, 16, 4, 1)  # it has no tile: a row for each program


# AMD's architectures, each with its family: CDNA 3 and 4, RDNA 4.
AMD: Final = {"gfx942": "gfx942", "gfx950": "gfx950", "gfx1200": "gfx1201", "gfx1201": "gfx1201"}
# Bytes of shared memory that one program may ask for.
SHARED_LIMITS: Final[dict[Arch, int]] = {
    **{80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448},
    **{"gfx942": 65_536, "gfx950": 163_840, "gfx1201": 65_536},
}


def choose(
    arch: Arch,
    pass_name: PassName,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    shared_limit: int | None = None,
    of_pairs: int = 0,
) -> Tile:
    """The table's tile, shrunk to divide the block map's and to fit the device's shared memory.

    A score's look-ups for each pair hold registers and, as tiles of float32 on their way, shared memory: with them
    kernels take steps half as long where those are longer than 32 tokens.

    Args:
        arch: of the device; see the table's families.
        pass_name: which kernel.
        dtype: of q, k and v.
        head_dim: the larger of D and DV.
        block_size: (bq, bkv) of the block map.
        shared_limit: bytes that one program may have; None for what the family's devices have.
        of_pairs: look-ups that a score has for each pair.

    Raises:
        BackendError: an architecture that no family serves, a dtype or head dim that no row serves, or a block size
            that is no multiple of 16.
    """
    family = _family(arch)
    pass_name = "dq" if pass_name == "dtables" else pass_name  # its products, and nothing to hold for them
    tiles = _TABLE[family].get((pass_name, 8 * dtype.itemsize), {})
    fitting = [dim for dim in sorted(tiles) if dim >= head_dim]
    if not fitting:
        kind, largest = str(dtype).removeprefix("torch."), max(_TABLE[family]["forward", 16])
        widths = "16- and 32-bit" if ("forward", 32) in _TABLE[family] else "16-bit"
        raise BackendError(
            f"the triton backend serves {widths} types and head dims to {largest} here, got {kind}, {head_dim}"
        )
    tile = Tile(*tiles[fitting[0]])
    block_m, block_n = (
        _dividing(side, size) for side, size in zip((tile.block_m, tile.block_n), block_size, strict=True)
    )
    tile = replace(tile, block_m=block_m, block_n=block_n)
    walked = "block_m" if pass_name in OF_KEYS else "block_n"
    if of_pairs and getattr(tile, walked) > 32:
        tile = replace(tile, **{walked: getattr(tile, walked) // 2})
    limit = SHARED_LIMITS[family] if shared_limit is None else shared_limit
    while shared_bytes(family, pass_name, tile, dtype.itemsize, head_dim, of_pairs) > limit:
        smaller = shrunk(pass_name, tile, dtype)
        if smaller is None:
            break  # an estimate from above: the launch will tell
        tile = smaller
    return tile


def shared_bytes(arch: Arch, pass_name: PassName, tile: Tile, itemsize: int, head_dim: int, of_pairs: int = 0) -> int:
    """An estimate, from above, of the shared memory of one program.

    What it holds throughout, the buffers of the two tensors it walks over, P and dS on their way to a product, the
    mask's look-ups, and those of a score for each pair, of float32, in every stage but one. Hopper's products read
    their buffers while the next are filled, so there every stage has one; before, one less. Without a pipeline a tile
    that is used both ways round is there twice. On AMD's GPUs what a program holds lies in registers, and passes
    through the buffers' memory on the way there.
    """
    own, walked = (tile.block_n, tile.block_m) if pass_name in OF_KEYS else (tile.block_m, tile.block_n)
    held = own if pass_name in ("forward", "hopper", "split") else 2 * own
    dims = 1 << (head_dim - 1).bit_length()
    if tile.consumers:  # P and dS stay in registers
        of_rows = _ROW_BYTES * tile.stages * walked if pass_name in OF_KEYS else 0
        return itemsize * (held + 2 * tile.stages * walked) * dims + of_rows + _BARRIER_BYTES
    hopper = isinstance(arch, int) and arch >= 90
    buffers = 3 if tile.stages == 1 else 2 * (tile.stages if hopper else tile.stages - 1)
    rows = max(held, buffers * walked) if isinstance(arch, str) else held + buffers * walked
    weights = (2 if pass_name == "dkdv" else 1) * tile.block_m * tile.block_n
    looked_up = 4 * of_pairs * tile.block_m * tile.block_n * (tile.stages - 1)
    return itemsize * (rows * dims + weights) + looked_up + _MASK_BYTES


LEAST_RING: Final = 2  # slots: consumers wait for the next keys before they release a step's values
_BARRIER_BYTES: Final = 3 << 10  # and what goes from one thread to others
_ROW_BYTES: Final = 20  # lse, delta, both ends of an interval, a word of dropout
_MASK_BYTES: Final = 12 << 10  # four look-ups of a FlashMask, pipelined: 9 KiB with the smallest tiles


def least(dtype: torch.dtype) -> dict[str, int]:
    """The shortest sides of tiles. Products of 8 bits sum 32 keys at least, and on Hopper have 64 rows at least."""
    return {"block_m": 64, "block_n": 32} if dtype == FORMAT else {"block_m": 16, "block_n": 16}


def shrunk(pass_name: PassName, tile: Tile, dtype: torch.dtype) -> Tile | None:
    """The next smaller choice where a kernel did not fit the device: shorter steps, then fewer stages, then both sides.

    Two stages prefetch nothing. On Hopper, half the step is predicted to leave dK and dV at 128 dims 416 of 500
    TFLOP/s in 114 KiB, a stage less 392 in 130 KiB, half of what a program holds 350.
    """
    if tile.consumers:
        return replace(tile, stages=tile.stages - 1) if tile.stages > LEAST_RING else None
    own, walked = ("block_n", "block_m") if pass_name in OF_KEYS else ("block_m", "block_n")
    if getattr(tile, walked) <= 32 and tile.stages > 1:
        return replace(tile, stages=tile.stages - 1)
    ends = least(dtype)
    sides = {side: getattr(tile, side) for side in (walked, own) if getattr(tile, side) > ends[side]}
    if not sides:
        return None
    side = walked if tile.stages > 1 else max(sides, key=lambda side: sides[side])
    return replace(tile, **{side: sides[side] // 2})


def candidates(tile: Tile, dtype: torch.dtype) -> Iterable[Tile]:
    """What to time where tiles are measured: the table's tile and its neighbours, one thing changed at a time."""
    yield tile
    for stages in (tile.stages - 1, tile.stages + 1):
        if stages >= (LEAST_RING if tile.consumers else 1):
            yield replace(tile, stages=stages)
    if tile.consumers:
        return  # its warps, rows and registers are those of its roles
    yield replace(tile, warps=4 if tile.warps == 8 else 8)
    if tile.registers is not None:
        yield replace(tile, registers=None)
    for side in ("block_m", "block_n"):
        tokens = getattr(tile, side)
        if tokens > least(dtype)[side]:
            yield replace(tile, **{side: tokens // 2})
        if tokens < 128:
            yield replace(tile, **{side: tokens * 2})


def _family(arch: Arch) -> Arch:
    """The family that serves an architecture: the nearest at or below it; of AMD's, the one of its generation.

    Consumer Blackwell (12.x) has the products and the shared memory of consumer Ampere, not of 10.0.
    """
    if isinstance(arch, str):
        if arch not in AMD:
            raise BackendError(f"the triton backend serves AMD's {', '.join(AMD)}, got {arch}")
        return AMD[arch]
    below = [family for family in _TABLE if isinstance(family, int) and family <= arch]
    if not below:
        raise BackendError(f"the triton backend needs compute capability 8.0 or later, got {arch / 10}")
    return 86 if arch >= 120 else max(below)


def _dividing(side: int, size: int) -> int:
    """The largest power of two up to `side` that divides a block size."""
    while side >= 16 and size % side:
        side //= 2
    if side < 16:
        raise BackendError(f"the triton backend needs block sizes that are multiples of 16, got {size}")
    return side
