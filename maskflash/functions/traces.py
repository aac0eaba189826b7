"""The kinds of a function's arguments and captures -> its trace for them: one bounded cache for each function.

A trace depends on kinds (dtype and dimensions of a tensor, "an int", "a float"), on the structure of what is captured,
and on the values of just those arguments that it names. Of these a value's `exact_of` is all that it can depend on.

    f(b, h, q, kv, *, doc, size, window)        kinds of doc, size and window: the case
    range(size) ... doc[q] ... q - kv < window  it depends on size: one trace for each size, of all docs and windows
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from operator import index
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor

from maskflash.functions.slots import Slots
from maskflash.trace.sources import is_captured
from maskflash.trace.trace import Traced

_MOST: Final = 64  # traces of one function; the least recently used goes first
_MOST_NAMES: Final = 4096  # of slots, in all functions; the first to come is the first to go

Kind = tuple[str, Any, Any]
"""Name, dtype and dimensions of a tensor; name, int or float and None; name, type and value of anything else."""
Kinds = tuple[Kind, ...]
Exact = tuple[tuple[str, Any], ...]
"""Names of values that a trace depends on, and what it depends on of each."""
Case = tuple[Hashable, Kinds]
"""The structure of what is captured, and the kinds of all values."""

_names: OrderedDict[tuple[Case, Exact], str] = OrderedDict()
_cases: dict[str, tuple[Case, Exact]] = {}  # by name
_made = 0  # names so far: one that is forgotten is given to nobody else
_lock = threading.Lock()  # of whoever changes these, or the traces of any function


class Reading(NamedTuple):
    """What a function captures, at one moment.

    Attributes:
        stamp: another number for another structure or other slots.
        slots: numbers and tensors, by what traces call them.
        structure: all else that traces depend on.
        tensors: those among the slots.
    """

    stamp: int = 0
    slots: Mapping[str, Any] = MappingProxyType({})
    structure: Hashable = ()
    tensors: tuple[Tensor, ...] = ()


class Record(NamedTuple):
    """A trace that needs nothing captured any more, and what it was made for: as it is pickled."""

    kinds: Kinds
    exact: Exact
    traced: Traced


class Traces:
    """The traces of one function, each an attribute.

    Dynamo guards an attribute that it reads by itself, but a dict whole. An attribute's name stands for a case and for
    what its trace depends on. It is the same in every function, so that what was compiled with one runs with another
    that has the same slots there.

    Attributes:
        plain: where there are no arguments, the function's stamp, its slots, and what it captured then.
        unfollowed: the latest of a function that is traced at each call.

    Args:
        retrace: has the function keep the slots of a case and such values, if that is how things are there.
    """

    def __init__(self, retrace: Callable[[Case, Exact], None] | None = None) -> None:
        self._retrace = None if retrace is None else WeakMethod(retrace)
        self.plain: tuple[int, Slots, Mapping[str, Any]] | None = None
        self.unfollowed: Record | None = None
        self._names: OrderedDict[tuple[Case, Exact], str] = OrderedDict()
        self._depends: OrderedDict[Case, tuple[str, ...]] = OrderedDict()
        self._last = ""  # name used

    def __getattr__(self, name: str) -> Slots:
        """What a graph's guards look for on another function than it was made with: traced now, as for a call."""
        wanted = _cases.get(name)
        retrace = None if wanted is None or self._retrace is None else self._retrace()
        if wanted is not None and retrace is not None:
            with suppress(Exception):  # of a function that is too different: its call will say so
                retrace(*wanted)
            found: Slots | None = vars(self).get(name)
            if found is not None:
                return found
        raise AttributeError(f"no slots {name!r}")

    def depends(self, case: Case) -> tuple[str, ...] | None:
        """The values that traces of a case are known to depend on, in order; None of a case that is new."""
        return self._depends.get(case)

    def depend(self, case: Case, names: frozenset[str]) -> tuple[str, ...]:
        """Note more of those; all of them."""
        with _lock:
            known = tuple(sorted(names.union(self._depends.get(case, ()))))
            put(self._depends, case, known, _MOST)
        return known

    def name(self, case: Case, exact: Exact) -> str | None:
        """The attribute that has the slots for a case and such values, if one has."""
        name = self._names.get((case, exact))
        if name is not None and name != self._last:
            with _lock:
                self._last = name
                put(self._names, (case, exact), name, _MOST)
                if name not in vars(self):  # another thread has just dropped it
                    del self._names[case, exact]
                    return None
        return name

    def keep(self, case: Case, exact: Exact, slots: Slots) -> None:
        """Have `name` find these."""
        global _made
        with _lock:
            name = _names.get((case, exact))
            if name is None:
                _made += 1
                name = f"slots{_made}"
                for gone in put(_names, (case, exact), name, _MOST_NAMES):
                    _cases.pop(gone, None)
                _cases[name] = case, exact
            setattr(self, name, slots)
            self._last = name
            for gone in put(self._names, (case, exact), name, _MOST):
                delattr(self, gone)

    def all(self) -> list[Slots]:
        """All that there are, the latest last."""
        found = [vars(self).get(name) for name in list(self._names.values())]
        return [slots for slots in found if slots is not None]

    def latest(self, structure: Hashable) -> Traced | None:
        """The last trace made or found for such captures; these are in its slots by name."""
        if self.unfollowed is not None:
            return self.unfollowed.traced
        names = [name for (case, _), name in list(self._names.items()) if case[0] == structure]
        slots: Slots | None = vars(self).get(names[-1]) if names else None
        return None if slots is None else slots.traced

    @property
    def texts(self) -> set[str]:
        """The expressions of all that there are."""
        latest = [] if self.unfollowed is None else [self.unfollowed.traced.expr.text]
        return {*latest, *(slots.text for slots in self.all())}

    def records(self, reading: Reading) -> list[Record]:
        """The traces for captures as they are now, with these in their slots for good."""
        captured = reading.slots
        if self.unfollowed is not None:
            return [self.unfollowed]
        found = []
        for (case, exact), name in list(self._names.items()):
            slots = vars(self).get(name)
            now = all(exact_of(x, captured[x]) == value for x, value in exact if x in captured)
            if slots is not None and case[0] == reading.structure and now:
                kinds = tuple(kind for kind in case[1] if not is_captured(kind[0]))
                own = tuple(pair for pair in exact if not is_captured(pair[0]))
                found.append(Record(kinds, own, slots.traced.filled(captured)))
        return found

    @staticmethod
    def recorded(records: list[Record]) -> Traces:
        """Those of a function that captures nothing, and that can't be traced any more."""
        traces = Traces()
        for kinds, exact, traced in records:
            traces.depend(((), kinds), frozenset(name for name, _ in exact))
            traces.keep(((), kinds), exact, Slots.of(traced))
        return traces


