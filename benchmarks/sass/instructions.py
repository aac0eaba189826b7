"""The text of a disassembly -> instructions, each with what its control word says.

The compiler, not the hardware, knows when results are there. Each instruction carries a word for that:

    bit     57      52 51    49 48    46 45 44    41
            +---------+--------+--------+--+--------+
            | waits   | read   | write  | y| stall  |
            +---------+--------+--------+--+--------+
             a bit for  scoreboard of     cycles until the warp's
             each       operands, result  next instruction
             scoreboard (7: none)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_LINE: Final = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:(?P<predicate>@!?U?P[T\d]+)\s+)?(?P<opcode>\S+?)(?:\s+(?P<operands>[^;]*?))?\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*"
    r"/\* 0x(?P<control>[0-9a-f]{16}) \*/"
)
_TARGET: Final = re.compile(r"0x([0-9a-f]+)")
# Of tensor cores: of a warpgroup, of one thread for all, of a warp; and the same of 8 bits.
PRODUCTS: Final = ("HGMMA", "UTCHMMA", "HMMA", "QGMMA", "UTCQMMA", "QMMA")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        address: where it stands, in bytes.
        predicate: under which it is executed, "@!P0", or "" for always.
        opcode: its name with all modifiers.
        operands: the rest of its text.
        stall: cycles until its warp may issue the next one.
        result_board: the scoreboard that is cleared when its result is there; None where stalls are enough.
        operands_board: the scoreboard that is cleared when its operands have been read.
        waits: the scoreboards that have to be clear before it is issued.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int
    result_board: int | None
    operands_board: int | None
    waits: tuple[int, ...]


Loop = list[Instruction]
"""What one turn of a loop executes, in order."""


def parse(sass: str) -> list[Instruction]:
    """All instructions of a disassembled kernel, in order."""
    return [_instruction(found) for found in _LINE.finditer(sass)]


def _instruction(found: re.Match[str]) -> Instruction:
    word = int(found["control"], 16)
    write, read = word >> 46 & 7, word >> 49 & 7
    return Instruction(
        int(found["address"], 16),
        found["predicate"] or "",
        found["opcode"],
        found["operands"] or "",
        word >> 41 & 15,
        None if write == 7 else write,
        None if read == 7 else read,
        tuple(board for board in range(6) if word >> 52 + board & 1),
    )


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that hold products, in order: of a kernel with two walks the full one, then the partial."""
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    spans = []
    for end, instruction in enumerate(instructions):
        start = places.get(_target(instruction), end + 1)
        held = instructions[start:end]
        if start <= end and any(x.opcode.startswith(PRODUCTS) for x in held):
            spans.append((start, end))
    inner: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):  # what goes round a loop is longer
        if not any(start <= stop and begin <= end for begin, stop in inner):
            inner.append((start, end))
    return [_straight(instructions, places, start, end) for start, end in sorted(inner)]


def local_accesses(loop: Loop) -> int:
    """How often a turn reads or writes local memory, where registers go that don't fit."""
    return sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in loop)


def products_under_copies(loop: Loop) -> int | None:
    """How many products are issued, at least, between a copy into shared memory and the wait for it; None: no copies.

    0 says that stages prefetch nothing: whoever waits for "all but the last n" groups of copies waits for one that was
    issued after the turn's last product.
    """
    products, commits, least = 0, [], None
    for instruction in loop * 8:  # what a turn waits for was issued some turns before
        if instruction.opcode.startswith(PRODUCTS):
            products += 1
        elif instruction.opcode == "LDGDEPBAR":
            commits.append(products)
        elif instruction.opcode == "DEPBAR.LE" and len(commits) > (left := pending(instruction)):
            under = products - commits[-1 - left]
            least = under if least is None else min(least, under)
    return least


def pending(wait: Instruction) -> int:
    """How many groups of copies, or of products, may be pending after a wait."""
    return int(wait.operands.split(",")[1].split()[0], 16)


def _straight(instructions: Sequence[Instruction], places: dict[int, int], start: int, end: int) -> Loop:
    """A turn: jumps forward that always happen are followed, those under a predicate are not."""
    place, found = start, []
    while place <= end:
        instruction = instructions[place]
        found.append(instruction)
        after = places.get(_target(instruction), -1)
        place = after if not instruction.predicate and place < after <= end else place + 1
    return found


def _target(instruction: Instruction) -> int:
    """Where a branch goes; -1 of what is none, or depends on more than the predicate."""
    if not instruction.opcode.startswith("BRA") or "UP" in instruction.operands[:4]:
        return -1
    found = _TARGET.search(instruction.operands)
    return int(found[1], 16) if found else -1
