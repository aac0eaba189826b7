"""A mask and the arguments of a call -> what the op is given of it: text, numbers and tables; in torch.compile too.

Dynamo can't follow the trace of a predicate. So that is done aside, on stand-ins for the arguments, and dynamo reads
the result off the mask as plain data: it guards the text, and makes tables and numbers inputs of its graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from maskflash.expr.nodes import Expr, parse
from maskflash.expr.trace import Traced
from maskflash.masks import tables

_MOST_EXPRESSIONS: Final = 1024  # remembered by their text

Kind = tuple[str, Any, Any]
"""Name, dtype and number of dimensions of a tensor; name, int and None; or name, type and value of anything else."""
Exact = tuple[tuple[str, Any], ...]
F = TypeVar("F", bound=Callable[..., Any])

_expressions: dict[str, Expr] = {}
_names: dict[tuple[tuple[Kind, ...], Exact], str] = {}
_lock = threading.Lock()  # of both


@dataclass(frozen=True, eq=False)
class Slots:
    """A trace as plain data.

    Attributes:
        text: the expression.
        params: for each integer slot its value, or the name of the argument that fills it.
        tables: for each table slot the captured tensor, or likewise.
        names: what the user calls each table.
        expr: the expression, with the user's lines.
    """

    text: str
    params: tuple[int | str, ...]
    tables: tuple[Tensor | str, ...]
    names: tuple[str, ...]
    expr: Expr

    def filled(self, values: dict[str, Any], device: torch.device) -> tuple[list[int], list[Tensor]]:
        """Numbers and tables of a call with these arguments; captured tables on its device."""
        return (
            [values[param] if isinstance(param, str) else param for param in self.params],
            [values[table] if isinstance(table, str) else tables.on(table, device) for table in self.tables],
        )


class Known:
    """The slots of one mask, each an attribute: dynamo guards an attribute that it reads by itself, but a dict whole.

    Its name stands for kinds of arguments and values of some. It is the same in every mask, so that what was compiled
    with one mask runs with another that has the same slots there.

    Attributes:
        plain: the slots where there are no arguments.
        texts: all expressions.
        specialised: for kinds of arguments, the names of those whose values (or shapes) traces depend on.
    """

    def __init__(self) -> None:
        self.plain: Slots | None = None
        self.texts: set[str] = set()
        self.specialised: dict[object, frozenset[str]] = {}


class Traceable(Protocol):
    """What is needed of a mask."""

    forms: Known

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """The mask's expression for arguments like these."""

    def specialised(self, kinds: tuple[Kind, ...]) -> tuple[str, ...]:
        """`specialised` of this mask, aside."""

    def slots_name(self, kinds: tuple[Kind, ...], exact: Exact) -> str | None:
        """`slots_name` of this mask, aside."""


def aside(method: F) -> F:
    """Have dynamo call a method at once, and take its result for a constant.

    It is `torch.compiler.assume_constant_result`, which would import dynamo with maskflash.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


def slots_of(mask: Traceable, values: dict[str, Any]) -> Slots:
    """The slots of a mask for checked arguments (see `arguments.mask_args`)."""
    if not (values or torch.compiler.is_dynamo_compiling() or mask.forms.plain is None):
        return mask.forms.plain
    kinds = tuple([_kind(name, value) for name, value in values.items()])
    name = None
    while name is None:
        exact = tuple([(name, _exact(values[name])) for name in mask.specialised(kinds)])
        name = mask.slots_name(kinds, exact)
    slots: Slots = getattr(mask.forms, name)
    return slots


def specialised(mask: Traceable, kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """The arguments whose values (or shapes) traces for these kinds are known to depend on."""
    known = mask.forms.specialised
    if kinds not in known:
        try:
            traced = mask.traced({name: _stand_in(what, detail) for name, what, detail in kinds})
        except Exception:  # it may do with the true values; if not, the error had better name those
            known[kinds] = _variable(kinds)
        else:
            known[kinds] = _variable(kinds) & traced.specialised
    return tuple(sorted(known[kinds]))


def slots_name(mask: Traceable, kinds: tuple[Kind, ...], exact: Exact) -> str | None:
    """Where `mask.forms` has the slots for these kinds and values; None if a trace depends on further values."""
    known = mask.forms
    name = _names.get((kinds, exact))
    if name is not None and hasattr(known, name):
        return name
    values = dict(exact)
    traced = mask.traced({name: _stand_in(what, detail, values.get(name)) for name, what, detail in kinds})
    found = _variable(kinds) & traced.specialised
    if not found <= values.keys():
        known.specialised[kinds] |= found
        return None
    slots = Slots(
        traced.expr.text,
        tuple(str(param) if isinstance(param, str) else param for param in traced.params),
        tuple(str(table) if isinstance(table, str) else table for table in traced.tables),
        traced.names,
        traced.expr,
    )
    _remember(slots.text, slots.expr)
    known.texts.add(slots.text)
    with _lock:
        name = _names.setdefault((kinds, exact), f"slots{len(_names)}")
    setattr(known, name, slots)
    if not kinds:
        known.plain = slots
    return name


def expression(text: str) -> Expr:
    """The expression of a text; with the lines of a mask that has it, if there was one."""
    found = _expressions.get(text)
    return found if found is not None else _remember(text, parse(text))


def _remember(text: str, expr: Expr) -> Expr:
    with _lock:
        _expressions[text] = expr
        while len(_expressions) > _MOST_EXPRESSIONS:
            del _expressions[next(iter(_expressions))]
    return expr


def _variable(kinds: tuple[Kind, ...]) -> frozenset[str]:
    """The arguments whose kind leaves their value (or shape) open."""
    return frozenset(name for name, what, _ in kinds if what is int or isinstance(what, torch.dtype))


def _kind(name: str, value: Any) -> Kind:
    if isinstance(value, Tensor):
        return name, value.dtype, value.ndim
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return name, int, None
    return name, type(value), value


def _exact(value: Any) -> Any:
    return tuple([index(size) for size in value.shape]) if isinstance(value, Tensor) else index(value)


def _stand_in(what: Any, detail: Any, exact: Any = None) -> Any:
    """A value of a kind, for a trace."""
    if isinstance(what, torch.dtype):
        anything = torch.zeros((1,) * detail, dtype=what)
        return anything if exact is None else anything.expand(exact)
    if what is int:
        return 1 if exact is None else exact
    return detail
