"""A predicate -> the values that its code can reach by name, looked up again at each call as Python itself would.

What a function may read is in its code: names of closure cells, of globals and of attributes. From the function on,
each of them is a step to another value:

    lambda b, h, q, kv: self.doc[q] == self.doc[kv] and q - kv < window

    0  the function
    1  0 .cell 0       self, a module: its attributes that any code here names come next
    2  0 .cell 1       window, a number: a parameter of the mask
    3  1 .attr doc     a tensor: a table of the mask

Numbers and tensors fill slots of the trace, so another value there needs no other trace. All else is part of the
captures' shape: a mask is traced once for each.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index, is_
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskflash.functions.reach import ABSENT, MAPPINGS, SEQUENCES, Step, follow, is_value, members, owner, reach
from maskflash.functions.slots import aside
from maskflash.functions.traces import Reading
from maskflash.trace.lower import read_elsewhere
from maskflash.trace.sources import Captured, Sources

_ARRAYS = (np.ndarray, array, bytearray)
_MUTABLE = (list, deque, set, *_ARRAYS, *MAPPINGS)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What a predicate reads, at one moment.

    Attributes:
        reads: each step from it to a value that counts, the value, and what traces call it if it fills a slot (None for
            others, "" for what isn't there); values are numbered from 1, the function is 0.
        reading: the values that fill slots, and what else traces depend on.
        layouts: of the tensors that fill slots.
        aliases: for places whose value was found before, the place of that; or a view of the same memory.
        shared: views of one memory, by two.
        open: places, the names that code would read there, whether it is an object that has none of them, and the
            names that are there: they change with what has them.
        codes: places of functions, and their code.
        contents: of lists and the like.
        complete: whether steps lead to all there is.
        guarded: whether dynamo can tell when what is read changes.
        nothing: whether nothing is read.
    """

    reads: tuple[tuple[Step, Any, str | None], ...]
    reading: Reading
    layouts: dict[str, object]
    aliases: dict[int, int]
    shared: tuple[tuple[Tensor, Tensor], ...]
    open: tuple[tuple[int, frozenset[str], bool, tuple[KeysView[str], ...]], ...]
    codes: tuple[tuple[int, CodeType], ...]
    contents: tuple[tuple[Any, Any], ...]
    complete: bool
    guarded: bool
    nothing: bool


