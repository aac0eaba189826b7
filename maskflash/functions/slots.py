"""A trace -> text, numbers and tables, which dynamo can read and the op is given; a text -> its expression."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from maskflash.expr.nodes import Expr, bits_of, parse
from maskflash.ground import copies
from maskflash.trace.sources import View, is_captured
from maskflash.trace.trace import Traced

_MOST_EXPRESSIONS: Final = 1024  # remembered by their text; the first to come is the first to go

F = TypeVar("F", bound=Callable[..., Any])

_expressions: dict[str, Expr] = {}
_lock = threading.Lock()  # of whoever changes that


@dataclass(frozen=True, eq=False)
class Slots:
    """A trace as plain data.

    Attributes:
        text: the expression.
        params: for each number's slot its value (of a float its 64 bits), or the name of what fills it.
        tables: for each table slot a tensor, or the name of what fills it, or a view of that.
        names: what the user calls each table.
        traced: the trace itself.
        rest: what is left of it where a part is used elsewhere; None for all of it.
    """

    text: str
    params: tuple[int | str, ...]
    tables: tuple[Tensor | str | View, ...]
    names: tuple[str, ...]
    traced: Traced
    rest: Slots | None = None

    @staticmethod
    def of(traced: Traced, rest: Traced | None = None) -> Slots:
        """A trace as plain data; from now on its expression is found by its text."""
        text = traced.expr.text
        _remember(text, traced.expr)
        params = tuple(
            str(x) if isinstance(x, str) else bits_of(x) if isinstance(x, float) else x for x in traced.params
        )
        left = None if rest is None else Slots.of(rest)
        return Slots(text, params, tuple(map(_plain, traced.tables)), traced.names, traced, left)

    @property
    def expr(self) -> Expr:
        """The expression, with the user's lines."""
        return self.traced.expr

    def filled(self, values: Mapping[str, Any], device: torch.device) -> tuple[list[int], list[Tensor]]:
        """Numbers (of floats their bits) and tables of a call with these values; captured tables on its device."""
        if not (self.params or self.tables):
            return [], []
        params = [values[param] if isinstance(param, str) else param for param in self.params]
        return (
            [bits_of(param) if isinstance(param, float) else param for param in params],
            [_table_of(values, table, device) for table in self.tables],
        )


def _plain(table: Tensor | str | View) -> Tensor | str | View:
    """What fills a table's slot, without a class of ours for its name."""
    if isinstance(table, View):
        return table._replace(name=str(table.name))
    return table if isinstance(table, Tensor) else str(table)


def _table_of(values: Mapping[str, Any], table: Tensor | str | View, device: torch.device) -> Tensor:
    """What fills a slot; what was captured goes to the device of the call, where arguments must be already."""
    if isinstance(table, View):
        return copies.on(table.of(values[table.name]), device)
    if isinstance(table, Tensor):
        return copies.on(table, device)
    found: Tensor = values[table]
    return copies.on(found, device) if is_captured(table) else found


def aside(method: F) -> F:
    """Have dynamo call a function at once, and take its result for a constant.

    It is `torch.compiler.assume_constant_result`, which would import dynamo with maskflash.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


@aside
def bits_of_hex(text: str) -> int:
    """The 64 bits of a float: dynamo knows its value by its text, and can't look into `bits_of`."""
    return bits_of(float.fromhex(text))


def expression(text: str) -> Expr:
    """The expression of a text; with the lines of a function that has it, if there was one."""
    found = _expressions.get(text)
    return found if found is not None else _remember(text, parse(text))


def _remember(text: str, expr: Expr) -> Expr:
    with _lock:
        _expressions[text] = expr
        while len(_expressions) > _MOST_EXPRESSIONS:
            del _expressions[next(iter(_expressions))]
    return expr
