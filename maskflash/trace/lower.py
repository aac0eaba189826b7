"""A plain Python function -> the same function, whose short-circuit operators record instead of branching.

Python gives no hook for `and`, `or`, `not`, chains and ternaries: a symbol can only see its truth asked for, which
forks execution. `rewrite` turns them into calls of the functions below, which behave as Python does on concrete
values; a function whose source can't be had stays as it is and forks.
"""

from __future__ import annotations

import builtins
import functools
import numbers
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskflash.trace.branches import common_dtype, explore, joined, merge
from maskflash.trace.paths import Apart, CannotMerge
from maskflash.trace.rewrite import HOOKS, rewritten
from maskflash.trace.symbols import (
    Symbol,
    Table,
    apply,
    fail_member,
    fail_type,
    is_bool,
    position,
    stands_for,
    symbol,
    truth,
)
from maskflash.trace.tracer import OWN, Captured, Tracer, drop_private

ACTIVE = threading.local()  # .tracer: the trace running in this thread

_GENERATORS = 0x2A0  # code flags of generators, coroutines and asynchronous generators
_IN_C = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
_CHANGES = frozenset(
    (
        *("append", "appendleft", "extend", "extendleft", "insert", "remove", "pop", "popleft", "popitem", "clear"),
        *(
            "sort",
            "reverse",
            "rotate",
            "add",
            "discard",
            "update",
            "setdefault",
            "move_to_end",
            "send",
            "throw",
            "close",
        ),
        *("difference_update", "intersection_update", "symmetric_difference_update", "fill", "put", "partition"),
        *("__setitem__", "__delitem__", "__setattr__", "__delattr__", "__iadd__", "__ior__", "__next__"),
        *("setattr", "delattr", "setitem", "delitem", "iadd", "iconcat", "ior", "insort_left", "insort_right"),
        *("heappush", "heappop", "heapreplace", "heappushpop", "heapify", "_count_elements"),
    )
)  # functions in C that change their owner, or else what they are given first
_READS = frozenset(
    (
        *("next", "list", "tuple", "set", "frozenset", "dict", "sum", "sorted", "enumerate", "zip", "filter", "reduce"),
        *("iter", "islice", "chain", "takewhile", "dropwhile", "pairwise", "accumulate", "deque", "join", "fromkeys"),
    )
)  # and that may take iterators
_UNCHANGING = (Symbol, Table, Tensor, int, float, complex, str, bytes, tuple, frozenset, range, type(None))


def lower(predicate: Callable[..., Any]) -> Callable[..., Any]:
    """The predicate rewritten to record: a function, a method, a partial or an object with `__call__`."""
    if isinstance(predicate, FunctionType):
        return _lower_function(predicate)
    if isinstance(predicate, MethodType):
        return MethodType(lower(predicate.__func__), predicate.__self__)
    if isinstance(predicate, functools.partial):
        return functools.partial(lower(predicate.func), *predicate.args, **predicate.keywords)
    method = python_code(predicate)
    return predicate if method is None else MethodType(_lower_function(method), predicate)


def read_elsewhere(code: CodeType) -> frozenset[str]:
    """The names that code reads elsewhere than where `operate` is told of it."""
    found = rewritten(code)
    if found is not None:
        return found.elsewhere
    inner = (read_elsewhere(const) for const in code.co_consts if isinstance(const, CodeType))
    strings = (const for const in code.co_consts if isinstance(const, str))
    return frozenset((*code.co_names, *code.co_freevars, *strings)).union(*inner)


