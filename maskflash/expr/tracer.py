"""What one trace accumulates: expression nodes, slots for run-time values, and where the user's code stands.

Everything here works on positions of nodes; `symbols` wraps them in objects that behave like numbers.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor

from maskflash.errors import MaskTraceError
from maskflash.expr.nodes import Builder, Node, Source
from maskflash.expr.paths import Paths

MAX_OPERATIONS: Final = 1 << 18  # recorded by one trace, over all its branches: some ten seconds

_OWN = __name__.rpartition(".")[0]
_DTYPES = frozenset(
    (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
)


_Place = tuple[int | None, int | None, int | None, int | None]  # of an instruction: lines, and columns in UTF-8


class Argument(str):
    """The name of a keyword argument that fills a slot at run time."""


class TorchCalls(NamedTuple):
    """What a symbol does when torch meets it: handed down by `trace`, since it is written in terms of symbols."""

    call: Callable[[Tracer, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
    method: Callable[[Any, str], Any]


class Tracer:
    """The state of one trace.

    Attributes:
        home: where the predicate is defined; errors that no line of its code causes point there.
        builder: the expression so far.
        paths: its undecided branches.
        params: for each integer slot its value, or the argument that fills it.
        tables: for each table slot the captured tensor, or the argument that fills it.
        specialised: arguments whose value or shape the expression depends on.
        torch: what torch functions and tensor methods do to symbols.
        failure: the last refusal; torch's operators turn a TypeError into one of their own.
    """

    def __init__(self, home: Source, entry: CodeType, limit: int, use_values: bool, torch_calls: TorchCalls) -> None:
        self.home = home
        self.builder = Builder()
        self.paths = Paths(self.builder, self._fixed_number, limit, use_values)
        self.params: list[int | Argument] = []
        self.tables: list[Tensor | Argument] = []
        self.specialised: set[str] = set()
        self.torch = torch_calls
        self.failure: MaskTraceError | None = None
        self._entry = entry  # frames from here outward are not the predicate's
        self._argument_values: dict[str, int] = {}
        self._slots: dict[object, int] = {}
        self._occurrences: dict[object, int] = {}
        self._journal: list[object] = []
        self._sources: dict[tuple[int, int], Source] = {}
        self._places: dict[int, tuple[CodeType, list[_Place]]] = {}
        self._recorded = 0

    def record(self, op: str, *args: int, **kwargs: Any) -> int:
        """The position of an operation on earlier nodes, noting the line of the user's code."""
        self._recorded += 1
        if self._recorded > MAX_OPERATIONS:
            self.fail(
                f"is reached after {MAX_OPERATIONS:,} operations, counting those of each branch",
                "Return one expression built with `and`, `or` and `... if ... else ...` instead of `if` and `while` on "
                "q or kv, or look the outcome up in a tensor.",
            )
        return self.builder.add(op, *args, source=self.source(), **kwargs)

    # Slots

    def param(self, number: int, place: int) -> int:
        """A slot for an integer that is operand `place` here: not shared with equal integers elsewhere."""
        frame = self._frame()
        site = (self._code(frame.f_code), frame.f_lasti, place) if frame else place
        turn = self._occurrences.get(site, 0)
        self._occurrences[site] = turn + 1
        self._journal.append(site)
        return self._param_node((site, turn, number), number)

    def argument(self, name: str, value: int) -> int:
        """A slot for an integer keyword argument."""
        self._argument_values[name] = value
        return self._param_node(Argument(name), Argument(name))

    def _param_node(self, key: object, value: int | Argument) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self.params)
            self.params.append(value)
        return self.builder.add("param", dtype=torch.int64, weak=True, value=slot)

    def table(self, tensor: Tensor, name: Argument | None = None) -> int:
        """A slot for a tensor; captured views of the same memory share one."""
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            self.fail(f"looks up a tensor of {kind}", "Convert it to int32, int64, bool or float32 beforehand.")
        key: object = name
        if name is None:
            memory = tensor.data_ptr() if tensor.numel() else id(tensor)
            key = (memory, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self.tables)
            self.tables.append(tensor if name is None else name)
        return slot

    def fix(self, position: int) -> int:
        """An integer argument in a structural place: its value becomes part of the structure."""
        node = self.builder.nodes[position]
        if node.op == "param" and isinstance(name := self.params[int(node.value or 0)], Argument):
            self.specialised.add(name)
            return self.builder.const(self._argument_values[name])
        return position

    def depends_on_shape(self, slot: int) -> None:
        """Note that the expression depends on the shape of a table, if that is an argument."""
        if isinstance(name := self.tables[slot], Argument):
            self.specialised.add(name)

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
            value = self.params[int(node.value or 0)]
            number = value if isinstance(value, int) else None
        return float(number) if number is not None and abs(number) < 2**53 else None

    # Where the user's code stands

    def source(self) -> Source:
        """The line of the predicate that is running."""
        frame = self._frame()
        if frame is None:
            return self.home
        key = (self._code(frame.f_code), frame.f_lasti)
        if key not in self._sources:
            place = self._places[key[0]][1][frame.f_lasti // 2]
            filename, line = frame.f_code.co_filename, place[0] or frame.f_lineno
            self._sources[key] = Source(self.home.function, filename, line, _code_text(filename, line, place))
        return self._sources[key]

    def _code(self, code: CodeType) -> int:
        """What stands for code in keys: its hash costs as much as it is long, and so does finding a line in it."""
        if id(code) not in self._places:
            self._places[id(code)] = code, list(code.co_positions())
        return id(code)

    def fail(self, what: str, fix: str) -> NoReturn:
        """Raise MaskTraceError: where, the offending code, what it does, and how to put it right."""
        source = self.source()
        code = f'"{source.text}" ' if source.text else ""
        self.failure = MaskTraceError(f"{source}: {code}{what}. {fix}")
        raise self.failure

    def fail_draw(self, function: str) -> NoReturn:
        """Raise MaskTraceError for a function that draws random numbers."""
        self.fail(
            f"draws random numbers (`{function}`) that would be frozen at this moment",
            "Draw a tensor once, outside the predicate, and look it up: `keep = torch.rand(n) < 0.9`, then `keep[kv]`.",
        )

    def _frame(self) -> FrameType | None:
        """The innermost frame that is neither this folder's nor torch's; None outside the predicate."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._entry:
            module = f"{frame.f_globals.get('__name__', '')}."
            if not module.startswith((_OWN + ".", "torch.")):
                return frame
            frame = frame.f_back
        return None


def _code_text(filename: str, number: int, place: _Place) -> str:
    """The source of the expression at a place, or its first line where it has several."""
    first, last, start, stop = place
    line = linecache.getline(filename, number)
    if first is not None and first == last and start is not None and stop is not None:
        return _encoded(line)[start:stop].decode(errors="replace").strip()
    return line.strip()


@lru_cache(maxsize=16)
def _encoded(line: str) -> bytes:
    return line.encode()
