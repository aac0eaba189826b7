"""A mask and the arguments of a call -> what the op is given of it: text, numbers and tables; in torch.compile too.

Dynamo can't follow the trace of a predicate. So that is done aside, on stand-ins for the arguments, and dynamo reads
the result off the mask as plain data: it guards the text, and makes tables and numbers inputs of its graph.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from maskflash.expr.nodes import Expr, bits_of, parse
from maskflash.ground import copies
from maskflash.trace.trace import Traced
from maskflash.trace.tracer import View, is_captured

_MOST_EXPRESSIONS: Final = 1024  # remembered by their text
_MOST_NAMES: Final = 4096  # of slots, and of shapes, in all masks
_MOST_SLOTS: Final = 256  # of one mask

Kind = tuple[str, Any, Any]
"""Name, dtype and dimensions of a tensor; name, int or float and None; name, type and value of anything else.

While dynamo looks on, floats have their value too, as `float.hex` writes it.
"""
Exact = tuple[tuple[str, Any], ...]
F = TypeVar("F", bound=Callable[..., Any])

_SHAPE: Final = ""  # the name of a kind that stands for the shape of what is captured
_expressions: dict[str, Expr] = {}
_names: OrderedDict[tuple[tuple[Kind, ...], Exact], str] = OrderedDict()
_shapes: OrderedDict[Hashable, int] = OrderedDict()
_made = {"slots": 0, "shapes": 0}  # so far: what is forgotten leaves its name to nobody
_lock = threading.Lock()  # of all these


@dataclass(frozen=True, eq=False)
class Slots:
    """A trace as plain data.

    Attributes:
        text: the expression.
        params: for each number's slot its value (of a float its 64 bits), or the name of what fills it.
        tables: for each table slot a tensor, or the name of what fills it, or a view of that.
        names: what the user calls each table.
        expr: the expression, with the user's lines.
    """

    text: str
    params: tuple[int | str, ...]
    tables: tuple[Tensor | str | View, ...]
    names: tuple[str, ...]
    expr: Expr

    def filled(self, values: Mapping[str, Any], device: torch.device) -> tuple[list[int], list[Tensor]]:
        """Numbers and tables of a call with these values; captured tables on its device."""
        params = [values[param] if isinstance(param, str) else param for param in self.params]
        return (
            [bits_of(param) if isinstance(param, float) else param for param in params],
            [_table_of(values, table, device) for table in self.tables],
        )


def _table_of(values: Mapping[str, Any], table: Tensor | str | View, device: torch.device) -> Tensor:
    """What fills a slot; what the mask captured goes to the device of the call, where arguments must be already."""
    if isinstance(table, View):
        return copies.on(table.of(values[table.name]), device)
    if isinstance(table, Tensor):
        return copies.on(table, device)
    found: Tensor = values[table]
    return copies.on(found, device) if is_captured(table) else found


class Known:
    """The slots of one mask, each an attribute: dynamo guards an attribute that it reads by itself, but a dict whole.

    Its name stands for kinds of arguments and values of some. It is the same in every mask, so that what was compiled
    with one mask runs with another that has the same slots there.

    Attributes:
        plain: where there are no arguments, what the mask's `look` gave, the slots, and what it captured then.
        texts: all expressions.
        specialised: for kinds of arguments, the names of those whose values (or shapes) traces depend on.
        order: names of the slots, the oldest first.
    """

    def __init__(self) -> None:
        self.plain: tuple[int, Slots, dict[str, Any]] | None = None
        self.texts: set[str] = set()
        self.specialised: OrderedDict[object, frozenset[str]] = OrderedDict()
        self.order: list[str] = []


class Traceable(Protocol):
    """What is needed of a mask."""

    forms: Known

    @property
    def followed(self) -> bool:
        """Whether that sees all; else the mask is traced at each call."""

    def look(self) -> int:
        """Read again what it captures; another number if that is another."""

    def captured(self) -> dict[str, Any]:
        """What fills captured slots."""

    def read(self) -> dict[str, Any]:
        """The same, in dynamo's sight."""

    def structure(self) -> Hashable:
        """What traces depend on of all else that it captures."""

    def template(self, mask_args: dict[str, Any]) -> Traced:
        """The mask's expression for arguments like these, captured slots by name."""

    def structure_name(self) -> int:
        """`structure_name` of this mask, aside."""

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


def slots_of(mask: Traceable, mask_args: dict[str, Any], stamp: int | None = None) -> tuple[Slots, dict[str, Any]]:
    """The slots of a mask for checked arguments (see `arguments.mask_args`), and all values that may fill them.

    `stamp` is what the mask's `look` has given in this very call, if it was asked.
    """
    forms, compiling = mask.forms, torch.compiler.is_dynamo_compiling()
    if stamp is None:
        stamp = 0 if compiling else mask.look()
    if not (mask_args or compiling):
        plain = forms.plain  # read once: another thread may put another there
        if plain is not None and plain[0] == stamp:
            return plain[1], plain[2]
    captured = mask.read() if compiling else mask.captured()
    values: dict[str, Any] = {**mask_args, **captured}
    if not (compiling or mask.followed):
        return _slots(mask, mask.template(mask_args), {}), values
    kinds = tuple([(_SHAPE, mask.structure_name(), None), *[_kind(name, value) for name, value in values.items()]])
    name = None
    while name is None:
        exact = tuple([(name, _exact(name, values[name])) for name in mask.specialised(kinds)])
        name = mask.slots_name(kinds, exact)
    slots: Slots = getattr(forms, name)
    if not (mask_args or compiling):
        forms.plain = stamp, slots, captured
    return slots, values