def python_code(function: Any) -> FunctionType | None:
    """The Python function behind a method, a partial or an object with `__call__`, if there is one."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not isinstance(function, (FunctionType, type)):
        function = next((vars(t)["__call__"] for t in type(function).__mro__ if "__call__" in vars(t)), None)
    return function if isinstance(function, FunctionType) else None


def _lower_function(function: FunctionType) -> FunctionType:
    """The rewritten function, sharing globals, defaults and closure cells with the original."""
    found = rewritten(function.__code__)
    if found is None:
        return function
    code = found.code
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    runtime = {**_RUNTIME, "__mf_read": functools.partial(_read, function, cells)}
    closure = tuple(cells[name] if name in cells else CellType(runtime[name]) for name in code.co_freevars)
    lowered = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    lowered.__kwdefaults__ = function.__kwdefaults__
    return lowered


# What rewritten code calls


def and_(*operands: Callable[[], Any]) -> Any:
    """`x and y and ...`."""
    value = operands[0]()
    for operand in operands[1:]:
        value = _connect("and", _lift(value), operand)
    return value


def or_(*operands: Callable[[], Any]) -> Any:
    """`x or y or ...`."""
    value = operands[0]()
    for operand in operands[1:]:
        value = _connect("or", _lift(value), operand)
    return value


def not_(value: Any) -> Any:
    """`not x`."""
    value = _lift(value)
    return apply(value.tracer, "not", truth(value.tracer, value)) if isinstance(value, Symbol) else not value


def chain(left: Any, *links: tuple[Callable[[Any, Any], Any], Callable[[], Any]]) -> Any:
    """`a < b < c`: each operand is evaluated once, and only if the links before it hold."""
    result: Any = True
    for compare, operand in links:
        if not isinstance(result, Symbol) and not result:
            return result
        try:
            right = _explored(result.tracer, operand) if isinstance(result, Symbol) else operand()
        except CannotMerge:
            if not result:
                return result
            result, right = True, operand()
        test, left = operate(compare, left, right), right
        result = test if result is True else _connect("and", result, _constantly(test))
    return result


class _Read(NamedTuple):
    """A captured number on its way into an operation, and what fills its slot."""

    value: int | float
    name: Captured


def operate(op: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    """`x + y`, `x < y` and the like, of which one may be a captured number: a param where it meets a symbol."""
    tracer: Tracer | None = getattr(ACTIVE, "tracer", None)
    if tracer is None or not (isinstance(x, _Read) or isinstance(y, _Read)):
        return op(x, y)
    others = [operand for operand in (x, y) if not isinstance(operand, _Read)]
    recorded = any(isinstance(other, (Symbol, Table)) or _is_element(other) for other in others)
    return op(*(_taken(tracer, operand, recorded) for operand in (x, y)))


def _taken(tracer: Tracer, operand: Any, recorded: bool) -> Any:
    """A captured number as a param, or where Python computes with it, as it is: then the trace depends on it."""
    if not isinstance(operand, _Read):
        return operand
    if recorded:
        return Symbol(tracer, tracer.argument(operand.name, operand.value))
    tracer.specialised.add(operand.name)
    return operand.value


def _is_element(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _read(function: FunctionType, cells: Mapping[str, CellType], name: str, value: Any) -> Any:
    """A captured operand, by its name in a function."""
    owner = id(cells[name]) if name in cells else (id(function.__globals__), name)
    return _noted(owner, value)


def attribute(owner: Any, name: str) -> Any:
    """An operand that is an attribute."""
    return _noted((id(owner), name), getattr(owner, name))


def _noted(owner: object, value: Any) -> Any:
    tracer: Tracer | None = getattr(ACTIVE, "tracer", None)
    name = tracer.sources.numbers.get(owner) if tracer and type(value) in (int, float) else None
    return value if name is None else _Read(value, name)


def if_(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`x if c else y`."""
    condition = _lift(condition)
    if not isinstance(condition, Symbol):
        return then() if condition else otherwise()
    tracer = condition.tracer
    test = truth(tracer, condition)
    try:
        x, y = _explored(tracer, then), _explored(tracer, otherwise)
        return merge(tracer, test.position, x, y, then.__code__)
    except CannotMerge:
        return then() if test else otherwise()


def in_(value: Any, container: Any) -> Any:
    """`x in container`, of a tuple, list, set or range."""
    if isinstance(value, Symbol) and isinstance(container, np.ndarray):
        fail_member(value.tracer)
    if isinstance(value, Symbol) and isinstance(container, range):
        return _in_range(value, container)
    if isinstance(container, (tuple, list)) and any(isinstance(item, Symbol) for item in (value, *container)):
        return any_(item is value or value == item for item in container)
    if isinstance(value, Symbol) and isinstance(container, (set, frozenset, dict)):
        return any_(value == item for item in container)
    return value in container


def _in_range(value: Symbol, numbers: range) -> Any:
    tracer = value.tracer
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        return any_(apply(tracer, "eq", value, number) for number in numbers)
    if value.dtype != torch.int64:  # an end may lie beyond what a narrower value can be compared with
        value = Symbol(tracer, tracer.record("cast", value.position, dtype=torch.int64, weak=False))
    first, last = sorted((numbers[0], numbers[-1])) if numbers else (0, -1)
    inside = apply(tracer, "and", apply(tracer, "ge", value, first), apply(tracer, "le", value, last))
    if abs(numbers.step) == 1:
        return inside
    rest = apply(tracer, "mod", apply(tracer, "sub", value, first), abs(numbers.step))
    return apply(tracer, "and", inside, apply(tracer, "eq", rest, 0))


def any_(items: Iterable[Any]) -> Any:
    """`any(...)`."""
    return _all_of("or", items)


