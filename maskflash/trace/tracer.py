"""What one trace accumulates: expression nodes, slots for run-time values, and where the user's code stands.

Everything here works on positions of nodes; `symbols` wraps them in objects that behave like numbers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable
from itertools import product
from types import CodeType
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor

from maskflash.errors import MaskTraceError
from maskflash.expr.nodes import Builder, Node, Source, operand_dtype, result_type
from maskflash.expr.ops import COMPARISONS, INDEX_VARIABLES
from maskflash.trace.frames import UserCode
from maskflash.trace.paths import Apart, Paths, TooManyPaths, Unrepeatable
from maskflash.trace.sources import Argument, Captured, Sources, View

MAX_OPERATIONS: Final = 1 << 18  # recorded by one trace, over all its branches: some ten seconds

_OUR_REFERENCES = 2  # that of a Write, and sys.getrefcount's own
_AS_IT_IS = frozenset((*COMPARISONS, "min", "max"))  # the same in every integer dtype that holds the operands
_DTYPES = frozenset(
    (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
)


Kind = tuple[torch.dtype, bool]
"""Dtype and weakness of a value."""


class TorchCalls(NamedTuple):
    """What a symbol does when torch meets it: handed down by `trace`, since it is written in terms of symbols."""

    call: Callable[[Tracer, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
    method: Callable[[Any, str], Any]


class Role(NamedTuple):
    """What a function is to be.

    Attributes:
        takes: its positional arguments.
        name: what messages call it.
        dtype: of what it returns: bool of a mask; of a score that of the score it takes.
    """

    takes: tuple[str, ...]
    name: str
    dtype: torch.dtype

    @property
    def scores(self) -> bool:
        """Whether it is a score function: it may compute what masks may not."""
        return self.dtype.is_floating_point


MASK: Final = Role(INDEX_VARIABLES, "a mask predicate", torch.bool)


class Write(NamedTuple):
    """A change of something that the user's code holds: a list, an object, a cell, an iterator."""

    target: object
    source: Source
    branching: bool  # whether it is made for some pairs only


