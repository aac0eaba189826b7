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
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from maskflash.expr.lower import read_elsewhere
from maskflash.expr.tracer import Captured, Sources
from maskflash.masks.reach import Step, follow, is_value, owner, reach

_MUTABLE = (list, dict, set, np.ndarray)


class Captures:
    """What one predicate reads besides its arguments, as it is now.

    Attributes:
        function: the predicate.
        steps: from it to every value that counts; values are numbered from 1, the function is 0.
        seen: the values.
        names: what traces call those that fill slots; None for others.
        shape: what traces depend on besides the slots' values.
        slots: numbers and tensors, by what traces call them.
        tensors: those of them that are tensors.
        stamp: another number for another shape or other slots.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.stamp = 0
        self._lock = threading.Lock()
        self._lost = False
        self._laid_out: set[str] = set()
        self._find()

    @property
    def followed(self) -> bool:
        """Whether steps lead to all there is; else the predicate has to be traced at each call."""
        return self._complete and not self._lost

    def look(self) -> int:
        """Read everything again; the stamp."""
        if self._nothing:
            return self.stamp
        try:
            same = self.followed and self._unchanged()
        except Exception:  # of an attribute's own code, or one that is gone: a trace will meet it too
            same = False
        if not same:
            with self._lock:
                before = self.shape, self._layouts, self.slots
                self._find()
                after = self.shape, self._layouts, self.slots
                if not self.followed or before[:2] != after[:2] or not _same_slots(before[2], after[2]):
                    self.stamp += 1
        return self.stamp

    def read(self) -> dict[str, Any]:
        """Read all once more in dynamo's sight, which then guards what it met, or makes inputs of it."""
        values = [self.function]
        found: dict[str, Any] = {}
        for step, name in zip(self.steps, self.names, strict=True):
            value = follow(values[step.parent], step)
            if name is None:
                _touch(value)
            else:
                found[name] = value
            values.append(value)
        return found

    def sources(self) -> Sources:
        """What a trace asks of a value that it meets: which of these it is."""
        numbers: dict[object, Captured] = {}
        tensors: dict[int, Captured] = {}
        labels: dict[Captured, str] = {}
        for place, (step, value, name) in enumerate(zip(self.steps, self.seen, self.names, strict=True), 1):
            if name is None:
                continue
            slot = Captured(name)
            labels[slot] = self._label(step)
            if isinstance(value, Tensor):
                tensors.setdefault(id(value), Captured(f"@{self._aliases.get(place, place)}"))
            else:
                numbers[owner(self._value(step.parent), step)] = slot
        values = {Captured(name): value for name, value in self.slots.items()}
        return Sources(numbers, tensors, values, labels)

    def depend(self, names: Iterable[str]) -> None:
        """Note slots of which a trace depends on more than the kind of what fills them."""
        self._laid_out.update(name for name in names if name in self._layouts)

    def lose(self) -> None:
        """Note that a trace met a tensor that no step leads to."""
        self._lost, self._nothing = True, False

    def _find(self) -> None:
        found = reach(self.function)
        elsewhere = frozenset().union(*map(read_elsewhere, found.codes))
        self.steps, self.seen, self._complete = tuple(found.steps), tuple(found.values[1:]), found.complete
        self.names = tuple(
            f"@{place}" if _fills_slot(step, value, elsewhere) else None
            for place, (step, value) in enumerate(zip(self.steps, self.seen, strict=True), 1)
        )
        self.slots = {name: value for name, value in zip(self.names, self.seen, strict=True) if name is not None}
        kinds = (_kind(x) if name else _frozen(x) for x, name in zip(self.seen, self.names, strict=True))
        aliases = (found.alias.get(place) for place in range(1, len(self.seen) + 1))
        self.shape = (_frozen(self.function), *zip(self.steps, aliases, kinds, strict=True))
        self._layouts = {name: (x.shape, x.stride()) for name, x in self.slots.items() if isinstance(x, Tensor)}
        self._aliases = found.alias
        pairs = ((self._value(place), self._value(first)) for place, first in found.alias.items())
        self._shared = tuple((x, y) for x, y in pairs if x is not y)  # views of one memory
        self._contents = tuple((value, _contents(value)) for value in self.seen if isinstance(value, _MUTABLE))
        self.tensors = tuple(value for value in self.slots.values() if isinstance(value, Tensor))
        self._nothing = not self.steps and self._complete

    def _unchanged(self) -> bool:
        values = [self.function]
        for step, seen in zip(self.steps, self.seen, strict=True):
            value = follow(values[step[0]], step)
            if value is not seen and (len(values) in self._aliases or not _alike(value, seen)):
                return False
            values.append(value)
        for name in self._laid_out:
            tensor = self.slots.get(name)
            if tensor is not None and self._layouts[name] != (tensor.shape, tensor.stride()):
                return False
        for view, other in self._shared:
            if view.data_ptr() != other.data_ptr() or view.shape != other.shape or view.stride() != other.stride():
                return False
        return not self._contents or all(_same_contents(value, contents) for value, contents in self._contents)

    def _value(self, place: int) -> Any:
        return self.seen[place - 1] if place else self.function

    def _label(self, step: Step) -> str:
        """What the user calls a value."""
        if step.kind == "item" and step.parent:
            return f"{self._label(self.steps[step.parent - 1])}[{step.key!r}]"
        return step.name


def _fills_slot(step: Step, value: Any, elsewhere: frozenset[str]) -> bool:
    """Whether a value fills a slot: tensors do, and numbers that code reads only where it records."""
    return isinstance(value, Tensor) or (type(value) in (int, float) and step.name != "" and step.name not in elsewhere)


def _touch(value: Any) -> None:
    """Look at a value, and at all that it holds: dynamo guards what it has looked at."""
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _touch(item)
    elif isinstance(value, dict):
        for item in value.values():
            _touch(item)
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
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return type(value), tuple(_frozen(item) if is_value(item) else None for item in items)
    if isinstance(value, dict):
        return dict, tuple((_frozen(key), _frozen(x) if is_value(x) else None) for key, x in value.items())
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
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
    if isinstance(value, dict):
        return tuple(value), tuple(value.values())
    return value.copy() if isinstance(value, set) else tuple(value)


def _same_contents(value: Any, contents: Any) -> bool:
    """Whether it still holds just that; another object that is equal counts as another."""
    if isinstance(value, np.ndarray):
        return value.shape == contents.shape and bool(value.tobytes() == contents.tobytes())
    if isinstance(value, dict):
        return _same(tuple(value), contents[0]) and _same(tuple(value.values()), contents[1])
    return bool(value == contents) if isinstance(value, set) else _same(value, contents)


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))


def _same_slots(slots: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether all slots have the very tensors, and equal numbers."""
    return slots.keys() == others.keys() and all(
        value is others[name] or (not isinstance(value, Tensor) and _frozen(value) == _frozen(others[name]))
        for name, value in slots.items()
    )