class Captures:
    """What one predicate reads besides its arguments, as it is now.

    What was found is replaced as a whole, so that other threads never see a half of it.

    Attributes:
        function: the predicate.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._lost = False
        self._laid_out: frozenset[str] = frozenset()
        self._now: _Found | None = None

    @property
    def now(self) -> _Found:
        """What it was when last looked at; not before, since its object may still be in the making."""
        now = self._now
        if now is None:
            now = self._now = _found(self.function)
        return now

    @property
    def followed(self) -> bool:
        """Whether steps lead to all there is; else the predicate has to be traced at each call."""
        return self.now.complete and not self._lost

    def look(self) -> int:
        """Read everything again; the stamp."""
        now = self.now
        if now.nothing and not self._lost and (not now.codes or self.function.__code__ is now.codes[0][1]):
            return now.reading.stamp
        if self.followed and self._unchanged(now):
            return now.reading.stamp
        with self._lock:
            before, new = self.now, _found(self.function)
            old, reading = before.reading, new.reading
            same = self.followed and old.structure == reading.structure and before.layouts == new.layouts
            stamp = old.stamp + (not (same and _same_slots(old.slots, reading.slots)))
            self._now = replace(new, reading=reading._replace(stamp=stamp))
            return stamp

    def read(self) -> dict[str, Any]:
        """Read all once more in dynamo's sight, which then guards what it met, or makes inputs of it."""
        now = self.now
        values: list[Any] = [self.function]
        found: dict[str, Any] = {}
        numbers: list[int | str] = []
        for step, _, name in now.reads:
            value = None if name == "" else follow(values[step.parent], step)
            if name is None:
                _touch(value, numbers)
            elif name:
                found[name] = value
            values.append(value)
        for place, names, has_none, _ in now.open:
            if has_none:
                for name in names:
                    hasattr(values[place], name)
        self._guarded(tuple(numbers))
        return found

    @aside
    def _guarded(self, numbers: tuple[int | str, ...]) -> None:
        """Have dynamo guard these: it guards what it hands to a method that it calls aside."""

    def sources(self) -> Sources:
        """What a trace asks of a value that it meets: which of these it is."""
        now = self.now
        numbers: dict[object, Captured] = {}
        tensors: dict[int, Captured] = {}
        labels: dict[Captured, str] = {}
        for place, (step, value, name) in enumerate(now.reads, 1):
            if not name:
                continue
            slot = Captured(name)
            labels[slot] = _label(now, step)
            if isinstance(value, Tensor):
                tensors.setdefault(id(value), Captured(f"@{now.aliases.get(place, place)}"))
            else:
                numbers[owner(now.reads[step.parent - 1][1] if step.parent else self.function, step)] = slot
        values = {Captured(name): value for name, value in now.reading.slots.items()}
        return Sources(numbers, tensors, values, labels)

    def depend(self, names: Iterable[str]) -> None:
        """Note slots of which a trace depends on more than the kind of what fills them."""
        self._laid_out |= self.now.layouts.keys() & set(names)

    def lose(self) -> None:
        """Note that a trace met a tensor that no step leads to."""
        self._lost = True

    def _unchanged(self, now: _Found) -> bool:
        values: list[Any] = [self.function]
        for step, seen, _ in now.reads:
            parent, kind, key, _ = step
            try:
                value = getattr(values[parent], key) if kind == "attr" else follow(values[parent], step)
            except Exception:  # see `find`
                value = ABSENT
            if value is not seen and (len(values) in now.aliases or not _alike(value, seen)):
                return False
            values.append(value)
        for place, code in now.codes:
            if values[place].__code__ is not code:
                return False
        for place, names, _, known in now.open:
            same = not place or values[place] is now.reads[place - 1][1]
            for there in known if same else members(values[place]):
                if not there.isdisjoint(names):
                    return False
        for name in self._laid_out:
            if name in now.layouts and now.layouts[name] != _layout(now.reading.slots[name]):
                return False
        for view, other in now.shared:
            if view.data_ptr() != other.data_ptr() or _layout(view) != _layout(other):
                return False
        return not now.contents or all(_same_contents(value, contents) for value, contents in now.contents)


def _found(function: Callable[..., Any]) -> _Found:
    found = reach(function)
    elsewhere = frozenset().union(*map(read_elsewhere, found.codes))
    seen = tuple(found.values[1:])
    names = tuple(map(partial(_name, elsewhere), range(1, len(found.values)), found.steps, seen))
    slots = {name: value for name, value in zip(names, seen, strict=True) if name}
    kinds = (_kind(x) if name else _frozen(x) for x, name in zip(seen, names, strict=True))
    aliases = (found.alias.get(place) for place in range(1, len(found.values)))
    structure = (_frozen(function), *zip(found.steps, aliases, kinds, strict=True))
    pairs = ((found.values[place], found.values[first]) for place, first in found.alias.items())
    return _Found(
        tuple(zip(found.steps, seen, names, strict=True)),
        Reading(0, slots, structure, tuple(x for x in slots.values() if isinstance(x, Tensor))),
        {name: _layout(x) for name, x in slots.items() if isinstance(x, Tensor)},
        found.alias,
        tuple((x, y) for x, y in pairs if x is not y),
        tuple(
            (place, names, _may_have(value), tuple(members(value)))
            for place, names in found.open.items()
            for value in [found.values[place]]
        ),
        tuple((place, x.__code__) for place, x in enumerate(found.values) if isinstance(x, FunctionType)),
        tuple((value, _contents(value)) for value in seen if isinstance(value, _MUTABLE)),
        found.complete,
        not any(isinstance(value, _ARRAYS) for value in seen),
        found.complete and not (found.steps or found.open),
    )


