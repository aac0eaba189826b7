"""A mask predicate and its run-time arguments -> an expression and what fills its slots.

Source: symbolic execution (King, 1976); operators are recorded on stand-ins for b, h, q and kv, short-circuit
connectives are lowered from the syntax tree, and statement-level branches run once per outcome and are merged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, MaskTraceError
from .evaluate import Inputs
from .lower import ACTIVE, lower
from .nodes import INDEX_VARIABLES, Expr, Node
from .paths import FEW_PATHS, MAX_PATHS, CannotMerge, TooManyPaths
from .simplify import simplify
from .symbols import Argument, Symbol, Table, Tracer
from .torch_calls import CapturedTensors

MaskArg = Tensor | int | bool


@dataclass(frozen=True, slots=True)
class Traced:
    """A mask's expression, with what fills each slot: a captured value, or the name of a keyword argument."""

    expr: Expr
    params: tuple[int | Argument, ...]
    tables: tuple[Tensor | Argument, ...]
    names: tuple[str, ...]  # what the user calls each table
    specialised: frozenset[str] = frozenset()  # arguments whose value (or shape) the expression depends on

    def bind(self, mask_args: Mapping[str, MaskArg]) -> Inputs:
        """The run-time values of all slots."""
        params = (mask_args[param] if isinstance(param, Argument) else param for param in self.params)
        tables = (mask_args[table] if isinstance(table, Argument) else table for table in self.tables)
        return Inputs(tuple(params), tuple(tables))  # type: ignore[arg-type]


def keyword_arguments(predicate: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a predicate's keyword-only parameters; its positional ones must be b, h, q, kv, by place."""
    name = _name(predicate)
    try:
        parameters = list(inspect.signature(predicate).parameters.values())
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"mask: predicate is a {type(predicate).__name__}; pass a function") from None
    required = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for place, p in enumerate(required) if place < 4 or p.default is p.empty]
    if len(required) != 4 and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        got = ", ".join(p.name for p in parameters)
        raise ArgumentError(
            f"{name}: a mask predicate takes (b, h, q, kv), got ({got}). Take all four, also those you don't use; "
            "put run-time tensors after a `*`: def packed(b, h, q, kv, *, doc)."
        )
    return tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)


def trace(predicate: Callable[..., Any], mask_args: Mapping[str, MaskArg] | None = None) -> Traced:
    """Run a predicate on symbols and return what it computes.

    Args:
        predicate: `f(b, h, q, kv, *, ...) -> bool`; plain Python over ints, closures and tensors.
        mask_args: a value for each keyword-only parameter. Tensors become tables by name: their contents, and
            unless the predicate asks for it their shape, do not enter the expression.

    Raises:
        MaskTraceError: something that can't be an expression, with file, line and the fix.
    """
    mask_args = mask_args or {}
    try:
        return _trace(predicate, mask_args, FEW_PATHS, use_values=False)
    except TooManyPaths:
        pass
    try:
        return _trace(predicate, mask_args, MAX_PATHS, use_values=True)
    except TooManyPaths:
        code = _function(predicate).__code__
        raise MaskTraceError(
            f"{_name(predicate)} ({code.co_filename}:{code.co_firstlineno}): branches in more than {MAX_PATHS} ways. "
            "Return one expression built with `and`, `or` and `... if ... else ...` instead of `if` statements, "
            "or look the outcome up in a tensor."
        ) from None


def _trace(predicate: Callable[..., Any], mask_args: Mapping[str, MaskArg], limit: int, use_values: bool) -> Traced:
    tracer = Tracer(_name(predicate), limit, use_values)
    indices = [Symbol(tracer, tracer.builder.add(name, dtype=torch.int64)) for name in INDEX_VARIABLES]
    keywords = {name: tracer.argument(name, value) for name, value in mask_args.items()}
    lowered = _lowered(predicate)
    outer = getattr(ACTIVE, "tracer", None)
    ACTIVE.tracer = tracer
    try:
        with CapturedTensors(tracer):
            result = tracer.explore(lambda: _as_truth(tracer, lowered(*indices, **keywords)))
    except CannotMerge as problem:
        raise MaskTraceError(
            f"{tracer.name}: returns {problem} on different branches. Return True or False on every path."
        ) from None
    finally:
        ACTIVE.tracer = outer
    expr = simplify(tracer.builder.finish(tracer.truth(result).position))
    return _compact(expr, tracer, _function(predicate))


def _as_truth(tracer: Tracer, value: object) -> object:
    if isinstance(value, Table) and value.ndim == 0:
        value = value.element()
    if isinstance(value, Symbol) and not value.dtype.is_floating_point:
        return tracer.truth(value)
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.bool):
        return tracer.truth(value)
    kind = str(value.dtype) if isinstance(value, Symbol) else type(value).__name__
    fix = "Is a `return` missing?" if value is None else "Compare, and return the truth: `return x > 0`."
    function = getattr(ACTIVE, "where", tracer.name)
    raise MaskTraceError(f"{function}: a mask predicate returns True or False, got {kind}. {fix}")


def _compact(expr: Expr, tracer: Tracer, function: FunctionType) -> Traced:
    """Number the slots that survived in the order of their first use, and name the tables."""
    used: dict[str, list[int]] = {"param": [], "lookup": []}
    for node in expr.nodes:
        if node.op in used and node.value not in used[node.op]:
            used[node.op].append(int(node.value or 0))

    def renumber(node: Node) -> Node:
        if node.op not in used:
            return node
        return Node(node.op, node.args, node.dtype, node.weak, used[node.op].index(int(node.value or 0)))

    compact = Expr(tuple(map(renumber, expr.nodes)), expr.sources)
    tables = tuple(tracer.tables[slot] for slot in used["lookup"])
    return Traced(
        compact,
        tuple(tracer.params[slot] for slot in used["param"]),
        tables,
        tuple(_table_name(table, place, function) for place, table in enumerate(tables)),
        frozenset(tracer.specialised),
    )


def _table_name(table: Tensor | Argument, place: int, function: FunctionType) -> str:
    if isinstance(table, Argument):
        return table
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in closure:
        if _contents(cell) is table:
            return name
    names = (name for name in function.__code__.co_names if function.__globals__.get(name) is table)
    return next(names, f"table{place}")


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _lowered(predicate: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(predicate, FunctionType):
        return lower(predicate)
    if isinstance(predicate, MethodType) and isinstance(predicate.__func__, FunctionType):
        return MethodType(lower(predicate.__func__), predicate.__self__)
    method = getattr(type(predicate), "__call__", None)
    if isinstance(method, FunctionType):
        return MethodType(lower(method), predicate)
    return predicate


def _function(predicate: Any) -> FunctionType:
    """The function whose code a predicate runs first."""
    found = getattr(predicate, "func", predicate)  # functools.partial
    found = getattr(found, "__func__", found)
    return found if isinstance(found, FunctionType) else getattr(type(found), "__call__", found)


def _name(predicate: Any) -> str:
    return getattr(_function(predicate), "__name__", type(predicate).__name__)
