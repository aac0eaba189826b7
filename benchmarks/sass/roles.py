"""A kernel's machine code -> its roles: which warps run which loops, and how deep the rings between them are.

    start --+--> producer:  [ wait for empty | copy K | copy V ]  [ ... of the next walk ]
            |                      ^               |
            |    arrive at empty --+               +--> full, when the bytes are there
            |                      |               v
            +--> consumer:  [ wait for full | products | arrive at empty ]  [ ... ]
            +--> consumer:  the same, of other rows

The warps of a warp-specialised kernel part at a jump to where a register says. So loops that one warp can come to
without such a jump are of one role. Loops in the same place of their roles run at the same time. Of other kernels all
warps have one role.

A barrier is known by its place in shared memory, which instructions name. Those of a ring lie side by side, eight bytes
each, and instructions name the first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.sass.flow import Flow, flow, loops, reached
from benchmarks.sass.instructions import PRODUCTS, Instruction, Loop
from benchmarks.sass.work import barrier

BULK_COPY: Final = "UTMALDG"  # by the unit for tensor memory access (TMA)
_THREADS: Final = re.compile(r"0x[0-9a-f]+, 0x([0-9a-f]+)")
_BARRIER_BYTES: Final = 8
_WARPGROUP: Final = 4


@dataclass(frozen=True, slots=True)
class Role:
    """What some warps of a program do.

    Attributes:
        loops: one for each walk, in order.
        warps: how many.
    """

    loops: list[Loop]
    warps: int


def roles(instructions: Sequence[Instruction], warps: int) -> list[Role]:
    """The roles that hold products or bulk copies, products first.

    Args:
        instructions: of the whole kernel.
        warps: of a program, those that no role needs included.

    Raises:
        ValueError: if roles have different numbers of loops, or need more warps than there are.
    """
    computing, copying = loops(instructions), loops(instructions, BULK_COPY)
    if all(loop in computing for loop in copying):
        return [Role(computing, warps)]
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    ways = flow(instructions)
    found = [
        Role(group, _warps(group, at_least))
        for kind, at_least in ((computing, _WARPGROUP), ([loop for loop in copying if loop not in computing], 1))
        for group in _together(ways, kind, places)
    ]
    numbers, needed = {len(role.loops) for role in found}, sum(role.warps for role in found)
    if len(numbers) != 1 or needed > warps:
        raise ValueError(
            f"roles: got {[(len(role.loops), role.warps) for role in found]} as (loops, warps) of each, expected as "
            f"many loops of each and at most {warps} warps; the model cannot tell which loops run together"
        )
    return found


def depths(instructions: Sequence[Instruction]) -> dict[int, int]:
    """For each place of a barrier that loops name, how many barriers its ring has."""
    made = {
        place for each in instructions if each.opcode.startswith("SYNCS.EXCH") if (place := barrier(each)) is not None
    }
    named = {
        place
        for kind in (PRODUCTS, BULK_COPY)
        for loop in loops(instructions, kind)
        for each in loop
        if (place := barrier(each)) is not None
    }
    found = {}
    for place in named:
        after = place + _BARRIER_BYTES
        while after in made and after not in named:
            after += _BARRIER_BYTES
        found[place] = (after - place) // _BARRIER_BYTES
    return found


def _together(ways: Flow, kind: list[Loop], places: dict[int, int]) -> list[list[Loop]]:
    """Loops that one warp runs, one after another."""
    groups: list[list[Loop]] = []
    for loop in kind:
        start = places[loop[0].address]
        before = next((group for group in groups if start in reached(ways, [places[group[0][0].address]])), None)
        if before is None:
            groups.append([loop])
        else:
            before.append(loop)
    return groups


def _warps(group: list[Loop], at_least: int) -> int:
    """How many warps run some loops: barriers say for how many threads they wait."""
    named = [_THREADS.match(each.operands) for loop in group for each in loop if each.opcode.startswith("BAR.SYNC")]
    return max([at_least, *(int(found[1], 16) // 32 for found in named if found)])
