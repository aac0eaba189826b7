"""Instructions in the order of their addresses -> where a warp can go, and the loops that it turns.

    head:   ...               a jump back is a loop's if its head lies on every way to it. This one is:
            @!P0 BRA slow
    after:  ...
            @P1  BRA head
            EXIT
    slow:   SYNCS.PHASECHK    and this one is none: it returns from a part that the compiler laid elsewhere, and
            @!P0 BRA slow     which `head` jumps to without `after`
            BRA  after

Jumps to where a register says lead nowhere here: what lies behind them starts anew, as the roles of a warp-specialised
kernel do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from benchmarks.sass.instructions import PRODUCTS, Instruction, Loop

_TARGET: Final = re.compile(r"0x([0-9a-f]+)")

Flow = list[list[int]]
"""For each place, the places that may come next."""


def flow(instructions: Sequence[Instruction]) -> Flow:
    """Where each instruction may lead to."""
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    found: Flow = []
    for place, each in enumerate(instructions):
        after = []
        if each.predicate or _uniform(each) or not each.opcode.startswith(("BRA", "BRX", "EXIT", "RET")):
            after = [place + 1] if place + 1 < len(instructions) else []
        target = places.get(_address(each))
        found.append(after if target is None else [*after, target])
    return found


def reached(ways: Flow, starts: Iterable[int], without: int = -1) -> set[int]:
    """Places that a warp may come to from some, itself included, if it never comes to one."""
    found, left = {without}, list(starts)
    while left:
        if (place := left.pop()) not in found:
            found.add(place)
            left += ways[place]
    return found - {without}


def loops(instructions: Sequence[Instruction], holding: str | tuple[str, ...] = PRODUCTS) -> list[Loop]:
    """The innermost loops that hold some instructions, in order: of a kernel with two walks the full, then the partial.

    Args:
        instructions: of a kernel.
        holding: what the opcode of one of them starts with.
    """
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    ways = flow(instructions)
    entries = _entries(instructions, ways)
    spans = []
    for end, instruction in enumerate(instructions):
        start = places.get(_target(instruction), end + 1)
        held = start <= end and any(each.opcode.startswith(holding) for each in instructions[start:end])
        if held and end not in reached(ways, entries, without=start):
            spans.append((start, end))
    inner: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):  # what goes round a loop is longer
        if not any(start <= stop and begin <= end for begin, stop in inner):
            inner.append((start, end))
    return [_straight(instructions, places, start, end) for start, end in sorted(inner)]


def _entries(instructions: Sequence[Instruction], ways: Flow) -> list[int]:
    """Where warps may start: at the first place, and if a register says where to go, where nothing else leads."""
    found, seen = [0], reached(ways, [0])
    if any(each.opcode.startswith("BRX") for each in instructions):
        for place in range(len(ways)):
            if place not in seen:
                found.append(place)
                seen |= reached(ways, [place])
    return found


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
    return -1 if _uniform(instruction) else _address(instruction)


def _address(instruction: Instruction) -> int:
    """The address that a branch names; -1 of what is none."""
    found = _TARGET.search(instruction.operands) if instruction.opcode.startswith("BRA") else None
    return int(found[1], 16) if found else -1


def _uniform(instruction: Instruction) -> bool:
    """Whether a branch depends on a uniform predicate too, which stands among its operands."""
    return instruction.opcode.startswith("BRA") and "UP" in instruction.operands[:4]