def all_(items: Iterable[Any]) -> Any:
    """`all(...)`."""
    return _all_of("and", items)


def _all_of(op: str, items: Iterable[Any]) -> Any:
    """Items joined by `and` or `or`; Python itself would not ask for those after the one that decides."""
    code = getattr(items, "gi_code", _all_of.__code__)
    rest = iter(iterated(items))
    result: Any = op == "and"
    while True:
        if isinstance(result, Symbol) and code in result.tracer.apart:
            result = bool(result)
        if result is (op == "or"):
            return result
        try:
            item = _next(rest, result.tracer, code) if isinstance(result, Symbol) else next(rest)
        except StopIteration:
            return result
        result = _connect(op, result, _constantly(_truth(item)))


def _next(items: Iterator[Any], tracer: Tracer, code: CodeType) -> Any:
    """The next item, which Python may not ask for; what it takes to find it must not outlive it."""
    outer, tracer.written = tracer.written, {}
    try:
        return next(items)
    finally:
        changed, tracer.written = tracer.written, outer
        drop_private(changed)
        if changed:
            tracer.stop(Apart(code))


def call(function: Any) -> Any:
    """What to call instead of `function`: helpers are rewritten too, and their branches merged where they return."""
    tracer: Tracer | None = getattr(ACTIVE, "tracer", None)
    if tracer is None or not callable(function):
        return function
    if draw := _draw(function):
        return lambda *args, **kwargs: tracer.fail_draw(draw)
    if isinstance(function, (type, *_IN_C)):
        return _BUILTINS.get(function) or _telling(tracer, function)
    plain = python_code(function)
    if plain is None or plain.__code__.co_flags & _GENERATORS or _is_foreign(plain) or not _is_rewritten(plain):
        return function
    lowered = lower(function)

    def explored(*args: Any, **kwargs: Any) -> Any:
        try:
            return explore(tracer, lambda: lowered(*args, **kwargs), plain.__code__, conditional=False)
        except CannotMerge:
            return lowered(*args, **kwargs)

    return explored


def _draw(function: Any) -> str | None:
    """What to call a method of one of Python's or numpy's random number generators; None if it is none."""
    if isinstance(function, functools.partial):
        function = function.func
    owner = type(getattr(function, "__self__", None))
    if any(f"{kind.__module__}.".startswith(("random.", "numpy.random.")) for kind in owner.__mro__):
        return f"{owner.__name__}.{function.__name__}"
    return None


def _is_foreign(function: FunctionType) -> bool:
    module: str = function.__globals__.get("__name__", "")
    own = f"{module}.".startswith(OWN) or module.partition(".")[0] in ("torch", "numpy", "copy")
    return own and not module.startswith("torch.nn.attention")


def _is_rewritten(function: FunctionType) -> bool:
    """Whether it tells what it changes; if not, its branches must not be merged."""
    return not set(HOOKS).isdisjoint(function.__code__.co_freevars) or rewritten(function.__code__) is not None


def _telling(tracer: Tracer, function: Any) -> Any:
    """A function written in C, or the same, telling what it changes: iterators that it reads, and containers."""
    name = function.__name__
    if name not in _CHANGES and name not in _READS:
        return function

    def telling(*args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if name in _CHANGES:
            written(owner if owner is not None and not isinstance(owner, (ModuleType, type)) else args[:1] and args[0])
        for arg in args:
            iterated(arg)
        return function(*args, **kwargs)

    return telling


def written(target: Any) -> Any:
    """What is about to be changed."""
    tracer = getattr(ACTIVE, "tracer", None)
    if tracer is not None and not isinstance(target, _UNCHANGING):
        tracer.wrote(target)
    return target


def rebinds(reader: FunctionType) -> None:
    """Outer variables are about to be bound anew: those that a lambda reads, or else global ones."""
    tracer: Tracer | None = getattr(ACTIVE, "tracer", None)
    if tracer is not None:
        for variables in reader.__closure__ or (reader.__globals__,):
            tracer.wrote(variables, some_time=True)


def iterated(items: Any) -> Any:
    """What is about to be iterated over: an iterator changes."""
    return written(items) if hasattr(type(items), "__next__") else items


# What rewritten code calls instead of builtins


def is_(x: Any, y: Any) -> bool:
    """`x is y`."""
    for one, other in ((x, y), (y, x)):
        if isinstance(one, Symbol) and one is not other and (_is_scalar(other) or isinstance(other, Tensor)):
            one.tracer.fail("compares numbers by identity", "Which are one object is Python's own affair: use `==`.")
    return x is y


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (Symbol, numbers.Number)) or is_bool(value)