def put(kept: OrderedDict[Any, Any], key: Hashable, value: Any, most: int) -> list[Any]:
    """Put something last, and drop what is too much from the front; what was dropped."""
    kept[key] = value
    kept.move_to_end(key)
    return [kept.popitem(last=False)[1] for _ in range(len(kept) - most)]


def kind_of(name: str, value: Any) -> Kind:
    """What a value has to keep for a trace to go on serving it."""
    if isinstance(value, Tensor):
        return name, value.dtype, value.ndim
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return name, int, None
    if isinstance(value, (float, torch.SymFloat)):
        return name, float, None
    return name, type(value), value


def exact_of(name: str, value: Any) -> Any:
    """All that a trace may depend on of a value: of a tensor its shape, of a captured one its strides too."""
    if isinstance(value, Tensor):
        size = tuple([index(size) for size in value.shape])
        return (size, tuple([index(step) for step in value.stride()])) if is_captured(name) else size
    return (
        value.hex() if isinstance(value, (float, torch.SymFloat)) else index(value)
    )  # 0.0 == -0.0, and NaN is not NaN


def open_names(kinds: Kinds) -> frozenset[str]:
    """The values whose kind leaves them (or their shape) open."""
    return frozenset(name for name, what, value in kinds if isinstance(what, torch.dtype) or what in (int, float))


def stand_ins(kinds: Kinds, exact: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of these kinds, for a trace; what is captured it finds by itself."""
    return {name: _stand_in(what, value, exact.get(name)) for name, what, value in kinds if not is_captured(name)}


def _stand_in(what: Any, value: Any, exact: Any) -> Any:
    if isinstance(what, torch.dtype):
        anything = torch.zeros((1,) * value, dtype=what)
        return anything if exact is None else anything.expand(exact)
    if what is float:
        return 1.0 if exact is None else float.fromhex(exact)
    if what is int:
        return 1 if exact is None else exact
    return value
