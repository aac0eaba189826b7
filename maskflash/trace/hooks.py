"""Operators of rewritten code on symbols -> recorded nodes; on other values, what Python makes of them.

`rewrite` puts calls of these in place of `and`, `or`, `not`, chains, ternaries, `in`, `is` and operators on captured
numbers, and before whatever is about to be changed.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskflash.trace.branches import explore, merge
from maskflash.trace.paths import Apart, CannotMerge
from maskflash.trace.sources import Captured
from maskflash.trace.symbols import Symbol, Table, apply, is_bool, symbol, truth
from maskflash.trace.tracer import Tracer, active, drop_private

_UNCHANGING = (Symbol, Table, Tensor, int, float, complex, str, bytes, tuple, frozenset, range, type(None))

# Connectives


def joined(op: str, *operands: Callable[[], Any]) -> Any:
    """`x and y and ...`, or the same with `or`."""
    value = operands[0]()
    for operand in operands[1:]:
        value = _connect(op, _lift(value), operand)
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


def _explored(tracer: Tracer, operand: Callable[[], Any]) -> Any:
    return explore(tracer, operand, operand.__code__, conditional=True)


def _constantly(value: Any) -> Callable[[], Any]:
    return lambda: value


def truth_of(value: Any) -> Any:
    """`bool(x)`."""
    value = _lift(value)
    return truth(value.tracer, value) if isinstance(value, Symbol) else bool(value)


def _lift(value: Any) -> Any:
    """A captured 0-dim tensor as a symbol: its truth may change later."""
    tracer = active()
    return symbol(tracer, value) if tracer and isinstance(value, Tensor) and value.ndim == 0 else value


def all_of(op: str, items: Iterable[Any]) -> Any:
    """`all(...)`, or `any(...)` by `or`; Python itself would not ask for items after the one that decides."""
    code = getattr(items, "gi_code", all_of.__code__)
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
        result = _connect(op, result, _constantly(truth_of(item)))


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


# Captured numbers


class _Read(NamedTuple):
    """A captured number on its way into an operation, and what fills its slot."""

    value: int | float
    name: Captured


def operate(op: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    """`x + y`, `x < y` and the like, of which one may be a captured number: a param where it meets a symbol."""
    tracer = active()
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


def read(function: FunctionType, cells: Mapping[str, CellType], name: str, value: Any) -> Any:
    """A captured operand, by its name in a function."""
    owner = id(cells[name]) if name in cells else (id(function.__globals__), name)
    return _noted(owner, value)


def attribute(owner: Any, name: str) -> Any:
    """An operand that is an attribute."""
    return _noted((id(owner), name), getattr(owner, name))


def _noted(owner: object, value: Any) -> Any:
    tracer = active()
    name = tracer.sources.numbers.get(owner) if tracer and type(value) in (int, float) else None
    return value if name is None else _Read(value, name)


# Membership and identity


def in_(value: Any, container: Any) -> Any:
    """`x in container`, of a tuple, list, set or range."""
    if isinstance(value, Symbol) and isinstance(container, np.ndarray):
        value.tracer.fail_member()
    if isinstance(value, Symbol) and isinstance(container, range):
        return _in_range(value, container)
    if isinstance(container, (tuple, list)) and any(isinstance(item, Symbol) for item in (value, *container)):
        return all_of("or", (item is value or value == item for item in container))
    if isinstance(value, Symbol) and isinstance(container, (set, frozenset, dict)):
        return all_of("or", (value == item for item in container))
    return value in container


def _in_range(value: Symbol, numbers: range) -> Any:
    tracer = value.tracer
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        return all_of("or", (apply(tracer, "eq", value, number) for number in numbers))
    if value.dtype != torch.int64:  # an end may lie beyond what a narrower value can be compared with
        value = Symbol(tracer, tracer.record("cast", value.position, dtype=torch.int64, weak=False))
    first, last = sorted((numbers[0], numbers[-1])) if numbers else (0, -1)
    inside = apply(tracer, "and", apply(tracer, "ge", value, first), apply(tracer, "le", value, last))
    if abs(numbers.step) == 1:
        return inside
    rest = apply(tracer, "mod", apply(tracer, "sub", value, first), abs(numbers.step))
    return apply(tracer, "and", inside, apply(tracer, "eq", rest, 0))


def is_(x: Any, y: Any) -> bool:
    """`x is y`."""
    for one, other in ((x, y), (y, x)):
        if isinstance(one, Symbol) and one is not other and (_is_scalar(other) or isinstance(other, Tensor)):
            one.tracer.fail("compares numbers by identity", "Which are one object is Python's own affair: use `==`.")
    return x is y


def not_in_(value: Any, container: Any) -> Any:
    """`x not in container`."""
    return not_(in_(value, container))


def is_not_(x: Any, y: Any) -> bool:
    """`x is not y`."""
    return not is_(x, y)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (Symbol, numbers.Number)) or is_bool(value)


# What is changed


def written(target: Any) -> Any:
    """What is about to be changed."""
    tracer = active()
    if tracer is not None and not isinstance(target, _UNCHANGING):
        tracer.wrote(target)
    return target


def rebinds(reader: FunctionType) -> None:
    """Outer variables are about to be bound anew: those that a lambda reads, or else global ones."""
    tracer = active()
    if tracer is not None:
        for variables in reader.__closure__ or (reader.__globals__,):
            tracer.wrote(variables, some_time=True)


def iterated(items: Any) -> Any:
    """What is about to be iterated over: an iterator changes."""
    return written(items) if hasattr(type(items), "__next__") else items