def _label(now: _Found, step: Step) -> str:
    """What the user calls a value."""
    if step.kind == "item" and step.parent:
        return f"{_label(now, now.reads[step.parent - 1][0])}[{step.key!r}]"
    return step.name


def _name(elsewhere: frozenset[str], place: int, step: Step, value: Any) -> str | None:
    """What traces call a value."""
    if value is ABSENT:
        return ""
    return f"@{place}" if _fills_slot(step, value, elsewhere) else None


def _layout(tensor: Tensor) -> tuple[object, object]:
    return tensor.shape, tensor.stride()


def _may_have(value: Any) -> bool:
    """Whether a value is an object, of which dynamo guards that it has no attribute of a name."""
    plain = not isinstance(type(value).__getattribute__, FunctionType)  # dynamo can't look into that
    return plain and not isinstance(value, (FunctionType, type, ModuleType))


def _fills_slot(step: Step, value: Any, elsewhere: frozenset[str]) -> bool:
    """Whether a value fills a slot: tensors do, and numbers that code reads only where it records."""
    return isinstance(value, Tensor) or (type(value) in (int, float) and step.name != "" and step.name not in elsewhere)


def _touch(value: Any, numbers: list[int | str]) -> None:
    """Look at a value, and at all that it holds: dynamo guards what it has looked at, but of numbers, that they are."""
    if isinstance(value, (int, torch.SymInt)):
        numbers.append(index(value))
    elif isinstance(value, (float, torch.SymFloat)):
        numbers.append(value.hex())
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        for item in value:
            _touch(item, numbers)
    elif isinstance(value, dict):
        for item in value.values():
            _touch(item, numbers)
    elif value is None:
        return


def _kind(value: Any) -> object:
    """What a slot's value has to keep for a trace to go on serving it."""
    return (Tensor, value.dtype, value.ndim) if isinstance(value, Tensor) else type(value)


def _alike(value: Any, seen: Any) -> bool:
    """Whether a value is as good as another that was read in its place; what it consists of is read by other steps."""
    if type(value) is not type(seen) or isinstance(value, (Tensor, *_MUTABLE)):
        return False
    return _frozen(value) == _frozen(seen)


def _frozen(value: Any) -> object:
    """A value as what a trace depends on of it; what it consists of is read by other steps."""
    if isinstance(value, (*SEQUENCES, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return type(value), tuple(_frozen(item) if is_value(item) else None for item in items)
    if isinstance(value, MAPPINGS):
        return type(value), tuple((_frozen(key), _frozen(x) if is_value(x) else None) for key, x in value.items())
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (array, bytearray)):
        return type(value), bytes(value)
    if is_value(value):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value  # NaN, and the sign of zero
    if isinstance(value, FunctionType):
        return value.__code__
    if isinstance(value, (type, ModuleType, BuiltinFunctionType)):
        return value
    return type(value)


def _contents(value: Any) -> Any:
    """A copy of what a list, dict, set or array holds."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (array, bytearray)):
        return bytes(value)
    if isinstance(value, MAPPINGS):
        return tuple(value), tuple(value.values())
    return value.copy() if isinstance(value, set) else tuple(value)


def _same_contents(value: Any, contents: Any) -> bool:
    """Whether it still holds just that; another object that is equal counts as another."""
    if isinstance(value, np.ndarray):
        return value.shape == contents.shape and bool(value.tobytes() == contents.tobytes())
    if isinstance(value, (array, bytearray)):
        return bool(bytes(value) == contents)
    if isinstance(value, MAPPINGS):
        return _same(tuple(value), contents[0]) and _same(tuple(value.values()), contents[1])
    return bool(value == contents) if isinstance(value, set) else _same(tuple(value), contents)


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))


def _same_slots(slots: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether all slots have the very tensors, and equal numbers."""
    return slots.keys() == others.keys() and all(
        value is others[name] or (not isinstance(value, Tensor) and _frozen(value) == _frozen(others[name]))
        for name, value in slots.items()
    )
