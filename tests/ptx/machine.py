"""A program, a grid and arguments -> what the kernel leaves in global memory, or the first fault.

Some blocks of the grid run at the same time, all in one array. Where a branch parts them they become groups; the group
that is behind in the text runs first, and groups that meet become one again. The next blocks of the grid follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tests.ptx.faults import Fault, Unsupported
from tests.ptx.global_memory import Buffer, GlobalMemory
from tests.ptx.in_flight import Copies, Products
from tests.ptx.instructions import build
from tests.ptx.operands import Action, Reader, Scope, vector
from tests.ptx.parse import Block, Program, Statement, parse
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.threads import Launch, Threads
from tests.ptx.values import Array, size_of

TOGETHER: Final = 8  # blocks
_REACHES_SHARED: Final = ("ld", "st")


@dataclass(frozen=True, slots=True)
class Step:
    """A statement, what it does, and which registers of products in flight it may disturb."""

    statement: Statement
    action: Action
    touches: frozenset[int]


@dataclass(frozen=True, slots=True)
class Code:
    """A block of a program: its steps, then a branch, taken where `taken` is True."""

    steps: list[Step]
    branch: Statement | None
    taken: Reader | None
    target: int | None


@dataclass(slots=True)
class Kernel:
    """A program that can be launched."""

    program: Program
    scope: Scope
    code: list[Code] = field(default_factory=list)

    @classmethod
    def of(cls, text: str) -> Kernel:
        """Translate PTX.

        Raises:
            Unsupported: it has what is not known.
        """
        program = parse(text)
        kernel = cls(program, Scope(program))
        held = _held(program)
        kernel.code = [kernel._code(block, held) for block in program.blocks]
        return kernel

    def _code(self, block: Block, held: frozenset[str]) -> Code:
        branch = block.branch
        taken = None if branch is None or branch.guard is None else self.scope.read(branch.guard, "pred")
        return Code([self._step(one, held) for one in block.statements], branch, taken, block.target)

    def _step(self, statement: Statement, held: frozenset[str]) -> Step:
        names = set() if statement.words[0] == "wgmma" else held & _registers(statement)
        return Step(statement, build(statement, self.scope), frozenset(map(self.scope.number, names)))

    @property
    def unit(self) -> int:
        """Bytes of the smallest access to shared memory, at most 4."""
        statements = [one for block in self.program.blocks for one in block.statements]
        sizes = [size_of(one.words[-1]) for one in statements if _touches_shared(one)]
        return min([4, *sizes])

    def launch(self, grid: int, values: Sequence[Buffer | int], shared_bytes: int) -> None:
        """Run `grid` blocks.

        Args:
            grid: how many.
            values: for each parameter a tensor, or a number as the bits to pass.
            shared_bytes: that a block may use.

        Raises:
            Fault: the kernel did what it must not, or left a part of a result unwritten.
            Unsupported: it does what is not known here.
        """
        buffers = [value for value in values if isinstance(value, Buffer)]
        memory = GlobalMemory(buffers)
        params = [value.address if isinstance(value, Buffer) else value for value in values]
        if len(params) != len(self.program.params):
            raise Unsupported(f"{len(params)} values for the {len(self.program.params)} parameters of the kernel")
        with np.errstate(all="ignore"):
            for first in range(0, grid, TOGETHER):
                self._run(memory, params, grid, first, min(TOGETHER, grid - first), shared_bytes)
        for buffer in buffers:
            if missing := buffer.unwritten():
                raise Fault("global unwritten", f"{self.program.name}: {missing} bytes of {buffer.name}")

    def _run(
        self, memory: GlobalMemory, params: list[int], grid: int, first: int, count: int, shared_bytes: int
    ) -> None:
        """Run blocks first to first + count - 1."""
        threads = self.program.threads
        shared = SharedMemory(count, shared_bytes, self.unit, threads)
        copies, products = Copies(shared, count * threads), Products(shared, count * threads // 32)
        launch = Launch(memory, shared, copies, products, params, grid, first, threads)
        groups = [Threads(launch, np.arange(count * threads), [None] * len(self.scope.numbers))]
        while groups:
            groups.sort(key=lambda group: group.at)
            group, *others = groups
            groups = [other for other in others if other.at != group.at]
            for other in others:
                if other.at == group.at:
                    group.join(other)
            groups += self._advance(group)

    def _advance(self, group: Threads) -> list[Threads]:
        """Run one block of code; return the groups that go on from there."""
        code = self.code[group.at]
        for step in code.steps:
            try:
                if step.touches:
                    group.launch.products.touch(group.warps, step.touches)
                step.action(group)
            except Fault as fault:
                raise fault.at(self._where(step.statement, group)) from None
            except Unsupported as error:
                raise Unsupported(f"{error}\n    at {self._where(step.statement, group)}") from error
        return self._branch(group, code)

    def _branch(self, group: Threads, code: Code) -> list[Threads]:
        follows = group.at + 1 < len(self.code)
        group.at += 1
        if code.branch is None:
            return [group] if follows else []
        taken = group.every if code.taken is None else code.taken(group)
        if code.target is None:
            return self._left(group, taken)
        if taken.all():
            group.at = code.target
            return [group]
        if not taken.any():
            return [group]
        return [group.part(taken, code.target), group]

    @staticmethod
    def _left(group: Threads, leaving: Array) -> list[Threads]:
        """Those that stay when others return."""
        if leaving.all():
            return []
        group.part(leaving, group.at)
        return [group]

    def _where(self, statement: Statement, group: Threads) -> str:
        blocks = (group.launch.first + group.blocks).tolist()
        return f"{self.program.place(statement)}\n    in blocks {blocks}"


def _registers(statement: Statement) -> set[str]:
    """All registers that a statement names."""
    texts = (part.strip("[]! ").partition("+")[0].strip() for text in statement.operands for part in vector(text))
    return {text for text in texts if text.startswith("%")}


def _held(program: Program) -> frozenset[str]:
    """Registers that products of four warps use: their sums, and inputs that are not in shared memory."""
    products = (one for block in program.blocks for one in block.statements if one.words[:2] == ("wgmma", "mma_async"))
    vectors = (text for one in products for text in one.operands[:2] if text.startswith("{"))
    return frozenset(name for text in vectors for name in vector(text))


def _touches_shared(statement: Statement) -> bool:
    return statement.words[0] in _REACHES_SHARED and bool({"shared", "shared::cta"} & set(statement.words))
