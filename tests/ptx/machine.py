"""A program, a grid and arguments -> what the kernel leaves in global memory, or the first fault.

Some blocks of the grid run at the same time, all in one array. Where a branch parts them, or where some of them wait,
they become groups, and groups that meet become one again. An `Order` says which of them goes on next. The next blocks
of the grid follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tests.ptx.bulk import Bulk
from tests.ptx.clocks import Clocks
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.global_memory import Buffer, GlobalMemory
from tests.ptx.in_flight import Copies, Products
from tests.ptx.instructions import TOGETHER as WARPS_TOGETHER
from tests.ptx.instructions import build
from tests.ptx.meetings import Mbarriers, Meetings, Room
from tests.ptx.operands import Action, Reader, Scope, Waiting, vector
from tests.ptx.orders import TEXT, Order
from tests.ptx.parse import Block, Program, Statement, parse
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.tensor_maps import TensorMap
from tests.ptx.threads import Launch, Threads
from tests.ptx.values import Array, size_of

TOGETHER: Final = 8  # blocks


@dataclass(frozen=True, slots=True)
class Step:
    """A statement, what it does, and what must be so before.

    Attributes:
        waiting: threads may have to wait there.
        together: warps of which no thread may be elsewhere.
        touches: registers of products in flight that it may disturb.
    """

    statement: Statement
    action: Action
    waiting: Waiting | None
    together: int
    touches: frozenset[int]


@dataclass(frozen=True, slots=True)
class Code:
    """A block of a program: its steps, then a branch, taken where `taken` is True, to target number `chosen`."""

    steps: list[Step]
    branch: Statement | None
    taken: Reader | None
    chosen: Reader | None
    targets: tuple[int, ...]


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
        indexed = branch is not None and branch.words[0] == "brx"
        chosen = self.scope.read(branch.operands[0], "u32") if branch is not None and indexed else None
        return Code([self._step(one, held) for one in block.statements], branch, taken, chosen, block.targets)

    def _step(self, statement: Statement, held: frozenset[str]) -> Step:
        names = set() if statement.words[0] == "wgmma" else held & _registers(statement)
        built = build(statement, self.scope)
        waiting = built if isinstance(built, Waiting) else None
        action = built.action if isinstance(built, Waiting) else built
        together = WARPS_TOGETHER.get(statement.words[0], 0)
        return Step(statement, action, waiting, together, frozenset(map(self.scope.number, names)))

    @property
    def unit(self) -> int:
        """Bytes of the smallest store to shared memory, at most 4."""
        statements = [one for block in self.program.blocks for one in block.statements]
        sizes = [size_of(one.words[-1]) for one in statements if _touches_shared(one)]
        return min([4, *sizes])

    def launch(
        self,
        grid: int,
        values: Sequence[Buffer | TensorMap | int],
        shared_bytes: int,
        order: Order = TEXT,
    ) -> None:
        """Run `grid` blocks.

        Args:
            grid: how many.
            values: for each parameter a tensor, a tensor map, or a number as the bits to pass.
            shared_bytes: that a block may use.
            order: who goes on when several could.

        Raises:
            Fault: the kernel did what it must not, or left a part of a result unwritten.
            Unsupported: it does what is not known here.
        """
        maps = [value.buffer for value in values if isinstance(value, TensorMap)]
        buffers = [*(value for value in values if isinstance(value, Buffer)), *maps]
        memory = GlobalMemory(buffers)
        params = [value.address if isinstance(value, Buffer) else value for value in values]
        if len(params) != len(self.program.params):
            raise Unsupported(f"{len(params)} values for the {len(self.program.params)} parameters of the kernel")
        with np.errstate(all="ignore"):
            for first in range(0, grid, TOGETHER):
                self._run(memory, params, grid, first, min(TOGETHER, grid - first), shared_bytes, order)
        for buffer in buffers:
            if missing := buffer.unwritten():
                raise Fault("global unwritten", f"{self.program.name}: {missing} bytes of {buffer.name}")

    def _run(
        self,
        memory: GlobalMemory,
        params: list[int | TensorMap],
        grid: int,
        first: int,
        count: int,
        shared_bytes: int,
        order: Order,
    ) -> None:
        """Run blocks first to first + count - 1."""
        launch = self._launch(memory, params, grid, first, count, shared_bytes)
        bulk, turns = launch.bulk, order.turns()
        groups = [Threads(launch, np.arange(count * launch.threads), [None] * len(self.scope.numbers))]
        while groups:
            groups = _joined(groups)
            if bulk.loads and (landing := turns.landing(len(bulk.loads))) is not None:
                bulk.arrive(landing)
            for group in turns.sorted(groups):
                after, moved = self._advance(group)
                groups = [*(other for other in groups if other is not group), *after]
                if moved:
                    break
            else:
                if not bulk.loads:
                    raise self._deadlock(groups)
                bulk.arrive(turns.any_landing(len(bulk.loads)))
        bulk.mbarriers.check_end()

    def _launch(
        self, memory: GlobalMemory, params: list[int | TensorMap], grid: int, first: int, count: int, shared_bytes: int
    ) -> Launch:
        threads = self.program.threads
        warps = -(-threads // 32)
        clocks = Clocks(count, warps)
        shared = SharedMemory(count, shared_bytes, self.unit, threads, clocks)
        copies, products = Copies(shared, count * threads), Products(clocks)
        bulk, room = Bulk(shared, Mbarriers(clocks, shared)), Room(count, warps, self.program.registers or 0)
        return Launch(memory, shared, copies, products, bulk, Meetings(clocks), room, params, grid, first, threads)

    def _advance(self, group: Threads) -> tuple[list[Threads], bool]:
        """Run what is left of one block of code.

        Returns:
            The groups that go on from there, and whether any thread of them went on.
        """
        at, start = group.at
        code, waiting = self.code[at], []
        for number in range(start, len(code.steps)):
            step = code.steps[number]
            try:
                if step.together or step.waiting:
                    ready = self._ready(group, step)
                    if not ready.any():
                        group.at = at, number
                        return [group, *waiting], bool(waiting) or number > start
                    if not ready.all():
                        waiting.append(group.part(~ready, (at, number)))
                if step.touches:
                    group.launch.products.touch(group.warps, step.touches)
                step.action(group)
            except Fault as fault:
                raise fault.at(self._where(step.statement, group)) from None
            except Unsupported as error:
                raise Unsupported(f"{error}\n    at {self._where(step.statement, group)}") from error
        return [*self._branch(group, code), *waiting], True

    @staticmethod
    def _ready(group: Threads, step: Step) -> Array:
        """Which threads can do a step now."""
        if step.together and not group.whole:
            complete = group.complete(step.together)
            if step.waiting is None or not complete.all():
                return complete
        return group.every if step.waiting is None else step.waiting.ready(group)

    def _branch(self, group: Threads, code: Code) -> list[Threads]:
        follows = group.at[0] + 1 < len(self.code)
        group.at = group.at[0] + 1, 0
        if code.branch is None:
            return [group] if follows else self._left(group, group.every)
        taken = group.every if code.taken is None else code.taken(group)
        if not code.targets:
            return self._left(group, taken)
        chosen = np.zeros(group.count, np.int64) if code.chosen is None else code.chosen(group).astype(np.int64)
        if (chosen >= len(code.targets)).any():
            raise Fault("branch", f"to target {int(chosen.max())} of {len(code.targets)}").at(
                self._where(code.branch, group)
            )
        places = np.where(taken, np.array(code.targets)[chosen], group.at[0])
        return _parted(group, places)

    def _left(self, group: Threads, leaving: Array) -> list[Threads]:
        """Those that stay when others return."""
        if not leaving.any():
            return [group]
        gone = group if leaving.all() else group.part(leaving, group.at)
        gone.launch.bulk.leave(gone.ids)
        return [] if gone is group else [group]

    def _deadlock(self, groups: list[Threads]) -> Fault:
        """Nobody can go on: where everybody is, and what he waits for."""
        lines = []
        for group in groups:
            step = self.code[group.at[0]].steps[group.at[1]]
            alone = step.together and not group.complete(step.together).all()
            what = "the rest of its warps" if alone or step.waiting is None else step.waiting.what(group)
            warps = np.unique(group.warps % group.launch.bulk.clocks.warps).tolist()
            lines.append(f"\n  warps {warps} wait for {what}\n    at {self._where(step.statement, group)}")
        return Fault("deadlock", "nobody can go on" + "".join(lines))

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
    return statement.words[0] == "st" and bool({"shared", "shared::cta"} & set(statement.words))


def _joined(groups: list[Threads]) -> list[Threads]:
    """Groups of which no two are at one place."""
    out: dict[tuple[int, int], Threads] = {}
    for group in groups:
        if group.at in out:
            out[group.at].join(group)
        else:
            out[group.at] = group
    return list(out.values())


def _parted(group: Threads, places: Array) -> list[Threads]:
    """Groups of which each goes on at one block of code."""
    out, (last, *others) = [group], np.unique(places)[::-1].tolist()
    for place in others:
        out.append(group.part(places == place, (place, 0)))
        places = places[places != place]
    group.at = last, 0
    return out
