"""A Python function -> one that is known by its traces: traced once, and again for arguments of other kinds."""

from __future__ import annotations

import copy
import functools
import operator
import sys
from collections.abc import Callable
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from maskflash.errors import ArgumentTypeError
from maskflash.functions.captures import Captures
from maskflash.functions.function import Function
from maskflash.functions.sizes import Fits
from maskflash.functions.slots import aside
from maskflash.functions.traces import Reading, Record, Traces
from maskflash.ground.names import check_free
from maskflash.trace.trace import Traced, keyword_arguments, parameters_of, trace
from maskflash.trace.tracer import MASK, Role


class Recorded(Function):
    """A function that came out of a pickle without its code: it serves arguments of the kinds that were recorded."""

    def __init__(
        self,
        name: str,
        keywords: tuple[str, ...],
        defaults: dict[str, Any],
        records: list[Record],
        fits: Fits | None = None,
    ) -> None:
        super().__init__(name, keywords, defaults, fits=fits)
        self.traces: Traces = Traces.recorded(records)
        self._held = tuple(x for record in records for x in record.traced.tables if isinstance(x, Tensor))

    def __call__(self, *indices: Any, **mask_args: Any) -> NoReturn:
        """Nothing to call."""
        raise ArgumentTypeError(
            f"{self.name}: a function can't call it, since it was pickled without its own; combine masks with & | ^ ~, "
            "or define its function at the top level of a module"
        )

    def trace(self, mask_args: dict[str, Any]) -> NoReturn:
        """Nothing to trace: these are arguments of other kinds than those that were recorded."""
        kinds = ", ".join(f"{name} {_kind(value)}" for name, value in mask_args.items())
        raise ArgumentTypeError(
            f"{self.name}: got {kinds}, but it was pickled without its function, after calls with arguments of "
            "other kinds; pass those, or define its function at the top level of a module"
        )

    def held(self) -> tuple[Tensor, ...]:
        """Tensors that were recorded."""
        return self._held

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.keywords, self.defaults, self.traces.records(self.reading()), self.fits)


class WrittenFunction(Function):
    """A function given by Python code; traced at once unless it has arguments, whose kinds only a call tells.

    Attributes:
        function: the code.
        role: what it is to be.
    """

    reachable: ClassVar[tuple[str, ...]] = ("function",)
    recorded: ClassVar[type[Recorded]]  # what comes out of a pickle without its function

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        fits: Fits | None = None,
        *,
        role: Role = MASK,
        traced: bool = True,
    ) -> None:
        self.role = role
        keywords = keyword_arguments(function, role)
        parameters = parameters_of(function)
        defaults = {k: p.default for k in keywords if (p := parameters[k]).default is not p.empty}
        name = name or str(getattr(function, "__name__", type(function).__name__))
        check_free(name, keywords)
        super().__init__(name, keywords, defaults, fits=fits)
        functools.update_wrapper(self, function, updated=())
        self._place = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        self.function = function
        self._captures = Captures(function)
        if traced and not keywords:
            self.traced({})

    def __call__(self, *indices: Any, **mask_args: Any) -> Any:
        """The function itself."""
        return self.function(*indices, **mask_args)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The function, run once on symbols."""
        traced = trace(self.function, mask_args, self._captures.sources(), self.role)
        self._captures.depend(traced.specialised)
        if any(isinstance(table, Tensor) for table in traced.tables):
            self._captures.lose()
        return traced

    @property
    def followed(self) -> bool:
        """See `Captures.followed`."""
        return self._captures.followed

    def look(self) -> int:
        """See `Captures.look`."""
        return self._captures.look()

    def reading(self) -> Reading:
        """See `Captures.now`."""
        return self._captures.now.reading

    def read(self) -> dict[str, Any]:
        """See `Captures.read`."""
        self._look_aside()
        if not self._captures.followed:
            torch._dynamo.graph_break(
                f"{self.name} looks up a tensor that its code reaches in a way maskflash can't follow, so it is traced "
                "at each call, which torch.compile can't look into: pass the tensor by keyword"
            )
        if not self._captures.now.guarded:
            torch._dynamo.graph_break(
                f"{self.name} reads an array that isn't torch's, of whose contents torch.compile can't tell when they "
                "change: make it a tensor and look it up, or a list where Python computes with it"
            )
        return self._captures.read()

    @aside
    def _look_aside(self) -> None:
        self._captures.look()

    def __reduce__(self) -> str | tuple[Any, ...]:
        """By reference where its module has it, or its object's class, by name; otherwise what was recorded of it."""
        found = self._importable()
        if found is self:
            return self._place[1]
        by_name = found is self.function or _is_method_by_name(self.function)
        if by_name:
            return _untraced, (type(self), self.function, self.name, self.fits)
        return self.recorded, self._recorded()

    def __deepcopy__(self, memo: dict[int, Any]) -> WrittenFunction:
        """Itself where its function is found by name or captures nothing that is copied; else one of the copies."""
        if self._importable() is not None:
            return self
        function = copied(self.function, memo)
        return self if function is self.function else _untraced(type(self), function, self.name, self.fits)

    def _recorded(self) -> tuple[str, tuple[str, ...], dict[str, Any], list[Record], Fits | None]:
        if self.known() is None:
            raise ArgumentTypeError(
                f"{self.name}: it can't be pickled before a call has shown the kinds of its arguments "
                f"({', '.join(self.keywords)}), since its function is a lambda or local. Define it with "
                "`def` at the top level of a module"
            )
        return self.name, self.keywords, self.defaults, self.traces.records(self.reading()), self.fits

    def _importable(self) -> object:
        """The mask or its function, whichever its module has by name; None where it has neither."""
        try:
            found = operator.attrgetter(self._place[1])(sys.modules[self._place[0]])
        except (AttributeError, KeyError):
            return None
        return found if found is self or found is self.function else None


