"""A plain Python function -> the same function with `and`, `or`, `not`, chains and ternaries as calls that record.

Python gives no hook for its short-circuit operators: a symbol can only see its truth asked for, which forks execution.
Where the function's source is found (and compiles to the very same bytecode, so that it is the right source), its
syntax tree is rewritten and compiled under the original file name and lines; elsewhere the function stays as it is
and forks. The rewritten code calls `and_`, `or_`, ... below, which behave as Python does on concrete values.
"""

from __future__ import annotations

import __future__

import ast
import builtins
import copy
import functools
import linecache
import operator
import threading
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

from .paths import CannotMerge
from .symbols import Symbol, Table, Tracer

ACTIVE = threading.local()  # .tracer: the trace running in this thread

_FUTURE = functools.reduce(operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))
_lowered: WeakKeyDictionary[CodeType, CodeType | None] = WeakKeyDictionary()


def lower(function: FunctionType) -> FunctionType:
    """The function rewritten to record, sharing globals, defaults and closure cells with the original."""
    code = function.__code__
    if code not in _lowered:
        _lowered[code] = _lower_code(code)
    new = _lowered[code]
    if new is None:
        return function
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells.get(name) or CellType(_RUNTIME[name]) for name in new.co_freevars)
    lowered = FunctionType(new, function.__globals__, function.__name__, function.__defaults__, closure)
    lowered.__kwdefaults__ = function.__kwdefaults__
    return lowered


# What the rewritten code calls


def and_(*operands: Callable[[], Any]) -> Any:
    """`x and y and ...`"""
    value = operands[0]()
    for operand in operands[1:]:
        value = _both(value, operand)
    return value


def or_(*operands: Callable[[], Any]) -> Any:
    """`x or y or ...`"""
    value = operands[0]()
    for operand in operands[1:]:
        value = _either(value, operand)
    return value


def not_(value: Any) -> Any:
    """`not x`"""
    return value.tracer.apply("not", value.tracer.truth(value)) if _is_symbolic(value) else not value


def chain(left: Any, *links: tuple[Callable[[Any, Any], Any], Callable[[], Any]]) -> Any:
    """`a < b < c`: each operand is evaluated once, and only if the links before it hold."""
    result: Any = True
    for compare, operand in links:
        if not _is_symbolic(result) and not result:
            return result
        right = _explore(result, operand)
        test, left = compare(left, right), right
        result = test if result is True else _both(result, lambda test=test: test)
    return result


