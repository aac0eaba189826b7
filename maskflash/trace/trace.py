"""A mask predicate or a score function, and its run-time arguments -> an expression and what fills its slots.

Source: symbolic execution (King, 1976); operators are recorded on stand-ins for b, h, q and kv, short-circuit
connectives are lowered from the syntax tree, and statement-level branches run once per outcome and are merged.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError, MaskTraceError
from maskflash.expr.evaluate import Inputs
from maskflash.expr.nodes import Expr, Node, Source
from maskflash.expr.simplify import simplify
from maskflash.ground.names import instead_of
from maskflash.trace import torch_calls
from maskflash.trace.branches import explore_all
from maskflash.trace.lower import lower, python_code
from maskflash.trace.paths import FEW_PATHS, MAX_PATHS, Apart, RaisesInBranch, TooManyPaths, Unrepeatable
from maskflash.trace.sources import Argument, Captured, Sources, View
from maskflash.trace.symbols import Symbol, Table, element, is_bool, symbol, truth
from maskflash.trace.tracer import ACTIVE, MASK, Role, TorchCalls, Tracer, active

MaskArg = Tensor | int | float | bool

_DEEPER: Final = 6  # times Python's own limit
_stack = threading.RLock()  # of whoever changes that limit


@dataclass(frozen=True, slots=True)
class Traced:
    """A mask's expression, with what fills each slot: a value, or the name of one that comes with each call."""

    expr: Expr
    params: tuple[int | float | Argument, ...]
    tables: tuple[Tensor | Argument | View, ...]
    names: tuple[str, ...]  # what the user calls each table
    specialised: frozenset[str] = frozenset()  # names of those whose value (or layout) the expression depends on

    def filled(self, captured: Mapping[str, Any]) -> Traced:
        """The same with captured values in their slots."""
        if not captured:
            return self
        params = (captured[x] if isinstance(x, Captured) else x for x in self.params)
        return replace(self, params=tuple(params), tables=tuple(_table(captured, table) for table in self.tables))

    def renamed(self, names: Mapping[str, Captured]) -> Traced:
        """The same with other names for captured slots."""
        if not names:
            return self

        def new(slot: Any) -> Any:
            if isinstance(slot, View):
                return slot._replace(name=names.get(slot.name, slot.name))
            return names.get(slot, slot) if isinstance(slot, Captured) else slot

        specialised = frozenset(map(new, self.specialised))
        params, tables = tuple(map(new, self.params)), tuple(map(new, self.tables))
        return replace(self, params=params, tables=tables, specialised=specialised)

    def bind(self, mask_args: Mapping[str, MaskArg]) -> Inputs:
        """The run-time values of all slots."""
        params = (mask_args[param] if isinstance(param, Argument) else param for param in self.params)
        tables = (mask_args[table] if isinstance(table, Argument) else table for table in self.tables)
        return Inputs(tuple(params), tuple(tables))  # type: ignore[arg-type]


def _table(captured: Mapping[str, Any], table: Tensor | Argument | View) -> Any:
    """What is captured for a table's slot; what was there if nothing is."""
    if isinstance(table, View):
        return table.of(captured[table.name])
    return captured[table] if isinstance(table, Captured) else table


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's parameters; a module's are those of its `forward`, since its call passes all on."""
    return inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).parameters


def keyword_arguments(predicate: Callable[..., Any], role: Role = MASK) -> tuple[str, ...]:
    """Names of a function's keyword-only parameters; its positional ones must be those of its role, by place."""
    is_module = isinstance(predicate, torch.nn.Module)
    name, takes = type(predicate).__name__ if is_module else _home(predicate).function, len(role.takes)
    try:
        parameters = list(parameters_of(predicate).values())
    except (TypeError, ValueError):
        fix = instead_of(predicate) or f"; pass a function f({', '.join(role.takes)})"
        raise ArgumentTypeError(f"{role.name[2:]} is a {type(predicate).__name__}{fix}") from None
    required = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for place, p in enumerate(required) if place < takes or p.default is p.empty]
    if len(required) != takes and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        got = ", ".join(p.name for p in parameters)
        first = [p.name for p in required[:1]]
        fix = (
            "A score function is given as `score=`: mf.compile(mask, score=...)."
            if not role.scores and first and first[0].startswith("score")
            else "A mask is given first: mf.compile(mask, score=...)."
            if role.scores and first == ["b"]
            else "Take all of them, also those you don't use; put run-time tensors after a `*`: "
            f"def packed({', '.join(role.takes)}, *, doc)."
        )
        raise ArgumentError(f"{name}: {role.name} takes ({', '.join(role.takes)}), got ({got}). {fix}")
    for place, parameter in enumerate(required):  # required: those of the role, by place
        meant = parameter.name.removesuffix("_idx")
        if meant in role.takes and meant != role.takes[place]:
            raise ArgumentError(
                f"{name}: {role.name} takes ({', '.join(role.takes)}), got ({', '.join(p.name for p in required)}), "
                f"where {parameter.name} would be {role.takes[place]}: arguments go by place. Put them in this order."
            )
    return tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)