def structure_name(mask: Traceable) -> int:
    """A number that stands for the shape of what a mask captures, in every mask."""
    shape = mask.structure()
    with _lock:
        if shape not in _shapes:
            _made["shapes"] += 1
            _shapes[shape] = _made["shapes"]
            _drop_oldest(_shapes)
        return _shapes[shape]


def specialised(mask: Traceable, kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """The arguments whose values (or shapes) traces for these kinds are known to depend on."""
    known = mask.forms.specialised
    if kinds not in known:
        try:
            traced = mask.template(_stand_ins(kinds))
        except Exception:  # it may do with the true values; if not, the error had better name those
            known[kinds] = _variable(kinds)
        else:
            known[kinds] = _variable(kinds) & traced.specialised
        while len(known) > _MOST_SLOTS:
            known.popitem(last=False)
    return tuple(sorted(known[kinds]))


def slots_name(mask: Traceable, kinds: tuple[Kind, ...], exact: Exact) -> str | None:
    """Where `mask.forms` has the slots for these kinds and values; None if a trace depends on further values."""
    known = mask.forms
    name = _names.get((kinds, exact))
    if name is not None and hasattr(known, name):
        return name
    values = dict(exact)
    traced = mask.template(_stand_ins(kinds, values))
    found = _variable(kinds) & traced.specialised
    if not found <= values.keys():
        known.specialised[kinds] = known.specialised.get(kinds, frozenset()) | found
        return None
    constants = {name: bits_of(float.fromhex(value)) for name, what, value in kinds if what is float and value}
    slots = _slots(mask, traced, constants)
    with _lock:
        name = _names.get((kinds, exact))
        if name is None:
            _made["slots"] += 1
            name = _names[kinds, exact] = f"slots{_made['slots']}"
            _drop_oldest(_names)
    setattr(known, name, slots)
    known.order.append(name)
    if len(known.order) > _MOST_SLOTS:
        vars(known).pop(known.order.pop(0), None)
    return name


def _slots(mask: Traceable, traced: Traced, constants: Mapping[str, int]) -> Slots:
    """A trace of a mask as plain data."""
    slots = Slots(
        traced.expr.text,
        tuple(_param(constants.get(param, param) if isinstance(param, str) else param) for param in traced.params),
        tuple(_table(table) for table in traced.tables),
        traced.names,
        traced.expr,
    )
    _remember(slots.text, slots.expr)
    mask.forms.texts.add(slots.text)
    return slots


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


def _drop_oldest(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > _MOST_NAMES:
        kept.popitem(last=False)


def _param(value: int | float | str) -> int | str:
    """What fills a number's slot, as plain data."""
    if isinstance(value, str):
        return str(value)
    return bits_of(value) if isinstance(value, float) else value


def _table(value: Tensor | str | View) -> Tensor | str | View:
    if isinstance(value, View):
        return View(str(value.name), *value[1:])
    return value if isinstance(value, Tensor) else str(value)


def _variable(kinds: tuple[Kind, ...]) -> frozenset[str]:
    """The values whose kind leaves them (or their shape) open."""
    open_ = (
        name for name, what, value in kinds if isinstance(what, torch.dtype) or (what in (int, float) and value is None)
    )
    return frozenset(open_)


def _kind(name: str, value: Any) -> Kind:
    if isinstance(value, Tensor):
        return name, value.dtype, value.ndim
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return name, int, None
    if isinstance(value, float | torch.SymFloat):  # dynamo may have made a symbol of it: this makes it a number again
        return name, float, value.hex() if torch.compiler.is_dynamo_compiling() else None
    return name, type(value), value


def _exact(name: str, value: Any) -> Any:
    """As much of a value as a trace may depend on: see `traces.exact`."""
    if isinstance(value, Tensor):
        size = tuple([index(size) for size in value.shape])
        return (size, tuple([index(step) for step in value.stride()])) if is_captured(name) else size
    return value if isinstance(value, float) else index(value)


def _stand_ins(kinds: tuple[Kind, ...], exact: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of these kinds, for a trace; what is captured it finds by itself."""
    values = exact or {}
    return {
        name: _stand_in(what, detail, values.get(name))
        for name, what, detail in kinds
        if name != _SHAPE and not is_captured(name)
    }


def _stand_in(what: Any, detail: Any, exact: Any = None) -> Any:
    """A value of a kind, for a trace."""
    if isinstance(what, torch.dtype):
        anything = torch.zeros((1,) * detail, dtype=what)
        return anything if exact is None else anything.expand(exact)
    if what is float and detail is not None:
        return float.fromhex(detail)
    if what in (int, float):
        return what(1) if exact is None else exact
    return detail
