"""An expression at one pair -> the conditions that decide it, with their values, and what was not looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from maskflash.expr.evaluate import Inputs, evaluate, every_value
from maskflash.expr.format import format_nodes
from maskflash.expr.nodes import Expr, Node, Scalar, Source
from maskflash.expr.ops import COMPARISONS, INDEX_VARIABLES, OPERATIONS

_MOST_READS: Final = 8  # look-ups that a reason lists


@dataclass(frozen=True, slots=True)
class Reason:
    """A condition that had its share in the answer.

    Attributes:
        text: the condition, as one would write it: "doc[q] == doc[kv]".
        holds: whether it does, at the pair.
        values: what it compares there, by the relation that holds: "3 != 5".
        reads: look-ups inside what it compares, and what they gave.
        source: where the user wrote it, if known.
        mask: the mask, of those that were joined, that it belongs to.
    """

    text: str
    holds: bool
    values: str
    reads: tuple[tuple[str, Scalar], ...] = ()
    source: Source | None = None
    mask: str = ""

    def __str__(self) -> str:
        reads = "".join(f", {text} is {value}" for text, value in self.reads)
        return f"{self.text}: {self.values}{reads}"


class Reasons(NamedTuple):
    """Why an expression has its truth at a pair."""

    truth: bool
    reasons: tuple[Reason, ...]
    unread: tuple[str, ...]


def find_reasons(
    expr: Expr, inputs: Inputs, names: tuple[str, ...], pair: tuple[int, int, int, int], mask: str = ""
) -> Reasons:
    """The conditions that decide an expression.

    Of an `and` that is false these are its false operands, of one that is true all of them; `or` is the other way
    round. An operand that short-circuiting passes over is not looked at, nor is the other branch of an if-then-else.

    Args:
        expr: the mask.
        inputs: values of its params and tables.
        names: what the user calls the tables.
        pair: b, h, q and kv as the expression sees them.
        mask: its name.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    device = inputs.tables[0].device if inputs.tables else torch.device("cpu")
    at = {name: torch.tensor([n], device=device) for name, n in zip(INDEX_VARIABLES, pair, strict=True)}
    evaluate(expr, inputs, at)
    values: list[Scalar] = [value.flatten()[0].item() for value in every_value(expr, inputs, at)[0]]
    texts = format_nodes(expr, inputs.params, names)
    reads = _reads(expr, texts, values)
    decisive, passed = _decisive(expr, values)
    found = (
        Reason(texts[at], bool(values[at]), _relation(expr, at, values), reads[at], expr.source(at), mask)
        for at in decisive
    )
    return Reasons(bool(values[-1]), tuple(found), tuple(texts[position] for position in passed))


def _decisive(expr: Expr, values: Sequence[Scalar]) -> tuple[list[int], list[int]]:
    """Positions of the conditions that decide the root, and of those passed over, in the order of evaluation."""
    decisive: dict[int, None] = {}
    passed: dict[int, None] = {}
    met: set[int] = set()
    stack = [len(expr.nodes) - 1]
    while stack:
        position = stack.pop()
        if position in met:
            continue
        met.add(position)
        below = list(_below(expr, position, values, passed))
        if below:
            stack += reversed(below)
        else:
            decisive[position] = None
    return list(decisive), sorted(set(passed) - met)


def _below(expr: Expr, position: int, values: Sequence[Scalar], passed: dict[int, None]) -> Iterator[int]:
    """The operands that a connective's truth rests on; none of a condition. Notes what is passed over."""
    node = expr.nodes[position]
    if node.dtype != torch.bool or any(expr.nodes[arg].dtype != torch.bool for arg in node.args):
        return
    if node.op in ("not", "bitnot", "bitxor"):
        yield from node.args
    elif node.op == "select":
        condition, x, y = node.args
        chosen, other = (x, y) if values[condition] else (y, x)
        passed[other] = None
        yield from (condition, chosen)
    elif (settling := OPERATIONS[node.op].settled) is not None:
        x, y = node.args
        if node.op in ("and", "or") and values[x] is settling:
            passed[y] = None
            yield x
        else:
            yield from (arg for arg in (x, y) if values[position] is not settling or values[arg] is settling)


def _relation(expr: Expr, position: int, values: Sequence[Scalar]) -> str:
    """What a condition compares, by the relation that holds."""
    node = expr.nodes[position]
    if node.op not in COMPARISONS:
        return str(values[node.args[0]] if node.op == "cast" else values[position])
    x, y = (values[arg] for arg in node.args)
    operation = OPERATIONS[node.op]
    if values[position]:
        return f"{x} {operation.symbol} {y}"
    if any(isinstance(value, float) and math.isnan(value) for value in (x, y)):  # no relation holds
        return f"not {x} {operation.symbol} {y}"
    return f"{x} {OPERATIONS[operation.opposite].symbol} {y}"


def _reads(expr: Expr, texts: Sequence[str], values: Sequence[Scalar]) -> list[tuple[tuple[str, Scalar], ...]]:
    """For each node the look-ups below its operands: an operand that is one shows its value already."""
    below: list[dict[str, Scalar]] = []
    shown: list[tuple[tuple[str, Scalar], ...]] = []
    for position, node in enumerate(expr.nodes):
        inner = {text: value for arg in node.args for text, value in below[arg].items()}
        direct = {texts[arg] for arg in node.args} if node.op in COMPARISONS or node.op == "cast" else set()
        kept = {text: value for text, value in inner.items() if text not in direct}
        shown.append(tuple(kept.items())[:_MOST_READS])
        own = {texts[position]: values[position]} if _is_read(node) else {}
        below.append(dict(tuple({**own, **inner}.items())[:_MOST_READS]))
    return shown


def _is_read(node: Node) -> bool:
    return node.op == "lookup" and bool(node.args)