def if_(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`x if c else y`"""
    if not _is_symbolic(condition):
        return then() if condition else otherwise()
    tracer: Tracer = condition.tracer
    truth = tracer.truth(condition)
    try:
        return tracer.merge(truth.position, tracer.explore(then), tracer.explore(otherwise))
    except CannotMerge:
        return then() if truth else otherwise()


def in_(value: Any, container: Any) -> Any:
    """`x in container`, of a tuple, list or range."""
    if not _is_symbolic(value):
        return value in container
    if isinstance(container, range):
        low, high = (container[0], container[-1]) if container else (0, -1)
        low, high = min(low, high), max(low, high) if container else -1
        inside = and_(lambda: value >= low, lambda: value <= high)
        step = abs(container.step)
        return inside if step == 1 else and_(lambda: inside, lambda: (value - low) % step == 0)
    if isinstance(container, (tuple, list)):
        return any_(value == item for item in container)
    return value in container


def any_(items: Iterable[Any]) -> Any:
    """`any(...)`"""
    result: Any = False
    for item in items:
        result = _either(result, lambda item=item: _truth(item))
        if result is True:
            break
    return result


def all_(items: Iterable[Any]) -> Any:
    """`all(...)`"""
    result: Any = True
    for item in items:
        result = _both(result, lambda item=item: _truth(item))
        if result is False:
            break
    return result


def call(function: Any) -> Any:
    """What to call instead of `function`: helpers are rewritten too, and their branches merged where they return."""
    if isinstance(function, type) or not callable(function):
        return _BUILTINS.get(function, function) if function is bool else function
    if isinstance(function, MethodType) and isinstance(function.__func__, FunctionType):
        return functools.partial(call(function.__func__), function.__self__)
    if not isinstance(function, FunctionType):
        return _BUILTINS.get(function, function) if _hashable(function) else function
    module = function.__globals__.get("__name__", "")
    generator = function.__code__.co_flags & 0x2A0  # generator, coroutine, async generator
    foreign = module.startswith(("torch", "numpy", "maskflash.expr")) and not module.startswith("torch.nn.attention")
    if generator or foreign or getattr(ACTIVE, "tracer", None) is None:
        return function
    lowered = lower(function)

    @functools.wraps(function)
    def explored(*args: Any, **kwargs: Any) -> Any:
        try:
            return ACTIVE.tracer.explore(lambda: lowered(*args, **kwargs))
        except CannotMerge:
            return lowered(*args, **kwargs)

    return explored


def _min(*args: Any, **kwargs: Any) -> Any:
    return _extreme("min", builtins.min, args, kwargs)


def _max(*args: Any, **kwargs: Any) -> Any:
    return _extreme("max", builtins.max, args, kwargs)


def _extreme(op: str, builtin: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    items = list(args[0]) if len(args) == 1 and not _is_symbolic(args[0]) else list(args)
    tracer = next((item.tracer for item in items if _is_symbolic(item)), None)
    if tracer is None or kwargs:
        return builtin(items, **kwargs)
    return functools.reduce(lambda x, y: tracer.apply(op, x, y), items)


def _truth(value: Any) -> Any:
    return value.tracer.truth(value) if _is_symbolic(value) else bool(value)


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, Symbol) or (isinstance(value, Table) and value.ndim == 0)


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def _explore(before: Any, operand: Callable[[], Any]) -> Any:
    """An operand that is evaluated only if `before` allows: a branch inside it must not escape that guard."""
    return before.tracer.explore(operand) if _is_symbolic(before) else operand()


def _both(x: Any, operand: Callable[[], Any]) -> Any:
    return _connect("and", x, operand)


def _either(x: Any, operand: Callable[[], Any]) -> Any:
    return _connect("or", x, operand)


def _connect(op: str, x: Any, operand: Callable[[], Any]) -> Any:
    """`x and y` or `x or y`, with Python's values: one of the operands, not only a truth."""
    if not _is_symbolic(x):
        return operand() if bool(x) == (op == "and") else x
    tracer: Tracer = x.tracer
    x = tracer.symbol(x)
    try:
        y = tracer.explore(operand)
        is_truth = isinstance(y, bool) or (_is_symbolic(y) and y.dtype == tracer.truth(x).dtype)
        if x.node.dtype == tracer.truth(x).dtype and is_truth:
            return tracer.apply(op, x, y)
        truth = tracer.truth(x).position
        return tracer.merge(truth, y, x) if op == "and" else tracer.merge(truth, x, y)
    except CannotMerge:
        return operand() if bool(x) == (op == "and") else x


_RUNTIME: dict[str, Any] = {
    **{"__mf_and": and_, "__mf_or": or_, "__mf_not": not_, "__mf_chain": chain, "__mf_if": if_},
    **{"__mf_in": in_, "__mf_not_in": lambda x, container: not_(in_(x, container)), "__mf_call": call},
    **{f"__mf_{name}": getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "is_", "is_not")},
}
_BUILTINS: dict[Any, Any] = {any: any_, all: all_, min: _min, max: _max, bool: _truth}


# Rewriting


def _lower_code(code: CodeType) -> CodeType | None:
    """The rewritten code object, or None where the source can't be had or doesn't match."""
    filename = code.co_filename
    linecache.checkcache(filename)
    source = "".join(linecache.getlines(filename))
    try:
        tree = _parse(source) if source else None
    except (SyntaxError, ValueError, RecursionError):
        tree = None
    if tree is None:
        return None
    for node in tree.get((code.co_name, code.co_firstlineno), ()):
        if _same_code(_compile(node, code), code):
            return _compile(_Rewrite().rewrite(node), code)
    return None


@functools.lru_cache(maxsize=64)
def _parse(source: str) -> dict[tuple[str, int], list[ast.FunctionDef | ast.Lambda]]:
    """Functions and lambdas of a file by name and first line."""
    found: dict[tuple[str, int], list[ast.FunctionDef | ast.Lambda]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Lambda):
            found.setdefault(("<lambda>", node.lineno), []).append(node)
        elif isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.setdefault((node.name, first), []).append(node)
    return found


