"""The code of a plain Python function -> the same code with `and`, `or`, `not`, chains and ternaries as calls.

The function's source is found by file and line and trusted only if it compiles to the very same bytecode; it is
rewritten as a syntax tree and compiled under the original file name and lines, so that tracebacks stay true:

    x and y             __mf_and(lambda: x, lambda: y)
    a <= b < c          __mf_chain(a, (__mf_le, lambda: b), (__mf_lt, lambda: c))
    x if c else y       __mf_if(c, lambda: x, lambda: y)
    x in y, not x       __mf_in(x, y), __mf_not(x)
    f(x)                __mf_call(f)(x)
    x is y              __mf_is(x, y)
    x.a = y, x[i] = y   __mf_written(x).a = y, __mf_written(x)[i] = y
    x += y              __mf_written(x); x += y
    nonlocal x          nonlocal x; __mf_rebinds(lambda: x)
    for x in y          for x in __mf_iterated(y)
    x - window          __mf_operate(__mf_sub, x, __mf_read("window", window))     where window is captured
    x - self.window     __mf_operate(__mf_sub, x, __mf_attribute(self, "window"))

The last two tell a captured number that only meets symbols from one that Python itself computes with.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import linecache
import operator
import symtable
from collections.abc import Iterable
from types import CodeType
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

HOOKS = tuple(
    f"__mf_{name}"
    for name in str.split("""
        and or not chain if in not_in call lt le gt ge eq ne is is_not operate read attribute add sub mul truediv
        written rebinds iterated
    """)
)  # free variables of rewritten code

_COMPARISONS: dict[type[ast.cmpop], str] = {
    **{ast.Lt: "__mf_lt", ast.LtE: "__mf_le", ast.Gt: "__mf_gt", ast.GtE: "__mf_ge", ast.Eq: "__mf_eq"},
    **{ast.NotEq: "__mf_ne", ast.Is: "__mf_is", ast.IsNot: "__mf_is_not"},
    **{ast.In: "__mf_in", ast.NotIn: "__mf_not_in"},
}
_NUMERIC = {ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "__mf_add",
    ast.Sub: "__mf_sub",
    ast.Mult: "__mf_mul",
    ast.Div: "__mf_truediv",
}
_FUTURE = functools.reduce(operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))
_TYPE_PARAMS = "type_params" in ast.FunctionDef._fields  # Python 3.12

_Function = ast.FunctionDef | ast.Lambda


class Rewritten(NamedTuple):
    """Rewritten code, and the names that it also reads elsewhere than as operands of `__mf_operate`."""

    code: CodeType
    elsewhere: frozenset[str]


_rewritten: WeakKeyDictionary[CodeType, dict[str, Rewritten | None]] = WeakKeyDictionary()


def rewritten(code: CodeType) -> Rewritten | None:
    """The rewritten code, or None where the source can't be had or is not this code's."""
    found = _rewritten.setdefault(code, {})  # equal code in another file has other lines to show
    if code.co_filename not in found:
        found[code.co_filename] = _rewrite(code)
    return found[code.co_filename]


def _rewrite(code: CodeType) -> Rewritten | None:
    if not set(HOOKS).isdisjoint(code.co_freevars):
        return None  # defined inside rewritten code, and so rewritten with it
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename))
    try:
        module = _module(source)
        for node in module.functions.get((code.co_name, code.co_firstlineno), ()):
            if _same_code(_compile(node, code, module.imported), code):
                rewriter = _Rewriter(_bound(code))
                new = _compile(cast("_Function", rewriter.generic_visit(copy.deepcopy(node))), code, module.imported)
                return new and Rewritten(new, frozenset(rewriter.elsewhere))
    except (SyntaxError, ValueError, RecursionError):  # the last: operators nested deeper than Python's own stack
        return None
    return None


class _Module(NamedTuple):
    """A source: functions and lambdas by name and first line, and what its own scope imports."""

    functions: dict[tuple[str, int], list[_Function]]
    imported: tuple[str, ...]  # Python compiles calls of their attributes in another way


@functools.lru_cache(maxsize=64)
def _module(source: str) -> _Module:
    found: dict[tuple[str, int], list[_Function]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Lambda):
            found.setdefault(("<lambda>", node.lineno), []).append(node)
        elif isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.setdefault((node.name, first), []).append(node)
    names = symtable.symtable(source, "<source>", "exec").get_symbols()
    return _Module(found, tuple(name.get_name() for name in names if name.is_imported()))


def _compile(node: _Function, like: CodeType, imported: tuple[str, ...]) -> CodeType | None:
    """Compile one function as if it stood where `like` stands, with the same free variables."""
    parameters = ast.arguments([], [ast.arg(name) for name in (*like.co_freevars, *HOOKS)], None, [], [], None, [])
    body: ast.stmt = node if isinstance(node, ast.FunctionDef) else ast.Expr(node)
    factory = ast.FunctionDef("factory", parameters, [body], [])
    if _TYPE_PARAMS:
        factory.type_params = []  # type: ignore[attr-defined,unused-ignore]
    imports = [ast.Import([ast.alias(name)]) for name in imported]
    module = ast.fix_missing_locations(ast.Module([*imports, factory], []))
    compiled = compile(module, like.co_filename, "exec", flags=like.co_flags & _FUTURE, dont_inherit=True)
    (outer,) = _inner_code(compiled.co_consts, "factory")
    return next(iter(_inner_code(outer.co_consts, like.co_name)), None)


def _inner_code(constants: Iterable[object], name: str) -> list[CodeType]:
    return [const for const in constants if isinstance(const, CodeType) and const.co_name == name]


def _same_code(x: CodeType | None, y: CodeType) -> bool:
    if x is None or (x.co_code, x.co_names, x.co_varnames) != (y.co_code, y.co_names, y.co_varnames):
        return False
    if len(x.co_consts) != len(y.co_consts) or x.co_freevars != y.co_freevars:
        return False
    pairs = zip(x.co_consts, y.co_consts, strict=True)
    return all(_same_code(a, b) if isinstance(b, CodeType) else repr(a) == repr(b) for a, b in pairs)


def _bound(code: CodeType) -> frozenset[str]:
    """Every name that a function, or one within it, binds: they are not read from outside."""
    inner = (_bound(const) for const in code.co_consts if isinstance(const, CodeType))
    return frozenset((*code.co_varnames, *code.co_cellvars)).union(*inner)


class _Rewriter(ast.NodeTransformer):
    """Replaces what Python decides by truth values with calls that can record, and reads of captured operands.

    It also tells of what is changed.
    """

    def __init__(self, bound: frozenset[str]) -> None:
        self.elsewhere: set[str] = set()
        self._bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        self.elsewhere.add(node.id)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):  # getattr(self, "window")
            self.elsewhere.add(node.value)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        name = _ARITHMETIC.get(type(node.op))
        if name is None or _binds(node):
            return self.generic_visit(node)
        return self._operated(node, name, node.left, node.right)

    def _operated(self, node: ast.AST, name: str, *operands: ast.expr) -> ast.AST:
        """An operation that is told which operands are captured; as it is where none can be."""
        captured = [self._operand(operand) for operand in operands]
        if not any(captured):
            return self.generic_visit(node)
        read = (new or self.visit(old) for new, old in zip(captured, operands, strict=True))
        return self._call(node, "__mf_operate", ast.Name(name, ast.Load()), *read)

    def _operand(self, node: ast.expr) -> ast.expr | None:
        """What to read a captured number by; None for any other operand."""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in self._bound:
            return self._call(node, "__mf_read", ast.Constant(node.id), node)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not node.attr.startswith("__"):
            return self._call(node, "__mf_attribute", self.visit(node.value), ast.Constant(node.attr))
        return None

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if _binds(node):
            return self.generic_visit(node)
        name = "__mf_and" if isinstance(node.op, ast.And) else "__mf_or"
        return self._call(node, name, *(self._thunk(value) for value in node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._call(node, "__mf_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if _binds(node):
            return self.generic_visit(node)
        (name, *others), numeric = [_COMPARISONS[type(op)] for op in node.ops], set(map(type, node.ops)) <= _NUMERIC
        if not others and numeric:
            return self._operated(node, name, node.left, *node.comparators)
        left, *rest = ((numeric and self._operand(x)) or self.visit(x) for x in (node.left, *node.comparators))
        if not others:
            return self._call(node, name, left, *rest)
        links = (
            ast.Tuple([ast.Name(name, ast.Load()), self._lambda(comparator, operand)], ast.Load())
            for name, comparator, operand in zip((name, *others), node.comparators, rest, strict=True)
        )
        return self._call(node, "__mf_chain", left, *links)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        if _binds(node):
            return self.generic_visit(node)
        return self._call(node, "__mf_if", self.visit(node.test), self._thunk(node.body), self._thunk(node.orelse))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and (node.func.id == "super" or node.func.id.startswith("__mf_")):
            return node
        node.func = self._call(node.func, "__mf_call", node.func)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.ctx, ast.Load):
            self.elsewhere.add(node.attr)
        return self._stored(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return self._stored(node)

    def _stored(self, node: ast.Attribute | ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            node.value = self._call(node.value, "__mf_written", node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        target = ast.Name(node.target.id, ast.Load())
        return [ast.copy_location(ast.Expr(self._call(node, "__mf_written", target)), node), node]

    def visit_Global(self, node: ast.Global) -> list[ast.stmt]:
        self.elsewhere.update(node.names)
        return [node, self._rebinds(node, ast.Constant(None))]

    def visit_Nonlocal(self, node: ast.Nonlocal) -> list[ast.stmt]:
        self.elsewhere.update(node.names)
        names: list[ast.expr] = [ast.Name(name, ast.Load()) for name in node.names]
        return [node, self._rebinds(node, ast.Tuple(names, ast.Load()))]

    def _rebinds(self, node: ast.stmt, names: ast.expr) -> ast.stmt:
        """Tell of outer variables: a lambda that reads them has their cells."""
        return ast.copy_location(ast.Expr(self._call(node, "__mf_rebinds", self._lambda(node, names))), node)

    def visit_For(self, node: ast.For | ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.iter = self._call(node.iter, "__mf_iterated", node.iter)
        return node

    visit_comprehension = visit_For

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """It stays as it is: class bodies have scopes that a lambda can't see."""
        for child in ast.walk(node):
            if isinstance(child, (ast.Name, ast.Attribute)):
                self.elsewhere.add(child.id if isinstance(child, ast.Name) else child.attr)
        return node

    def _thunk(self, value: ast.expr) -> ast.expr:
        return self._lambda(value, self.visit(value))

    def _lambda(self, at: ast.AST, body: ast.expr) -> ast.expr:
        empty = ast.arguments([], [], None, [], [], None, [])
        return ast.copy_location(ast.Lambda(empty, body), at)

    def _call(self, at: ast.AST, name: str, *args: ast.expr) -> ast.Call:
        return ast.copy_location(
            ast.Call(ast.Name(name, ast.Load()), list(args), []), at
        )  # its parts take over its place


def _binds(node: ast.AST) -> bool:
    """Whether moving this expression into a lambda would change what it means."""
    return any(isinstance(child, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)) for child in ast.walk(node))
