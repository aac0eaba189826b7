"""An expression -> the straight lines across which its truth may turn, if it compares nothing but q, kv and q - kv.

Causal attention, windows, prefixes, global tokens and whatever joins them: what holds of a pair then depends only on
which side of a few rows, columns and diagonals it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

import torch

from maskflash.expr.nodes import Expr, Node, Scalar, operand_dtype
from maskflash.expr.ops import COMPARISONS

_MOST_FORMS: Final = 8  # that one number may take: |q - kv| is q - kv or kv - q

_Form = tuple[int, int, int]  # of q, of kv, and a constant
_Forms = tuple[_Form, ...]


@dataclass(frozen=True, slots=True)
class Cuts:
    """Truth is the same for all pairs between neighbouring cuts.

    Attributes:
        rows: q at which it may turn: it may differ between q - 1 and q.
        columns: kv, likewise.
        diagonals: q - kv, likewise.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    diagonals: tuple[int, ...]


def find_cuts(expr: Expr, params: tuple[Scalar, ...]) -> Cuts | None:
    """Where an expression's truth may turn, in exact integers; None where it compares anything else.

    Args:
        expr: the mask.
        params: values of its params.
    """
    forms: list[_Forms] = []  # of each node; none for a bool
    signs: set[_Form] = set()  # truth may turn where one of them changes its sign
    for node in expr.nodes:
        found = _forms(node, [forms[arg] for arg in node.args], params, signs)
        if found is None and not _is_logic(node, [expr.nodes[arg] for arg in node.args]):
            if node.op not in COMPARISONS or not all(forms[arg] for arg in node.args):
                return None
            if operand_dtype(node, [expr.nodes[arg] for arg in node.args]) != torch.int64:
                return None
            signs.update(_minus(x, y) for x, y in product(*(forms[arg] for arg in node.args)))
        if found is not None and len(found) > _MOST_FORMS:
            return None
        forms.append(found or ())
    rows: set[int] = set()
    columns: set[int] = set()
    diagonals: set[int] = set()
    for of_q, of_kv, constant in signs:
        if of_q == of_kv == 0:
            continue
        if of_q and of_kv and of_q != -of_kv:
            return None
        cuts, factor = (columns, of_kv) if of_q == 0 else (rows if of_kv == 0 else diagonals, of_q)
        cuts |= {-(constant // factor), -constant // factor + 1}  # ceil and floor + 1 of the root
    return Cuts(*(tuple(sorted(cuts)) for cuts in (rows, columns, diagonals)))


def _forms(node: Node, args: list[_Forms], params: tuple[Scalar, ...], signs: set[_Form]) -> _Forms | None:
    """What a number may be, a linear form in each part of the plane; None where it is no number, or no such one."""
    if node.dtype != torch.int64:
        return None
    match node.op, args:
        case "q", _:
            return ((1, 0, 0),)
        case "kv", _:
            return ((0, 1, 0),)
        case "const" | "param", _:
            value = node.number(params)
            return ((0, 0, value),) if isinstance(value, int) else None
        case _ if not all(args[1:] if node.op == "select" else args):
            return None
        case "cast", [x]:
            return x
        case "neg", [x]:
            return tuple(_times(-1, form) for form in x)
        case "abs", [x]:
            signs.update(x)
            return _once([*x, *(_times(-1, form) for form in x)])
        case "add", [x, y]:
            return _once([_plus(a, b) for a, b in product(x, y)])
        case "sub", [x, y]:
            return _once([_minus(a, b) for a, b in product(x, y)])
        case "mul", [x, y]:
            x, y = (x, y) if all(_is_constant(form) for form in x) else (y, x)
            if all(_is_constant(form) for form in x):
                return _once([_times(a[2], b) for a, b in product(x, y)])
        case "min" | "max", [x, y]:
            signs.update(_minus(a, b) for a, b in product(x, y))
            return _once([*x, *y])
        case "select", [_, x, y]:
            return _once([*x, *y])
    return None


def _is_logic(node: Node, args: list[Node]) -> bool:
    """Whether a node's truth follows from the truth of its operands."""
    return node.dtype == torch.bool and all(arg.dtype == torch.bool for arg in args) and node.op != "lookup"


def _once(forms: list[_Form]) -> _Forms:
    return tuple(dict.fromkeys(forms))


def _is_constant(form: _Form) -> bool:
    return form[:2] == (0, 0)


def _times(factor: int, form: _Form) -> _Form:
    return factor * form[0], factor * form[1], factor * form[2]


def _plus(x: _Form, y: _Form) -> _Form:
    return x[0] + y[0], x[1] + y[1], x[2] + y[2]


def _minus(x: _Form, y: _Form) -> _Form:
    return _plus(x, _times(-1, y))
