"""An expression -> an equal, smaller one, by a table of local rules applied once to each node, operands first.

Only constants of the structure are folded: a param's value may change from call to call, so nothing here looks at it.
Dropping an operand drops its faults too; rules therefore drop only what cannot fault, or what a guard already excludes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from maskflash.expr.nodes import OPPOSITES, Builder, Expr, Node

_FAULTS = frozenset(("lookup", "floordiv", "mod", "truncdiv", "fmod"))


def simplify(expr: Expr) -> Expr:
    """The expression rewritten to normal form; the mask it describes is the same, pair by pair."""
    builder = Builder()
    faultless: dict[int, bool] = {}
    places: list[int] = []
    for position, node in enumerate(expr.nodes):
        args = [places[arg] for arg in node.args]
        place = _rewrite(builder, node, args, faultless)
        if place is not None:
            place = _as_kind(builder, place, node, faultless)
        else:
            place = builder.add(
                node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=expr.source(position)
            )
        safe = node.op not in _FAULTS or (node.op == "lookup" and not node.args)
        faultless.setdefault(place, safe and all(faultless[arg] for arg in builder.nodes[place].args))
        places.append(place)
    return builder.finish(places[-1])


def _rewrite(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
    """The place of an equal node, or None if no rule applies."""
    rule = _RULES.get(node.op)
    found = rule(builder, node, args, faultless) if rule else None
    if found is not None:
        faultless.setdefault(found, all(faultless.get(arg, True) for arg in builder.nodes[found].args))
    return found


def _as_kind(builder: Builder, place: int, node: Node, faultless: dict[int, bool]) -> int:
    """An equal node of this one's dtype and weakness, on which its users' promotion rests (but a truth's hardly)."""
    found = builder.nodes[place]
    if found.dtype == node.dtype and (found.weak == node.weak or node.dtype == torch.bool):
        return place
    if found.op == "const" and found.dtype == node.dtype:
        kind = builder.add("const", dtype=node.dtype, weak=node.weak, value=found.value)
    else:
        kind = builder.add("cast", place, dtype=node.dtype, weak=node.weak)
    faultless.setdefault(kind, faultless[place])
    return kind


def _truth(builder: Builder, place: int) -> bool | None:
    """The value of a constant, as a truth."""
    node = builder.nodes[place]
    return bool(node.value) if node.op == "const" else None


def _not(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
    inner = builder.nodes[args[0]]
    if inner.op == "const":  # not True -> False
        return builder.const(not inner.value)
    if inner.op == "not":  # not not x -> x
        return inner.args[0]
    operands = [builder.nodes[arg] for arg in inner.args]
    whole = not any(operand.dtype.is_floating_point for operand in operands)
    if inner.op in OPPOSITES and (whole or inner.op in ("eq", "ne")):  # not x < y -> x >= y, unless NaN could be there
        return builder.add(OPPOSITES[inner.op], *inner.args, source=builder.sources[args[0]])
    return None


def _connective(absorbing: bool) -> Callable[..., int | None]:
    """Rules of `and` (absorbing False) and `or` (absorbing True), guarded or not."""

    def rule(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
        if node.dtype != torch.bool:
            return None
        x, y = args
        first, second = _truth(builder, x), _truth(builder, y)
        guarded = node.op in ("and", "or")
        if x == y:  # x and x -> x
            return x
        if first is absorbing and (guarded or faultless[y]):  # False and x -> False
            return x
        if first is (not absorbing):  # True and x -> x
            return y
        if second is (not absorbing):  # x and True -> x
            return x
        if second is absorbing and faultless[x]:  # x and False -> False
            return y
        return None

    return rule


def _xor(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
    if node.dtype != torch.bool:
        return None
    for x, y in (args, args[::-1]):
        known = _truth(builder, y)
        if known is not None:  # x ^ True -> not x, x ^ False -> x
            return _not_of(builder, x, faultless) if known else x
    return None


def _select(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
    condition, x, y = args
    known = _truth(builder, condition)
    kinds = (builder.nodes[x], builder.nodes[y])
    if known is not None:  # select(True, x, y) -> x
        return x if known else y
    if x == y and faultless[condition]:  # select(c, x, x) -> x
        return x
    inner = builder.nodes[condition]
    if inner.op == "not":  # select(not c, x, y) -> select(c, y, x)
        return builder.add("select", inner.args[0], y, x, dtype=node.dtype, weak=node.weak)
    if any(kind.dtype != torch.bool for kind in kinds):
        return None
    first, second = _truth(builder, x), _truth(builder, y)
    if y == condition:  # select(c, x, c) -> c and x
        return builder.add("and", condition, x)
    if x == condition:  # select(c, c, y) -> c or y
        return builder.add("or", condition, y)
    if first is True and second is False:  # select(c, True, False) -> c
        return condition
    if first is False and second is True:
        return _not_of(builder, condition, faultless)
    if first is True:  # select(c, True, y) -> c or y
        return builder.add("or", condition, y)
    if second is False:  # select(c, x, False) -> c and x
        return builder.add("and", condition, x)
    if first is False:  # select(c, False, y) -> not c and y
        return builder.add("and", _not_of(builder, condition, faultless), y)
    if second is True:  # select(c, x, True) -> not c or x
        return builder.add("or", _not_of(builder, condition, faultless), x)
    return None


def _not_of(builder: Builder, place: int, faultless: dict[int, bool]) -> int:
    found = _not(builder, Node("not", (place,), torch.bool), [place], faultless)
    negated = builder.add("not", place) if found is None else found
    faultless.setdefault(negated, faultless[place])
    return negated


def _same(outcome: bool) -> Callable[..., int | None]:
    """X == x -> True, for integers that can't fault (a float may be NaN)."""

    def rule(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
        same = args[0] == args[1] and not builder.nodes[args[0]].dtype.is_floating_point
        return builder.const(outcome) if same and faultless[args[0]] else None

    return rule


def _cast(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
    inner = builder.nodes[args[0]]
    if inner.dtype == node.dtype and inner.weak == node.weak:
        return args[0]
    if inner.op == "const" and node.dtype == torch.bool:
        return builder.const(bool(inner.value))
    return None


def _aligned(builder: Builder, node: Node, args: list[int], faultless: dict[int, bool]) -> int | None:
    """X - x % n -> x // n * n, for a constant n: bounds don't see that the two x are one."""
    rest = builder.nodes[args[1]]
    if rest.op != "mod" or rest.args[0] != args[0] or node.dtype != torch.int64 or rest.dtype != torch.int64:
        return None
    if not _truth(builder, rest.args[1]):
        return None
    quotient = builder.add("floordiv", *rest.args)
    faultless.setdefault(quotient, faultless[args[0]])
    return builder.add("mul", quotient, rest.args[1])


_RULES: dict[str, Callable[..., int | None]] = {
    "not": _not,
    "and": _connective(False),
    "or": _connective(True),
    "bitand": _connective(False),
    "bitor": _connective(True),
    "bitxor": _xor,
    "bitnot": lambda builder, node, args, faultless: (
        _not(builder, node, args, faultless) if node.dtype == torch.bool else None
    ),
    "select": _select,
    "cast": _cast,
    "sub": _aligned,
    **dict.fromkeys(("eq", "le", "ge"), _same(True)),
    **dict.fromkeys(("ne", "lt", "gt"), _same(False)),
}
