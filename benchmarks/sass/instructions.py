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
from dataclasses import dataclass
from typing import Final

_LINE: Final = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:(?P<predicate>@!?U?P[T\d]+)\s+)?(?P<opcode>\S+?)(?:\s+(?P<operands>[^;]*?))?\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*"
    r"/\* 0x(?P<control>[0-9a-f]{16}) \*/"
)
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
