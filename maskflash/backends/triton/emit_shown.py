"""A mask -> statements that find which of 64 rows see a column, as the bits of one number: no look at each pair.

    q >= start[kv] and q < stop[kv]         rows_from(t) has the bits of the rows t, t + 1, ... of the 64
      w4 = rows_from(start - q_first)
      w6 = ~rows_from(stop - q_first)       a thread computes them for its columns, once for all rows;
      w7 = w4 & w6                          threads that have pairs of a column then test a bit for each

This serves comparisons of sums in which q stands once, with whatever depends on columns alone; and what logic makes of
them. Look-ups by q, and arithmetic that mixes q with columns otherwise, have no such form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from maskflash.backends.triton.emit import Writer
from maskflash.backends.triton.signature import TableKind
from maskflash.expr.nodes import Expr, operand_dtype
from maskflash.expr.ops import COMPARISONS, ON_TRUTH

_MIRRORED: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_JOINED: Final = {"and": "&", "bitand": "&", "or": "|", "bitor": "|", "bitxor": "^", "ne": "^"}


class _RowSum(NamedTuple):
    """q so often, and the text of all else: an integer of 64 bits."""

    q: int
    rest: str


def emit_shown(expr: Expr, tables: Sequence[TableKind], *, narrow: bool, negative_kv: bool) -> list[str]:
    """Write a mask as bits of rows.

    Args:
        expr: the mask.
        tables: the kind of each table slot.
        narrow: as in `emit`. Only with it sums of 64 bits are rearranged: then none of their numbers is large.
        negative_kv: as in `emit`.

    Returns:
        Statements after those of "once" and "columns" of `emit`, of which the last gives `shown`. They find the first
        row's number in `q_first`. No statements where the mask has no such form.
    """
    if not narrow:
        return []
    writer = Writer(expr, tables, narrow, False, negative_kv, False)
    for position in range(len(expr.nodes)):
        writer.write(position)
    bits = _Bits(expr, writer)
    shown = bits.of(len(expr.nodes) - 1)
    return [] if shown is None else [*bits.lines, f"shown = {shown}"]


class _Bits:
    """Writes the bits of nodes; each once."""

    def __init__(self, expr: Expr, writer: Writer) -> None:
        self.expr = expr
        self.writer = writer
        self.lines: list[str] = []
        self._known: dict[int, str | None] = {}

    def of(self, position: int) -> str | None:
        """The name of a truth's bits; None if it has none."""
        if position not in self._known:
            text = self._text(position)
            if text is not None:
                self.lines.append(f"w{position} = {text}")
            self._known[position] = None if text is None else f"w{position}"
        return self._known[position]

    def _text(self, position: int) -> str | None:
        node, group = self.expr.nodes[position], self.writer.groups[position]
        if group in ("once", "columns"):  # seen by all rows or by none
            return (
                f"tl.where({self.writer.value(position, torch.bool, group, typed=True)}, rows_from(0), rows_from(64))"
            )
        if node.dtype != torch.bool:
            return None
        kinds = [self.expr.nodes[arg] for arg in node.args]
        if node.op in COMPARISONS and operand_dtype(node, kinds) == torch.int64:
            return self._compared(node.op, *node.args)
        if any(kind.dtype != torch.bool for kind in kinds):
            return None
        op, words = ON_TRUTH.get(node.op, node.op), [self.of(arg) for arg in node.args]
        if any(word is None for word in words):
            return None
        if op == "select":
            return f"({words[0]} & {words[1]}) | (~{words[0]} & {words[2]})"
        if op in ("not", "eq"):
            return f"~({' ^ '.join(map(str, words))})"
        return f" {_JOINED[op]} ".join(map(str, words)) if op in _JOINED else None

    def _compared(self, op: str, left: int, right: int) -> str | None:
        """The rows whose number, counted from the first, compares so with another."""
        a, b = self._sum(left), self._sum(right)
        if a is None or b is None or abs(a.q - b.q) != 1:
            return None
        if a.q < b.q:
            a, b, op = b, a, _MIRRORED[op]
        t = f"{b.rest} - {a.rest} - q_first"
        from_here, after = f"rows_from({t})", f"rows_from({t} + 1)"
        return {
            "ge": from_here,
            "gt": after,
            "lt": f"~{from_here}",
            "le": f"~{after}",
            "eq": f"{from_here} & ~{after}",
            "ne": f"~({from_here} & ~{after})",
        }[op]

    def _sum(self, position: int) -> _RowSum | None:
        node, group = self.expr.nodes[position], self.writer.groups[position]
        if group in ("once", "columns"):
            return _RowSum(0, f"{self.writer.value(position, torch.int64, group, typed=True)}.to(tl.int64)")
        if node.op == "q":
            return _RowSum(1, "0")
        if node.op not in ("add", "sub") or node.dtype != torch.int64:
            return None
        a, b = map(self._sum, node.args)
        if a is None or b is None:
            return None
        sign = 1 if node.op == "add" else -1
        return _RowSum(a.q + sign * b.q, f"({a.rest} {'+' if sign > 0 else '-'} {b.rest})")