def _untraced(
    kind: type[WrittenFunction], function: Callable[..., Any], name: str, fits: Fits | None
) -> WrittenFunction:
    """One whose function may not be ready to run: what it captures is still being made."""
    return kind(function, name, fits, traced=False)


def _is_method_by_name(function: Any) -> bool:
    """Whether a function is an object's method, of a class that its module has by name."""
    if not isinstance(function, MethodType) or isinstance(function.__self__, Function):  # which can't be called then
        return False
    kind = type(function.__self__)
    try:
        found = operator.attrgetter(f"{kind.__qualname__}.{function.__name__}")(sys.modules[kind.__module__])
    except (AttributeError, KeyError):
        return False
    return found is function.__func__


def copied(function: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a function with what its closure holds; itself where nothing of that is copied."""
    if isinstance(function, functools.partial):
        args, keywords = copy.deepcopy((function.args, function.keywords), memo)
        return functools.partial(copied(function.func, memo), *args, **keywords)
    if not isinstance(function, FunctionType):
        return copy.deepcopy(function, memo)
    if id(function) in memo or not function.__closure__:
        return memo.get(id(function), function)
    cells = tuple(CellType() for _ in function.__closure__)
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__, new.__qualname__, new.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    memo[id(function)] = new
    changed = [_fill(cell, old, memo) for cell, old in zip(cells, function.__closure__, strict=True)]
    if not any(changed):
        memo[id(function)] = function
    return memo[id(function)]


def _fill(cell: CellType, old: CellType, memo: dict[int, Any]) -> bool:
    """Copy what a cell holds; whether that is another object."""
    try:
        held = old.cell_contents
    except ValueError:  # nothing yet
        return False
    if isinstance(held, ModuleType):
        cell.cell_contents = held
    else:
        cell.cell_contents = copied(held, memo) if isinstance(held, FunctionType) else copy.deepcopy(held, memo)
    return cell.cell_contents is not held


def _kind(value: Any) -> str:
    return f"{value.dtype} of {value.ndim} dimensions" if isinstance(value, Tensor) else type(value).__name__
