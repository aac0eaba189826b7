"""Masks joined by & | ^ ~ -> a mask of their common arguments."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

from torch import Tensor

from maskflash.expr.combine import combine
from maskflash.expr.trace import Traced
from maskflash.expr.tracer import Captured
from maskflash.masks.base import Mask
from maskflash.masks.call import Call
from maskflash.masks.traces import Traces

SYMBOLS: Final = {"bitand": "&", "bitor": "|", "bitxor": "^"}


class Combination(Mask):
    """Masks joined by a connective; both sides are always reached, as under Python's `&`."""

    reachable = ("parts",)

    def __init__(self, op: str, *parts: Mask) -> None:
        self.op = op
        self.parts = parts
        self._traces = Traces()
        names = [f"({part})" if isinstance(part, Combination) and part.op != "not" else f"{part}" for part in parts]
        keywords = tuple(dict.fromkeys(name for part in parts for name in part.keywords))
        defaults: dict[str, Any] = {}
        for part in parts:
            for name, value in part.defaults.items():
                if all(name not in other.keywords or name in other.defaults for other in parts):
                    defaults.setdefault(name, value)
        name = f"~{names[0]}" if op == "not" else f" {SYMBOLS[op]} ".join(names)
        implied = tuple(dict.fromkeys(name for part in parts for name in part.implied_names))
        sizes = tuple(dict.fromkeys(size for part in parts for size in part.sizes))
        super().__init__(name, keywords, defaults, implied, sizes)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The parts' answers, joined."""
        return self.join(*(part(b, h, q, kv, **own(part, mask_args)) for part in self.parts))

    def join(self, x: Any, *others: Any) -> Any:
        """The connective, of the parts' answers."""
        match self.op:
            case "not":
                return x ^ True
            case "bitand":
                return x & others[0]
            case "bitor":
                return x | others[0]
        return x ^ others[0]

    def implied(self, call: Call) -> dict[str, int]:
        """What any part's call implies."""
        return {name: value for part in self.parts for name, value in part.implied(call).items()}

    def template(self, mask_args: dict[str, Any]) -> Traced:
        """The parts' expressions, joined."""
        self.look()
        return self._traces.get(mask_args, lambda: self._combined(mask_args), self.captured(), self.structure())

    def _combined(self, mask_args: dict[str, Any]) -> Traced:
        first: dict[int, str] = {}  # name of each tensor: parts that hold the same one share a slot
        names = {
            name: first.setdefault(id(value), name) if isinstance(value, Tensor) else name
            for name, value in self.captured().items()
        }
        parts = (
            part.template(own(part, mask_args)).renamed(
                {name: Captured(names[_of_part(place, name)]) for name in part.captured()}
            )
            for place, part in enumerate(self.parts)
        )
        return combine(self.op, tuple(parts))

    def look(self) -> int:
        """Whether any part has something else now."""
        return sum(part.look() for part in self.parts)

    def captured(self) -> dict[str, Any]:
        """What all parts capture, by part."""
        return {
            _of_part(place, name): x for place, part in enumerate(self.parts) for name, x in part.captured().items()
        }

    def read(self) -> dict[str, Any]:
        """See `captured`."""
        return {_of_part(place, name): x for place, part in enumerate(self.parts) for name, x in part.read().items()}

    def structure(self) -> Hashable:
        """The parts' shapes, and which of their tensors are the same."""
        first: dict[int, int] = {}
        tensors = (value for value in self.captured().values() if isinstance(value, Tensor))
        same = tuple(first.setdefault(id(value), place) for place, value in enumerate(tensors))
        return (*(part.structure() for part in self.parts), same)

    def held(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(tensor for part in self.parts for tensor in part.held())

    def known(self) -> Traced | None:
        """The latest, or the only one."""
        latest = self._traces.latest() if self.keywords else None
        return latest.filled(self.captured()) if latest else super().known()

    def __reduce__(self) -> tuple[Any, ...]:
        return Combination, (self.op, *self.parts)


def _of_part(place: int, name: str) -> str:
    """What a combination calls a value that one of its parts captures."""
    return f"@{place}.{name[1:]}"


def own(part: Mask, mask_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that one of the joined masks takes."""
    return {name: mask_args[name] for name in (*part.keywords, *part.implied_names) if name in mask_args}
