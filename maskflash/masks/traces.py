"""A mask's arguments -> the trace for their kinds, made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from maskflash.expr.trace import Traced


class Traces:
    """Traces of one mask by the kinds of its arguments, and by the value of those a trace depends on."""

    def __init__(self) -> None:
        self._traces: dict[object, Traced] = {}
        self._specialised: dict[object, frozenset[str]] = {}

    def latest(self) -> Traced | None:
        """The last one made."""
        return next(reversed(self._traces.values()), None)

    def captures(self) -> bool:
        """Whether a trace holds tensors of its own."""
        return any(isinstance(table, Tensor) for traced in self._traces.values() for table in traced.tables)

    def get(self, mask_args: dict[str, Any], make: Callable[[], Traced]) -> Traced:
        """The trace for arguments like these, made now or found."""
        kinds = tuple(map(_kind, mask_args.values()))
        traced = self._traces.get(self._key(kinds, mask_args))
        if traced is None:
            traced = make()
            self._specialised[kinds] = self._specialised.get(kinds, frozenset()) | traced.specialised
            self._traces[self._key(kinds, mask_args)] = traced
        return traced

    def _key(self, kinds: object, mask_args: dict[str, Any]) -> object:
        names = self._specialised.get(kinds, frozenset())
        return kinds, tuple(_value(value) for name, value in mask_args.items() if name in names)


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    return type(value) if isinstance(value, int) and not isinstance(value, bool) else (type(value), value)


def _value(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value
