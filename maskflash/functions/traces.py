"""A mask's arguments and captures -> the trace for their kinds, made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor

from maskflash.trace.trace import Traced
from maskflash.trace.tracer import is_captured

_MOST: Final = 64  # of one mask; the least recently used goes first

_Exact = tuple[tuple[str, object], ...]


class _Key(NamedTuple):
    """What a trace was made for: kinds of arguments, shape of captures, and the values that it depends on."""

    kinds: Hashable
    shape: Hashable
    values: _Exact


class Traces:
    """Traces of one mask by the kinds of its values, and by the values of those a trace depends on."""

    def __init__(self) -> None:
        self._traces: OrderedDict[_Key, Traced] = OrderedDict()
        self._specialised: OrderedDict[tuple[Hashable, Hashable], frozenset[str]] = OrderedDict()

    def latest(self) -> Traced | None:
        """The last one made or found."""
        return next(reversed(self._traces.values()), None)

    def get(
        self,
        mask_args: Mapping[str, Any],
        make: Callable[[], Traced],
        captured: Mapping[str, Any] | None = None,
        shape: Hashable = (),
    ) -> Traced:
        """The trace for values like these, made now or found.

        Args:
            mask_args: the mask's arguments.
            make: makes it.
            captured: what fills captured slots.
            shape: what else it depends on.
        """
        kinds = tuple(map(_kind, mask_args.values()))
        values = {**mask_args, **(captured or {})}
        key = self._key(kinds, shape, values)
        traced = self._traces.get(key)
        if traced is None:
            traced = make()
            self._specialised[kinds, shape] = self._specialised.get((kinds, shape), frozenset()) | traced.specialised
            key = self._key(kinds, shape, values)
            self._traces[key] = traced
            for kept in (self._traces, self._specialised):
                while len(kept) > _MOST:
                    kept.popitem(last=False)
        self._traces.move_to_end(key)
        return traced

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that traces hold for good."""
        return tuple(x for traced in self._traces.values() for x in traced.tables if isinstance(x, Tensor))

    def recorded(self, captured: Mapping[str, Any], shape: Hashable) -> Traces:
        """Those for captures as they are now, with these in their slots for good."""
        kept = Traces()
        for key, traced in self._traces.items():
            own = tuple(pair for pair in key.values if not is_captured(pair[0]))
            if key.shape == shape and all(
                exact(name, captured[name]) == x for name, x in key.values if name in captured
            ):
                kept._traces[_Key(key.kinds, (), own)] = traced.filled(captured)
                kept._specialised[key.kinds, ()] = frozenset(name for name, _ in own)
        return kept

    def _key(self, kinds: Hashable, shape: Hashable, values: Mapping[str, Any]) -> _Key:
        names = self._specialised.get((kinds, shape), frozenset())
        return _Key(kinds, shape, tuple((name, exact(name, x)) for name, x in values.items() if name in names))


def exact(name: str, value: Any) -> object:
    """All that a trace may depend on of a value: of a tensor its shape, of a captured one its strides too."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride()) if is_captured(name) else tuple(value.shape)
    return repr(value) if isinstance(value, float) else value


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) if number else (type(value), value)
