"""A plain Python function -> the same function, whose short-circuit operators record instead of branching.

Python gives no hook for `and`, `or`, `not`, chains and ternaries: a symbol can only see its truth asked for, which
forks execution. `rewrite` turns them into calls of `hooks`, and calls of functions into calls of what `call` finds in
their place. A function whose source can't be had stays as it is and forks.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

import torch

from maskflash.trace import hooks
from maskflash.trace.branches import explore
from maskflash.trace.builtin_calls import (
    MATH,
    draw_of,
    extreme_of,
    id_,
    isinstance_,
    of_log,
    of_math,
    print_,
    telling,
    type_,
)
from maskflash.trace.frames import OWN
from maskflash.trace.paths import CannotMerge
from maskflash.trace.rewrite import HOOKS, rewritten
from maskflash.trace.tracer import active

_GENERATORS = 0x2A0  # code flags of generators, coroutines and asynchronous generators
_IN_C = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)


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
    runtime = {**_RUNTIME, "__mf_read": functools.partial(hooks.read, function, cells)}
    closure = tuple(cells[name] if name in cells else CellType(runtime[name]) for name in code.co_freevars)
    lowered = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    lowered.__kwdefaults__ = function.__kwdefaults__
    return lowered


def call(function: Any) -> Any:
    """What to call instead of `function`: helpers are rewritten too, and their branches merged where they return."""
    tracer = active()
    if tracer is None or not callable(function):
        return function
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        tracer.fail(
            f"calls `{owner.__name__}.apply`, whose own derivative can't be followed",
            "Write what its forward computes: the derivative is found from that.",
        )
    if draw := draw_of(function):
        return lambda *args, **kwargs: tracer.fail_draw(draw)
    if isinstance(function, (type, *_IN_C)):
        return _BUILTINS.get(function) or telling(tracer, function)
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


def _is_foreign(function: FunctionType) -> bool:
    module: str = function.__globals__.get("__name__", "")
    own = f"{module}.".startswith(OWN) or module.partition(".")[0] in ("torch", "numpy", "copy")
    return own and not module.startswith("torch.nn.attention")


def _is_rewritten(function: FunctionType) -> bool:
    """Whether it tells what it changes; if not, its branches must not be merged."""
    return not set(HOOKS).isdisjoint(function.__code__.co_freevars) or rewritten(function.__code__) is not None


_RUNTIME: dict[str, Any] = {
    **{f"__mf_{op}": functools.partial(hooks.joined, op) for op in ("and", "or")},
    **{f"__mf_{name}": getattr(hooks, f"{name}_") for name in ("not", "if", "in", "not_in", "is", "is_not")},
    **{f"__mf_{hook.__name__}": hook for hook in (hooks.chain, hooks.operate, hooks.attribute, call)},
    **{f"__mf_{hook.__name__}": hook for hook in (hooks.written, hooks.rebinds, hooks.iterated)},
    **{
        f"__mf_{name}": getattr(operator, name)
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "mul", "truediv")
    },
}
_BUILTINS: dict[Any, Any] = {
    **{any: functools.partial(hooks.all_of, "or"), all: functools.partial(hooks.all_of, "and"), bool: hooks.truth_of},
    **{min: extreme_of("min", builtins.min), max: extreme_of("max", builtins.max)},
    **{isinstance: isinstance_, type: type_, id: id_, print: print_},
    **{map: lambda function, *items: map(call(function), *items)},
    **{getattr(math, name): of_math(op, getattr(math, name)) for name, op in MATH.items()},
    math.log: of_log,
}
assert {*_RUNTIME, "__mf_read"} == set(HOOKS)