class Tracer:
    """The state of one trace.

    Attributes:
        home: where the function is defined.
        role: what it is a function of, and for.
        code: where it stands.
        builder: the expression so far.
        paths: its undecided branches.
        params: for each number's slot its value, or what fills it.
        tables: for each table slot a tensor, or what fills it.
        sources: the captured values that are read again at each call.
        specialised: arguments whose value or shape the expression depends on.
        torch: what torch functions and tensor methods do to symbols.
        apart: code whose branches must not be merged before the predicate returns.
        written: by id, what was changed since the innermost `explore` began.
        failure: what ends the trace, whoever catches it: torch's operators do, and perhaps the user's code.
        tells: whether symbols may show themselves as text.
    """

    def __init__(
        self,
        home: Source,
        entry: CodeType,
        limit: int,
        use_values: bool,
        torch_calls: TorchCalls,
        sources: Sources,
        apart: Collection[CodeType],
        role: Role,
    ) -> None:
        self.home = home
        self.role = role
        self.code: UserCode = UserCode(home, entry)
        self.sources = sources
        self.builder: Builder = Builder()
        self.paths: Paths = Paths(self.builder, self._fixed_number, limit, use_values)
        self.params: list[int | float | Argument] = []
        self.tables: list[Tensor | Argument | View] = []
        self.specialised: set[str] = set()
        self.torch = torch_calls
        self.apart = apart
        self.written: dict[int, Write] = {}
        self.failure: BaseException | None = None
        self.tells = False
        self._argument_values: dict[str, int | float] = {}
        self._slots: dict[object, int] = {}
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._occurrences: dict[object, int] = {}
        self._journal: list[object] = []
        self._recorded = 0
        self._either: dict[int, tuple[frozenset[Kind], CodeType]] = {}

    def record(self, op: str, *args: int, **kwargs: Any) -> int:
        """The position of an operation on earlier nodes, noting the line of the user's code."""
        self._recorded += 1
        if self._recorded > MAX_OPERATIONS:
            self.fail(
                f"is reached after {MAX_OPERATIONS:,} operations, counting those of each branch",
                "Return one expression built with `and`, `or` and `... if ... else ...` instead of `if` and `while` on "
                "q or kv, or look the outcome up in a tensor.",
            )
        mixed = self.settle(op, *args) if "dtype" not in kwargs else None
        position = self.builder.add(op, *args, source=self.code.source(), **kwargs)
        if mixed is not None:
            self._either[position] = mixed
        return position

    # Values that are of one kind or another

    def either(self, position: int, args: Iterable[int], code: CodeType | None) -> None:
        """Note that a node is one of these, as it is, and what code chose so."""
        kinds = frozenset[Kind]().union(*map(self._kinds, args))
        if len(kinds) > 1 and code is not None:
            self._either[position] = kinds, code

    def settle(self, op: str, *args: int) -> tuple[frozenset[Kind], CodeType] | None:
        """The kinds that an operation may have on values of several kinds; None if there is one.

        Raises:
            Apart: it computes something else on each.
        """
        code = next((self._either[arg][1] for arg in args if arg in self._either), None)
        if code is None:
            return None
        nodes = [[Node(op, (), *kind) for kind in self._kinds(arg)] for arg in args]
        ways = [(result_type(op, list(way)), list(way)) for way in product(*nodes)]
        dtypes = {operand_dtype(Node(op, (), *kind), way) for kind, way in ways}
        if len(dtypes) > 1 and (op not in _AS_IT_IS or any(dtype.is_floating_point for dtype in dtypes)):
            self.stop(Apart(code))
        kinds = frozenset(kind for kind, _ in ways)
        return (kinds, code) if len(kinds) > 1 else None

    def _kinds(self, position: int) -> frozenset[Kind]:
        node = self.builder.nodes[position]
        return self._either[position][0] if position in self._either else frozenset(((node.dtype, node.weak),))

    # What the user's code changes

    def wrote(self, target: object, some_time: bool = False) -> None:
        """Note a change that is about to be made, or will be, perhaps, on one of the branches to come."""
        self.note_write(Write(target, self.code.source(), some_time or self.paths.branching(everywhere=True)))

    def note_write(self, write: Write) -> None:
        """Note a change; of two of the same the one that is made for some pairs only."""
        known = self.written.get(id(write.target))
        if known is None or (write.branching and not known.branching):
            self.written[id(write.target)] = write

    def fail_write(self, write: Write) -> NoReturn:
        """Raise MaskTraceError for a change that outlives the predicate."""
        kind = type(write.target).__name__
        what = {"cell": "a nonlocal variable", "dict": "a dict or a global variable"}.get(kind, f"a {kind}")
        self.fail(
            f"changes {what} that outlives the predicate, for some pairs only",
            "A predicate is run once for all pairs. Return what it finds, or make what it fills inside of it.",
            write.source,
        )

    # Slots

    def param(self, number: int, place: int) -> int:
        """A slot for an integer that is operand `place` here: not shared with equal integers elsewhere."""
        site = (self.code.site(), place)
        turn = self._occurrences.get(site, 0)
        self._occurrences[site] = turn + 1
        self._journal.append(site)
        return self._param_node((site, turn, number), number)

    def argument(self, name: Argument, value: int | float) -> int:
        """A slot for a number that a call gives, or that is read at each call."""
        self._argument_values[name] = value
        return self._param_node(name, name, torch.float64 if isinstance(value, float) else torch.int64)

    def _param_node(self, key: object, value: int | Argument, dtype: torch.dtype = torch.int64) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self.params)
            self.params.append(value)
        return self.builder.add("param", dtype=dtype, weak=True, value=slot)

    def table(self, tensor: Tensor, name: Argument | None = None) -> int:
        """A slot for a tensor; captured views of the same memory share one."""
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_nested:
            kind = (
                "nested rows" if tensor.is_nested else tensor.dtype if tensor.layout == torch.strided else tensor.layout
            )
            called = "" if name is None else f" (`{name}`)"
            self.fail(
                f"looks up a tensor of {kind}{called}",
                "Convert it beforehand, to a dense tensor of int32, int64, bool or float32.",
            )
        filler = self._source(tensor) if name is None else name
        key: object = filler
        if isinstance(filler, Tensor):
            memory = tensor.data_ptr() if tensor.numel() else id(tensor)
            key = (memory, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self.tables)
            self.tables.append(filler)
        return slot

    def _source(self, tensor: Tensor) -> Tensor | Captured | View:
        """What a captured tensor is read from, or is a view of; itself where nobody knows."""
        name = self.sources.tensors.get(id(tensor))
        if name is not None:
            return name
        whole = tensor
        while id(whole) in self._views:
            whole = self._views[id(whole)][1]
        name = self.sources.tensors.get(id(whole))
        if name is None or whole.dtype != tensor.dtype:
            return tensor
        self.specialised.add(name)
        offset = tensor.storage_offset() - whole.storage_offset()
        return View(name, tuple(tensor.shape), tensor.stride(), int(offset))

    def viewed(self, result: Any, tensors: Iterable[Tensor]) -> None:
        """Note what a view was taken of: its memory doesn't tell, where captured tensors share theirs."""
        if isinstance(result, Tensor) and id(result) not in self.sources.tensors:
            whole = next((tensor for tensor in tensors if _share_memory(tensor, result)), None)
            if whole is not None and whole is not result:
                self._views[id(result)] = result, whole

    def fix(self, position: int) -> int:
        """An integer argument in a structural place: its value becomes part of the structure."""
        node = self.builder.nodes[position]
        if node.op == "param" and isinstance(name := self.params[node.slot], Argument):
            self.specialised.add(name)
            return self.builder.const(self._argument_values[name])
        return position

    def depends_on_shape(self, slot: int) -> None:
        """Note that the expression depends on the shape of a table, if another may come in its place."""
        if isinstance(name := self.tables[slot], Argument):
            self.specialised.add(name)

    def reads_layout_of(self, tensor: Tensor) -> None:
        """Note that the expression depends on the shape or strides of a captured tensor."""
        if (name := self.sources.tensors.get(id(tensor))) is not None:
            self.specialised.add(name)

    def label(self, slot: int) -> str | None:
        """What the user calls a table; None if it has no name."""
        table = self.tables[slot]
        name = table.name if isinstance(table, View) else table
        return None if isinstance(name, Tensor) else self.sources.labels.get(name, name)  # type: ignore[call-overload]

    def mark(self) -> int:
        """A point to `rewind` to, so that a second run of the same code meets the same slots."""
        return len(self._journal)

    def rewind(self, mark: int) -> None:
        """Forget which integers were seen after the mark."""
        while len(self._journal) > mark:
            self._occurrences[self._journal.pop()] -= 1

    def _fixed_number(self, node: Node) -> float | None:
        """The value of a constant or a captured integer, where a float holds it exactly."""
        number = node.value if node.op == "const" else None
        if node.op == "param":
            value = self.params[node.slot]
            if isinstance(value, Captured):  # decided by its value now, so another one is another trace
                self.specialised.add(value)
                value = self.sources.values[value]
            number = value if isinstance(value, int) else None
        return float(number) if number is not None and abs(number) < 2**53 else None

    # How it ends

    def decide(self, condition: int) -> bool:
        """The answer to a condition that the user's code branches on."""
        try:
            return self.paths.decide(condition)
        except (TooManyPaths, Unrepeatable) as problem:
            self.stop(problem)

    def fail(self, what: str, fix: str, source: Source | None = None) -> NoReturn:
        """Raise MaskTraceError: where, the offending code, what it does, and how to put it right."""
        source = source or self.code.source()
        code = f'"{source.text}" ' if source.text else ""
        self.stop(MaskTraceError(f"{source}: {code}{what}. {fix}"))

    def stop(self, problem: BaseException) -> NoReturn:
        """End the trace: what is raised here is raised again at the end, if the user's code catches it."""
        self.failure = self.failure or problem
        raise problem

    def fail_inexact(self, op: str) -> NoReturn:
        """Raise MaskTraceError for an operation whose last bit depends on the machine."""
        self.fail(
            f"uses `{op}`, whose last bit is another on each machine, and a mask is the same everywhere",
            "Compute it beforehand, into a table that the mask looks up.",
        )

    @property
    def index_fix(self) -> str:
        """What to do instead of computing with whole rows of a tensor."""
        rows = (
            " A product of rows, as in `score + (qr[b, h, q] * kr[b, kv]).sum()`, belongs to that of q and k: pass "
            "`torch.cat([q, qr / scale], -1)` and `torch.cat([k, kr], -1)` as q and k, and give `scale=`."
        )
        return "Index the tensor with b, h, q or kv, one index per dimension." + rows * self.role.scores

    def fail_member(self) -> NoReturn:
        """Raise MaskTraceError for a search in a tensor."""
        self.fail(
            "looks for a value in the contents of a tensor or array",
            "Look it up instead, in a table of bools: `seen = torch.zeros(n, dtype=torch.bool)`, `seen[ids] = True` "
            "beforehand, then `seen[kv]`.",
        )

    def fail_draw(self, function: str) -> NoReturn:
        """Raise MaskTraceError for a function that draws random numbers."""
        self.fail(
            f"draws random numbers (`{function}`) that would be frozen at this moment",
            "Draw a tensor once, outside the predicate, and look it up: `keep = torch.rand(n) < 0.9`, then `keep[kv]`.",
        )


ACTIVE = threading.local()  # .tracer: the trace that runs in this thread


def active() -> Tracer | None:
    """The trace that runs in this thread."""
    return getattr(ACTIVE, "tracer", None)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.device == y.device and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def drop_private(written: dict[int, Write]) -> None:
    """Forget what nothing else refers to any more: it went with the code that changed it."""
    while private := [key for key, write in written.items() if sys.getrefcount(write.target) <= _OUR_REFERENCES]:
        for key in private:
            del written[key]