def _compile(node: ast.FunctionDef | ast.Lambda, like: CodeType) -> CodeType | None:
    """Compile one function as if it stood where `like` stands, with the same free variables."""
    names = [*like.co_freevars, *_RUNTIME]
    parameters = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    body: ast.stmt = node if isinstance(node, ast.FunctionDef) else ast.Expr(node)
    factory = ast.FunctionDef("factory", parameters, [body], [], **({"type_params": []} if _TYPE_PARAMS else {}))
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = like.co_flags & _FUTURE
    compiled = compile(module, like.co_filename, "exec", flags=flags, dont_inherit=True)
    outer = next(const for const in compiled.co_consts if isinstance(const, CodeType))
    inner = (const for const in outer.co_consts if isinstance(const, CodeType) and const.co_name == like.co_name)
    return next(inner, None)


_TYPE_PARAMS = "type_params" in ast.FunctionDef._fields


def _same_code(x: CodeType | None, y: CodeType) -> bool:
    if x is None or (x.co_code, x.co_names, x.co_varnames) != (y.co_code, y.co_names, y.co_varnames):
        return False
    if len(x.co_consts) != len(y.co_consts) or x.co_freevars != y.co_freevars:
        return False
    pairs = zip(x.co_consts, y.co_consts, strict=True)
    return all(_same_code(a, b) if isinstance(b, CodeType) else repr(a) == repr(b) for a, b in pairs)


class _Rewrite(ast.NodeTransformer):
    """Replaces what Python decides by truth values with calls that can record."""

    def rewrite(self, node: ast.FunctionDef | ast.Lambda) -> ast.FunctionDef | ast.Lambda:
        return cast("ast.FunctionDef | ast.Lambda", self.generic_visit(copy.deepcopy(node)))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if _binds(node):
            return node
        name = "__mf_and" if isinstance(node.op, ast.And) else "__mf_or"
        return self._call(node, name, *(self._thunk(value) for value in node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._call(node, "__mf_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        single = len(node.ops) == 1
        if _binds(node) or (single and not isinstance(node.ops[0], (ast.In, ast.NotIn))):
            return self.generic_visit(node)
        names = [_COMPARISONS[type(op)] for op in node.ops]
        if single:
            self.generic_visit(node)
            return self._call(node, names[0], node.left, node.comparators[0])
        links: list[ast.expr] = []
        for name, comparator in zip(names, node.comparators, strict=True):
            pair = ast.Tuple([ast.Name(name, ast.Load()), self._thunk(comparator)], ast.Load())
            links.append(ast.copy_location(pair, comparator))
        return self._call(node, "__mf_chain", self.visit(node.left), *links)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        if _binds(node):
            return node
        return self._call(node, "__mf_if", self.visit(node.test), self._thunk(node.body), self._thunk(node.orelse))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and (node.func.id == "super" or node.func.id.startswith("__mf_")):
            return node
        node.func = self._call(node.func, "__mf_call", node.func)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node  # class bodies have scopes that a lambda can't see

    def _thunk(self, value: ast.expr) -> ast.expr:
        empty = ast.arguments([], [], None, [], [], None, [])
        return ast.copy_location(ast.Lambda(empty, self.visit(value)), value)

    def _call(self, at: ast.AST, name: str, *args: ast.expr) -> ast.Call:
        function = ast.copy_location(ast.Name(name, ast.Load()), at)
        return ast.copy_location(ast.Call(function, list(args), []), at)


_COMPARISONS: dict[type[ast.cmpop], str] = {
    **{ast.Lt: "__mf_lt", ast.LtE: "__mf_le", ast.Gt: "__mf_gt", ast.GtE: "__mf_ge", ast.Eq: "__mf_eq"},
    **{ast.NotEq: "__mf_ne", ast.Is: "__mf_is_", ast.IsNot: "__mf_is_not"},
    **{ast.In: "__mf_in", ast.NotIn: "__mf_not_in"},
}


def _binds(node: ast.AST) -> bool:
    """Whether moving this expression into a lambda would change what it means."""
    return any(isinstance(child, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)) for child in ast.walk(node))

