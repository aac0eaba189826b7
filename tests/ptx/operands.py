"""Texts of operands -> functions that read numbers of a group of threads, or write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tests.ptx.faults import Unsupported
from tests.ptx.parse import Program, Statement, split
from tests.ptx.tensor_maps import PARAMETERS
from tests.ptx.threads import Threads
from tests.ptx.values import DTYPES, HALVES, UNSIGNED, Array, decode, encode, size_of

Action = Callable[[Threads], None]
Reader = Callable[[Threads], Array]
Writer = Callable[[Threads, Array], None]

SHARED_BASE: Final = "global_smem"  # the name of all shared memory, which begins at 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """What an instruction does at which threads may have to wait.

    Attributes:
        ready: which of them may go on; it may be asked again and again.
        action: what they do then.
        what: they wait for, in words.
    """

    ready: Reader
    action: Action
    what: Callable[[Threads], str]


_SPECIAL: Final = re.compile(r"%(n?tid|n?ctaid)\.[xyz]|%n?ctaid|%laneid")
_FLOAT: Final = re.compile(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})")
_INTEGER: Final = re.compile(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?")
_ADDRESS: Final = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def vector(text: str) -> list[str]:
    """The parts of an operand in braces; of any other, itself."""
    return split(text.strip("{} ")) if text.startswith("{") else [text]


def integer(text: str) -> int:
    """An integer that stands in the text.

    Raises:
        Unsupported: it is none.
    """
    found = _INTEGER.fullmatch(text)
    if not found:
        raise Unsupported(f"operand {text}")
    return int(found[2], 0) * (-1 if found[1] else 1)


class Scope:
    """The operands of a program's statements, with the numbers of its registers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers: dict[str, int] = {}

    def number(self, register: str) -> int:
        """A register's place among the registers of a group.

        Raises:
            Unsupported: it is not declared.
        """
        self.program.width(register)
        return self.numbers.setdefault(register, len(self.numbers))

    def read(self, text: str, kind: str) -> Reader:
        """An operand as numbers of a type: an array, or one number where the text has it.

        A register may be wider than the type, which then takes its low bits.
        """
        if text.startswith("!"):
            inner = self.read(text[1:], kind)
            return lambda threads: ~inner(threads)
        if _SPECIAL.fullmatch(text):
            dtype = UNSIGNED[size_of(kind)]
            return lambda threads: threads.special(text).astype(dtype)
        if text.startswith("%"):
            return self._read_register(text, kind)
        if text in self.program.params:
            at = np.uint64(PARAMETERS + 4096 * self.program.params.index(text))
            return lambda threads: at
        constant = decode(self._constant(text, kind), kind)
        return lambda threads: constant

    def _read_register(self, text: str, kind: str) -> Reader:
        number, size, width = self.number(text), size_of(kind), self.program.width(text)
        if width < size or (width == 0) != (size == 0):
            raise Unsupported(f"{text} as {kind}")
        if width > size:
            dtype = UNSIGNED[size]
            return lambda threads: decode(threads.register(number).astype(dtype), kind)
        if kind in HALVES:
            return lambda threads: decode(threads.register(number), kind)
        if kind[0] in "sf":
            typed = DTYPES[kind]
            return lambda threads: threads.register(number).view(typed)
        return lambda threads: threads.register(number)

    @staticmethod
    def _constant(text: str, kind: str) -> Any:
        if kind == "pred":
            return np.bool_(integer(text) != 0)
        size = size_of(kind)
        if text == SHARED_BASE:
            return UNSIGNED[size](0)
        if found := _FLOAT.fullmatch(text):
            bits = int(found[1] or found[2], 16)
            if size != (4 if found[1] else 8):
                raise Unsupported(f"operand {text} as {kind}")
            return UNSIGNED[size](bits)
        return UNSIGNED[size](integer(text) & ((1 << 8 * size) - 1))

    def write(self, text: str, kind: str, guard: str | None) -> Writer:
        """Put numbers into a register, of those threads that a guard lets through.

        A register may be wider than the type, which is then extended by its sign or by zeros.
        """
        number, size, width = self.number(text), size_of(kind), self.program.width(text)
        if width < size or (width == 0) != (size == 0):
            raise Unsupported(f"{kind} into {text}")
        wide = DTYPES[f"{'s' if kind[0] == 's' else 'u'}{8 * width}"] if width > size else None
        lets = None if guard is None else self.read(guard, "pred")

        def put(threads: Threads, values: Array) -> None:
            bits = encode(values, kind)
            if wide is not None:
                bits = decode(bits, kind if kind[0] == "s" else "u8").astype(wide).view(UNSIGNED[width])
            if bits.ndim == 0:
                bits = np.full(threads.count, bits)
            if lets is not None:
                before = threads.registers[number]
                bits = np.where(lets(threads), bits, np.zeros_like(bits) if before is None else before)
            threads.registers[number] = bits

        return put

    def address(self, text: str, size: int) -> Reader:
        """ "[%rd4 + 16]" -> unsigned integers of `size` bytes."""
        found = _ADDRESS.fullmatch(text)
        if not found:
            raise Unsupported(f"address {text}")
        base, step = self.read(found[1], f"u{8 * size}"), integer(found[2] or "0") & ((1 << 8 * size) - 1)
        if step == 0 and found[1].startswith("%"):
            return base
        offset = UNSIGNED[size](step)
        return lambda threads: np.broadcast_to(base(threads) + offset, threads.count)

    def active(self, statement: Statement) -> Reader:
        """Which threads a guard lets through."""
        if statement.guard is None:
            return lambda threads: threads.every
        return self.read(statement.guard, "pred")

    def unguarded(self, statement: Statement) -> None:
        """Check that a statement has no guard.

        Raises:
            Unsupported: it has.
        """
        if statement.guard is not None:
            raise Unsupported("a guard")


def only(statement: Statement, words: tuple[str, ...], allowed: set[str]) -> None:
    """Check that an instruction has no words but those that are known here.

    Raises:
        Unsupported: it has.
    """
    if unknown := [word for word in words if word not in allowed]:
        raise Unsupported(f"modifiers {', '.join(unknown)}")