def trace(
    predicate: Callable[..., Any],
    mask_args: Mapping[str, MaskArg] | None = None,
    sources: Sources | None = None,
    role: Role = MASK,
) -> Traced:
    """Run a function on symbols and return what it computes.

    Args:
        predicate: `f(b, h, q, kv, *, ...) -> bool`, or what its role says; plain Python over numbers and tensors.
        mask_args: a value for each keyword-only parameter. Tensors become tables by name: their contents, and
            unless the predicate asks for it their shape, do not enter the expression. Numbers become params.
        sources: captured values that are read again at each call; they fill slots by name. Others are kept.
        role: what the function is to be.

    Raises:
        MaskTraceError: something that can't be an expression, with file, line and the fix.
    """
    mask_args = mask_args or {}
    # In compiled code that makes a mask, dynamo would look into the very frames that a trace looks at.
    attempt = torch.compiler.disable(_attempt) if "torch._dynamo" in sys.modules else _attempt
    sources = Sources() if sources is None else sources
    try:
        traced: Traced = attempt(predicate, mask_args, sources, role)
    except RecursionError:
        traced = _deeper(lambda: attempt(predicate, mask_args, sources, role), _home(predicate))
    return traced


def _deeper(run: Callable[[], Traced], home: Source) -> Traced:
    """`run()` on a deeper stack: one level of a predicate's own calls takes several of ours."""
    with _stack:
        frames = sys.getrecursionlimit()
        sys.setrecursionlimit(_DEEPER * frames)
        try:
            return run()
        except RecursionError:
            raise MaskTraceError(
                f"{home}: calls functions within functions beyond Python's limit of {frames:,}. Let its recursion end, "
                "join masks by `&` and `|`, which don't nest, or trace it under a greater `sys.setrecursionlimit`."
            ) from None
        finally:
            sys.setrecursionlimit(frames)


class _Effort(NamedTuple):
    """How to trace: the types of numbers that are fixed; whether values decide conditions too, on many more paths."""

    fixed: tuple[type, ...] = ()
    use_values: bool = False


_QUICK: Final = (_Effort(), _Effort((float,)))  # Python may have to compute with floats
_THOROUGH: Final = (_Effort((float,), True), _Effort((int, float), True))


def _attempt(predicate: Callable[..., Any], mask_args: Mapping[str, MaskArg], sources: Sources, role: Role) -> Traced:
    kinds = set(map(type, mask_args.values()))
    for how in _QUICK if float in kinds else _QUICK[:1]:
        with contextlib.suppress(Exception, TooManyPaths):  # it may lie on a path that the values of constants rule out
            return _trace(predicate, mask_args, sources, role, how)
    has_integers = any(isinstance(value, int) for value in mask_args.values())
    for how in _THOROUGH:
        try:
            return _trace(predicate, mask_args, sources, role, how)
        except _Raises as raised:  # perhaps for other integers than these, as in `if n < 1: raise`
            if int in how.fixed or not has_integers:
                raise raised.refusal from raised.__cause__
    raise AssertionError("the last one returns or raises")


def _trace(
    predicate: Callable[..., Any], mask_args: Mapping[str, MaskArg], sources: Sources, role: Role, how: _Effort
) -> Traced:
    apart: set[CodeType] = set()
    while True:
        try:
            return _trace_once(predicate, mask_args, sources, role, how, apart)
        except Apart as found:
            apart.add(found.code)


def _trace_once(
    predicate: Callable[..., Any],
    mask_args: Mapping[str, MaskArg],
    sources: Sources,
    role: Role,
    how: _Effort,
    apart: set[CodeType],
) -> Traced:
    home = _home(predicate)
    calls = TorchCalls(torch_calls.call, torch_calls.method)
    limit = MAX_PATHS if how.use_values else FEW_PATHS
    tracer = Tracer(home, _trace_once.__code__, limit, how.use_values, calls, sources, apart, role)
    dtypes = (role.dtype if name == "score" else torch.int64 for name in role.takes)
    indices = [
        Symbol(tracer, tracer.builder.add(name, dtype=dtype)) for name, dtype in zip(role.takes, dtypes, strict=True)
    ]
    as_result = _as_score if role.scores else _as_truth
    keywords = {name: _argument(tracer, name, value, how.fixed) for name, value in mask_args.items()}
    lowered = lower(predicate)
    outer = active()
    ACTIVE.tracer = tracer
    try:
        with torch_calls.CapturedTensors(tracer):
            result = explore_all(tracer, lambda: as_result(tracer, lowered(*indices, **keywords)))
    except TooManyPaths:
        if not how.use_values:
            raise
        raise MaskTraceError(
            f"{home}: branches in more than {MAX_PATHS} ways. Return one expression built with `and`, `or` "
            "and `... if ... else ...` instead of `if` and `while` on q or kv, or look the outcome up in a tensor."
        ) from None
    except Unrepeatable:
        raise MaskTraceError(
            f"{home}: takes other branches when it is run again. A predicate may depend only on its arguments and on "
            "captured values that stay the same: no random numbers, counters or tensors made anew on each call."
        ) from None
    except RaisesInBranch as raised:
        assert raised.__cause__ is not None
        raise _Raises(tracer, raised.__cause__) from raised.__cause__
    finally:
        ACTIVE.tracer = outer
        tracer.tells = True
    expr = simplify(tracer.builder.finish(result.position))
    function = python_code(predicate)
    names = [tracer.label(place) or _table_name(table, place, function) for place, table in enumerate(tracer.tables)]
    return compact(expr, tracer.params, tracer.tables, names, frozenset(tracer.specialised))


