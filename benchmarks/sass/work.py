"""An instruction -> what it costs: a pipe for some cycles, a latency, products, bytes, and what it waits for.

A multiprocessor has four schedulers, and this is one of them with its pipes. Cycles are those of a warp instruction.
Latencies count only where a scoreboard says that someone waits; all others are in the stalls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import pairwise
from typing import Final, NamedTuple

from benchmarks.sass.instructions import Instruction, Loop, pending


class Kind(Enum):
    """What an instruction does besides its turn in a pipe."""

    PLAIN = auto()
    PRODUCT = auto()
    WAIT_PRODUCTS = auto()
    COPY = auto()
    COMMIT = auto()
    WAIT_COPIES = auto()
    BULK_COPY = auto()  # by TMA, into what an mbarrier guards
    ARRIVE = auto()  # at an mbarrier
    WAIT_BARRIER = auto()  # for a phase of an mbarrier
    BARRIER = auto()  # of all warps of a role


class Pipe(NamedTuple):
    """Where an instruction is executed, for how many cycles, and how long its result then takes."""

    name: str
    cycles: float
    latency: float


@dataclass(frozen=True, slots=True)
class Work:
    """What the simulation asks of an instruction.

    Attributes:
        kind: what it does.
        pipe: where; None of what only steers.
        stall: cycles until the warp's next instruction.
        result_board: scoreboard of its result.
        operands_board: scoreboard of its operands.
        waits: scoreboards to wait for.
        flops: of a product, for warps on all four schedulers, as are the next two.
        shared: cycles of shared memory, which serves 128 bytes a cycle to all.
        size: bytes that it copies from global memory.
        closes: it ends a group of a warpgroup's products, or is the last bulk copy that its mbarrier expects.
        left: how many groups may be pending after a wait.
        place: of the mbarrier that it names, or that is told of the bulk copy.
        share: of the bytes that this mbarrier expects, what the bulk copy brings.
    """

    kind: Kind
    pipe: Pipe | None
    stall: int
    result_board: int | None
    operands_board: int | None
    waits: tuple[int, ...]
    flops: int = 0
    shared: float = 0
    size: int = 0
    closes: bool = False
    left: int = 0
    place: int | None = None
    share: float = 1


_SCHEDULERS: Final = 4
_BYTES: Final = 32 * _SCHEDULERS  # for each that a lane moves
_WARPGROUP: Final = re.compile(r"[HQ]GMMA\.64x(\d+)x(\d+)")
_PLACE: Final = re.compile(r"\+0x([0-9a-f]+)\]")
_CONTROL: Final = (
    *("BAR", "WARPGROUP", "WARPSYNC", "BRA", "BSYNC", "BSSY", "NOP", "DEPBAR", "EXIT", "ELECT", "MEMBAR", "FENCE"),
    *("YIELD", "CALL", "RET", "PLOP3", "R2UR"),
)
# The first that an opcode starts with. FP32 and integer products share the FMA pipe, where the latter take two turns;
# exponents have 4 lanes a scheduler; shared memory serves 128 bytes a cycle to all four.
_PIPES: Final = (
    (("MUFU",), Pipe("special", 8, 20)),
    (("IMAD.MOV", "FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"), Pipe("fma", 1, 5)),
    (("IMAD",), Pipe("fma", 2, 5)),
    (("LDC", "ULDC", "S2"), Pipe("constant", 2, 28)),
    (("LDGDEPBAR", "UTMA", "SHFL", "ST", "AT", "RED"), Pipe("memory", 4, 28)),
    (("SYNCS",), Pipe("memory", 4, 25)),
    (("LDL",), Pipe("memory", 4, 35)),
    (("LDG.", "LD."), Pipe("memory", 4, 250)),
    (("U",), Pipe("uniform", 2, 12)),
)
_ALU: Final = Pipe("alu", 2, 5)
_SHARED: Final = ("LDS", "STS")  # and so LDSM, STSM


def works(loop: Loop, product_cycles: float) -> list[Work]:
    """The work of a loop's turn.

    Args:
        loop: its instructions.
        product_cycles: that a warp's product of 16 x 8 x 16 takes on this architecture.
    """
    found = [_work(instruction, product_cycles) for instruction in loop]
    opened = [place for place, instruction in enumerate(loop) if _expects(instruction)]
    for start, end in pairwise([*opened, len(loop)]):
        copies = [place for place in range(start, end) if found[place].kind is Kind.BULK_COPY]
        for place in copies:
            last, share = place == copies[-1], 1 / len(copies)
            found[place] = replace(found[place], place=barrier(loop[start]), closes=last, share=share)
    return found


def barrier(instruction: Instruction) -> int | None:
    """Where the mbarrier lies in shared memory that an instruction names; None if it names none."""
    found = _PLACE.search(instruction.operands) if instruction.opcode.startswith("SYNCS") else None
    return int(found[1], 16) if found else None


def _expects(instruction: Instruction) -> bool:
    """Whether it tells an mbarrier of the bytes that bulk copies will bring: those that follow."""
    return instruction.opcode.startswith("SYNCS.ARRIVE") and "A1T0" not in instruction.opcode


def _work(instruction: Instruction, product_cycles: float) -> Work:
    control = instruction.stall, instruction.result_board, instruction.operands_board, instruction.waits
    opcode, operands = instruction.opcode, instruction.operands
    if found := _WARPGROUP.match(opcode):
        columns, depth = int(found[1]), int(found[2])  # 32 bytes of each row and column, of 16 bits or of 8
        shared = columns / 4 + (0 if operands.split(",")[1].lstrip().startswith("R") else 16)  # its left side
        pipe = Pipe("tensor", max(columns / 2, shared), 0)
        return Work(Kind.PRODUCT, pipe, *control, 2 * 64 * columns * depth, shared, closes="gsb" in operands)
    if opcode.startswith("HMMA.16816"):
        pipe = Pipe("tensor", product_cycles, 0)
        return Work(Kind.PRODUCT, pipe, *control, 2 * 16 * 8 * 16 * _SCHEDULERS)
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return Work(Kind.WAIT_PRODUCTS, None, *control, left=pending(instruction))
    if opcode == "DEPBAR.LE":
        return Work(Kind.WAIT_COPIES, None, *control, left=pending(instruction))
    if opcode.startswith("LDGSTS"):
        each = _width(opcode)
        return Work(Kind.COPY, Pipe("memory", each, 28), *control, shared=each, size=each * _BYTES)
    kinds = {"LDGDEPBAR": Kind.COMMIT, "UTMALDG": Kind.BULK_COPY, "SYNCS.PHASECHK": Kind.WAIT_BARRIER}
    kind = next((kinds[name] for name in kinds if opcode.startswith(name)), Kind.PLAIN)
    if opcode.startswith("BAR.SYNC"):
        kind = Kind.BARRIER
    elif opcode.startswith("SYNCS.ARRIVE") and not _expects(instruction):
        kind = Kind.ARRIVE
    size = _width(opcode) * _BYTES if opcode.startswith("LDG.E.128") else 0
    shared = _width(opcode) if opcode.startswith(_SHARED) else 0
    return Work(kind, _pipe(opcode), *control, shared=shared, size=size, place=barrier(instruction))


def _pipe(opcode: str) -> Pipe | None:
    if opcode.startswith(_CONTROL):
        return None
    if opcode.startswith(_SHARED):
        return Pipe("memory", _width(opcode), 28)
    return next((pipe for names, pipe in _PIPES if opcode.startswith(names)), _ALU)


def _width(opcode: str) -> int:
    """Bytes that each lane moves: of LDSM and STSM the number of matrices says it."""
    wide = {"128": 16, "4": 16, "64": 8, "2": 8}
    return next((wide[part] for part in opcode.split(".") if part in wide), 4)
