"""A mask that is comparisons joined by `and` -> the rows that a column j sees, as one interval, for people."""

from __future__ import annotations

import re

from maskflash.analysis.ways.separate import Separated, Threshold
from maskflash.expr.format import format_expr
from maskflash.expr.nodes import Expr, Node


def visible_rows(separated: Separated, params: tuple[object, ...], tables: tuple[str, ...]) -> str | None:
    """The interval, such as "[j, first(doc[q] > doc[j]))"; None where the mask is no such interval.

    first(...) is the first row q of which it holds, or q_len. What follows "where" narrows the interval down.

    Args:
        separated: the mask, taken apart. Rows' values must ascend with the row.
        params: the values of its params.
        tables: what the user calls its tables.
    """
    if not separated.joined or any(threshold.hides is None for threshold in separated.thresholds):
        return None
    begins, ends = (
        list(dict.fromkeys(_row(t, params, tables) for t in separated.thresholds if t.hides == side))
        for side in ("above", "below")
    )
    if not begins + ends:
        return None
    where = [_text(condition, params, tables) for condition in (*separated.switches, *separated.conditions)]
    interval = f"[{_one('max', begins, '0')}, {_one('min', ends, 'q_len')})"
    return f"{interval} where {' and '.join(where)}" if where else interval


def _one(pick: str, bounds: list[str], nothing: str) -> str:
    return bounds[0] if len(bounds) == 1 else f"{pick}({', '.join(bounds)})" if bounds else nothing


def _row(threshold: Threshold, params: tuple[object, ...], tables: tuple[str, ...]) -> str:
    """The row at which a comparison turns."""
    columns = _text(threshold.columns, params, tables).replace(" - -", " + ")
    shift = _shift(threshold.rows, params)
    if shift is None:
        sign = ">" if threshold.after else ">="
        return f"first({_text(threshold.rows, params, tables)} {sign} {columns})"
    distance = int(threshold.after) - shift
    base, _, own = columns.rpartition(" + ")
    if base and own.isdigit():  # j + 4 + 1 is j + 5
        columns, distance = base, distance + int(own)
    return f"{columns} + {distance}" if distance > 0 else f"{columns} - {-distance}" if distance < 0 else columns


def _shift(rows: Expr, params: tuple[object, ...]) -> int | None:
    """How far the rows' values are from the rows themselves; None where they are anything else."""
    position, shift = len(rows.nodes) - 1, 0
    while (node := rows.nodes[position]).op in ("add", "sub"):
        numbers = [_number(rows.nodes[arg], params) for arg in node.args]
        if numbers[1] is not None:
            shift += numbers[1] if node.op == "add" else -numbers[1]
            position = node.args[0]
        elif numbers[0] is not None and node.op == "add":
            shift += numbers[0]
            position = node.args[1]
        else:
            return None
    return shift if node.op == "q" else None


def _number(node: Node, params: tuple[object, ...]) -> int | None:
    value = node.number(params) if node.op in ("param", "const") else None
    return value if isinstance(value, int) else None


def _text(expr: Expr, params: tuple[object, ...], tables: tuple[str, ...]) -> str:
    """An expression of the column j, without the conversion that a comparison asks for."""
    root = expr.nodes[-1]
    if root.op == "cast" and not root.dtype.is_floating_point and root.args == (len(expr.nodes) - 2,):
        expr = Expr(expr.nodes[:-1])
    names = tables if len(tables) >= expr.slots("lookup") else ()
    return re.sub(r"\bkv\b", "j", "; ".join(format_expr(expr, params, names).split("\n")))