def _argument(tracer: Tracer, name: str, value: object, fixed: Collection[type] = ()) -> object:
    """The stand-in for a keyword argument; values other than tensors and numbers are used as they are.

    Numbers of `fixed` types are too: the trace then serves these only.
    """
    if isinstance(value, Tensor):
        slot = tracer.table(value, Argument(name))
        return Table(tracer, slot, value, ()) if value.ndim else element(tracer, slot, value.dtype, ())
    if isinstance(value, numbers.Integral) and not is_bool(value) and int not in fixed:
        return Symbol(tracer, tracer.argument(Argument(name), int(value)))
    if type(value) is float and float not in fixed:
        return Symbol(tracer, tracer.argument(Argument(name), value))
    tracer.specialised.add(name)
    return value


class _Raises(Exception):
    """The predicate raises an error of its own in a branch."""

    def __init__(self, tracer: Tracer, error: BaseException) -> None:
        super().__init__()
        if isinstance(error, MaskTraceError):
            self.refusal = error
            return
        tracer.tells = True  # what is raised may show symbols
        source = tracer.code.source_of(error)
        code = f'"{source.text}" ' if source.text else ""
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self.refusal = MaskTraceError(
            f"{source}: {code}raises in a branch that some pairs may take ({said}). It can't raise for single pairs: "
            f"return {'score' if tracer.role.scores else 'False'} for those, and check tensors and arguments before."
        )


def _as_truth(tracer: Tracer, value: object) -> Symbol:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = symbol(tracer, value)
    if is_bool(value) or (isinstance(value, Symbol) and not value.dtype.is_floating_point):
        return truth(tracer, value)
    kind = str(value.dtype) if isinstance(value, Symbol) else type(value).__name__
    fix = "Is a `return` missing?" if value is None else "Compare, and return the truth: `return x > 0`."
    raise MaskTraceError(f"{tracer.home}: a mask predicate returns True or False, got {kind}. {fix}")


def _as_score(tracer: Tracer, value: object) -> Symbol:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = symbol(tracer, value)
    real = type(value) is float or (isinstance(value, Symbol) and value.dtype.is_floating_point)
    if not real:
        kind = str(value.dtype) if isinstance(value, Symbol) else type(value).__name__
        fix = "Is a `return` missing?" if value is None else "Return a float, such as `score + bias[q]`."
        if kind in ("bool", "torch.bool"):
            fix = "What returns a truth is a mask; a score that hides pairs returns float('-inf') for them."
        raise MaskTraceError(f"{tracer.home}: a score function returns a float, got {kind}. {fix}")
    found, dtype = symbol(tracer, value), tracer.role.dtype
    if found.dtype == dtype and not found.node.weak:
        return found
    return Symbol(tracer, tracer.record("cast", found.position, dtype=dtype, weak=False))


def compact(
    expr: Expr,
    params: Sequence[int | float | Argument],
    tables: Sequence[Tensor | Argument | View],
    names: Sequence[str],
    specialised: frozenset[str],
) -> Traced:
    """Drop the slots that an expression does not read, and number the others in the order of their first use."""
    used: dict[str, dict[int, int]] = {"param": {}, "lookup": {}}
    for node in expr.nodes:
        if node.op in used:
            used[node.op].setdefault(node.slot, len(used[node.op]))

    def renumber(node: Node) -> Node:
        if node.op not in used:
            return node
        return Node(node.op, node.args, node.dtype, node.weak, used[node.op][node.slot])

    return Traced(
        Expr(tuple(map(renumber, expr.nodes)), expr.sources),
        tuple(params[slot] for slot in used["param"]),
        tuple(tables[slot] for slot in used["lookup"]),
        tuple(names[slot] for slot in used["lookup"]),
        specialised,
    )


def _table_name(table: Any, place: int, function: FunctionType | None) -> str:
    if function is None:
        return f"table{place}"
    code = function.__code__
    captured = {name: _contents(cell) for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
    captured |= {name: function.__globals__.get(name) for name in code.co_names}
    return next((name for name, value in captured.items() if value is table), f"table{place}")


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _home(predicate: Any) -> Source:
    """Where the function that a predicate runs first is defined."""
    function = python_code(predicate)
    named = (getattr(it, "__name__", None) for it in (predicate, function))
    name = next(filter(None, named), type(predicate).__name__)
    if function is None:
        return Source(name, "<no source>", 0, "")
    return Source(name, function.__code__.co_filename, function.__code__.co_firstlineno, "")
