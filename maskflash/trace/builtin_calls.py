"""Python's builtins on symbols -> recorded nodes; functions in C -> the same, telling what they change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch

from maskflash.trace.branches import common_dtype, joined
from maskflash.trace.hooks import if_, is_, iterated, written
from maskflash.trace.symbols import Symbol, Table, apply, fail_type, position, stands_for
from maskflash.trace.tracer import Tracer, active

_CHANGES: Final = frozenset(
    str.split("""
        append appendleft extend extendleft insert remove pop popleft popitem clear sort reverse rotate add discard
        update setdefault move_to_end send throw close difference_update intersection_update
        symmetric_difference_update fill put partition __setitem__ __delitem__ __setattr__ __delattr__ __iadd__ __ior__
        __next__ setattr delattr setitem delitem iadd iconcat ior insort_left insort_right heappush heappop heapreplace
        heappushpop heapify _count_elements
    """)
)  # functions in C that change their owner, or else what they are given first
_READS: Final = frozenset(
    str.split("""
        next list tuple set frozenset dict sum sorted enumerate zip filter reduce iter islice chain takewhile dropwhile
        pairwise accumulate deque join fromkeys
    """)
)  # and that may take iterators


def extreme_of(op: str, builtin: Callable[..., Any]) -> Callable[..., Any]:
    """`min(...)` or `max(...)`."""

    def pick(tracer: Tracer, x: Any, y: Any) -> Any:
        if not (isinstance(x, Symbol) or isinstance(y, Symbol)):
            return builtin(x, y)
        code = pick.__code__
        args = [position(tracer, value, place) for place, value in enumerate((x, y))]
        dtype = common_dtype(tracer, *(tracer.builder.nodes[arg] for arg in args))
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


def isinstance_(value: Any, kinds: Any) -> bool:
    """`isinstance(...)`, which is refused where an index may be a number or a tensor and the answer differs."""
    if not isinstance(value, (Symbol, Table)):
        return isinstance(value, kinds)
    answers = {issubclass(kind, kinds) for kind in stands_for(value)}
    return fail_type(value) if len(answers) > 1 else answers.pop()


def type_(*args: Any, **kwargs: Any) -> Any:
    """`type(...)`, which is refused where an index may be a number or a tensor."""
    if len(args) == 1 and isinstance(args[0], (Symbol, Table)):
        kinds = stands_for(args[0])
        return fail_type(args[0]) if len(kinds) > 1 else kinds[0]
    return type(*args, **kwargs)


def id_(value: Any) -> int:
    """`id(...)`, which is refused for numbers."""
    return is_(value, 0) or id(value)


def print_(*values: Any, **options: Any) -> None:
    """`print(...)`, which shows symbols as expressions."""
    tracer = active()
    if tracer is not None:
        tracer.tells = True
    try:
        print(*values, **options)
    finally:
        if tracer is not None:
            tracer.tells = False


def of_math(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Python's `math`, of numbers; of a symbol in a score function it is torch's."""

    def computed(*args: Any) -> Any:
        symbols = [arg for arg in args if isinstance(arg, Symbol)]
        if not (symbols and symbols[0].tracer.role.scores):
            return function(*args)
        return apply(symbols[0].tracer, op, *map(_as_float, args))

    return computed


def _as_float(value: Any) -> Any:
    """An integer as `math` takes it: a float of 64 bits, which yields to a tensor's dtype."""
    if not isinstance(value, Symbol) or value.dtype.is_floating_point:
        return value
    return Symbol(value.tracer, value.tracer.record("cast", value.position, dtype=torch.float64, weak=True))


def of_log(x: Any, base: Any = None) -> Any:
    """`math.log`, also to a base."""
    if base is None:
        return of_math("log", math.log)(x)
    if not (isinstance(x, Symbol) or isinstance(base, Symbol)):
        return math.log(x, base)
    return of_log(x) / of_log(base)


MATH: Final = {
    **{name: name for name in ("exp", "exp2", "expm1", "log2", "log1p", "sqrt", "tanh", "sin", "cos", "tan", "atan")},
    **{"erf": "erf", "pow": "pow", "fabs": "abs"},
}
"""Functions of `math` by the operations that they are."""


def telling(tracer: Tracer, function: Any) -> Any:
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


def draw_of(function: Any) -> str | None:
    """What to call a method of one of Python's or numpy's random number generators; None if it is none."""
    if isinstance(function, functools.partial):
        function = function.func
    owner = type(getattr(function, "__self__", None))
    if any(f"{kind.__module__}.".startswith(("random.", "numpy.random.")) for kind in owner.__mro__):
        return f"{owner.__name__}.{function.__name__}"
    return None