def _isinstance(value: Any, kinds: Any) -> bool:
    if not isinstance(value, (Symbol, Table)):
        return isinstance(value, kinds)
    answers = {issubclass(kind, kinds) for kind in stands_for(value)}
    return fail_type(value) if len(answers) > 1 else answers.pop()


def _type(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and isinstance(args[0], (Symbol, Table)):
        kinds = stands_for(args[0])
        return fail_type(args[0]) if len(kinds) > 1 else kinds[0]
    return type(*args, **kwargs)


def _id(value: Any) -> int:
    return is_(value, 0) or id(value)


def _print(*values: Any, **options: Any) -> None:
    """`print(...)`, which shows symbols as expressions."""
    tracer = getattr(ACTIVE, "tracer", None)
    if tracer is not None:
        tracer.tells = True
    try:
        print(*values, **options)
    finally:
        if tracer is not None:
            tracer.tells = False


def _extreme(op: str, builtin: Callable[..., Any]) -> Callable[..., Any]:
    """`min(...)` or `max(...)`."""

    def pick(tracer: Tracer, x: Any, y: Any) -> Any:
        if not (isinstance(x, Symbol) or isinstance(y, Symbol)):
            return builtin(x, y)
        code = pick.__code__
        args = [position(tracer, value, place) for place, value in enumerate((x, y))]
        dtype = common_dtype(*(tracer.builder.nodes[arg] for arg in args))
        if dtype is None or dtype.is_floating_point or code in tracer.apart:  # one of the two as it is, also beside NaN
            return if_(y < x if op == "min" else y > x, lambda: y, lambda: x)
        return joined(tracer, op, args, code)

    def extreme(*args: Any, **kwargs: Any) -> Any:
        items = list(args[0] if len(args) == 1 and not isinstance(args[0], Symbol) else args)
        tracer = next((item.tracer for item in items if isinstance(item, Symbol)), None)
        if tracer is None or kwargs:
            return builtin(items, **kwargs)
        return functools.reduce(functools.partial(pick, tracer), items)

    return extreme


def _constantly(value: Any) -> Callable[[], Any]:
    return lambda: value


def _truth(value: Any) -> Any:
    value = _lift(value)
    return truth(value.tracer, value) if isinstance(value, Symbol) else bool(value)


def _lift(value: Any) -> Any:
    """A captured 0-dim tensor as a symbol: its truth may change later."""
    tracer = getattr(ACTIVE, "tracer", None)
    return symbol(tracer, value) if tracer and isinstance(value, Tensor) and value.ndim == 0 else value


def _explored(tracer: Tracer, operand: Callable[[], Any]) -> Any:
    return explore(tracer, operand, operand.__code__, conditional=True)


def _connect(op: str, x: Any, operand: Callable[[], Any]) -> Any:
    """`x and y` or `x or y`, with Python's values: one of the operands, not only a truth."""
    if not isinstance(x, Symbol):
        return operand() if bool(x) == (op == "and") else x
    tracer = x.tracer
    try:
        y = _explored(tracer, operand)
        if x.dtype == torch.bool and (is_bool(y) or (isinstance(y, Symbol) and y.dtype == torch.bool)):
            return apply(tracer, op, x, y)
        test = truth(tracer, x).position
        then, otherwise = (y, x) if op == "and" else (x, y)
        return merge(tracer, test, then, otherwise, operand.__code__)
    except CannotMerge:
        return operand() if bool(x) == (op == "and") else x


_RUNTIME: dict[str, Any] = {
    **{"__mf_and": and_, "__mf_or": or_, "__mf_not": not_, "__mf_chain": chain, "__mf_if": if_},
    **{"__mf_in": in_, "__mf_not_in": lambda x, container: not_(in_(x, container)), "__mf_call": call},
    **{f"__mf_{name}": getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{f"__mf_{name}": getattr(operator, name) for name in ("add", "sub", "mul")},
    **{"__mf_operate": operate, "__mf_attribute": attribute},
    **{"__mf_is": is_, "__mf_is_not": lambda x, y: not is_(x, y)},
    **{"__mf_written": written, "__mf_rebinds": rebinds, "__mf_iterated": iterated},
}
_BUILTINS: dict[Any, Any] = {
    **{any: any_, all: all_, bool: _truth},
    **{min: _extreme("min", builtins.min), max: _extreme("max", builtins.max)},
    **{isinstance: _isinstance, type: _type, id: _id, print: _print},
    **{map: lambda function, *items: map(call(function), *items)},
}
assert {*_RUNTIME, "__mf_read"} == set(HOOKS)
