"""Masks joined by & | ^ ~ -> a mask of their common arguments."""

from __future__ import annotations

from typing import Any, Final

from maskflash.expr.combine import combine
from maskflash.expr.trace import Traced
from maskflash.masks.base import Mask
from maskflash.masks.call import Call
from maskflash.masks.traces import Traces

SYMBOLS: Final = {"bitand": "&", "bitor": "|", "bitxor": "^"}


class Combination(Mask):
    """Masks joined by a connective; both sides are always reached, as under Python's `&`."""

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

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """The parts' expressions, joined."""
        return self._traces.get(
            mask_args,
            lambda: combine(self.op, tuple(part.traced(own(part, mask_args)) for part in self.parts)),
        )

    def known(self) -> Traced | None:
        """The latest, or the only one."""
        return self._traces.latest() or super().known()

    def __reduce__(self) -> tuple[Any, ...]:
        return Combination, (self.op, *self.parts)


def own(part: Mask, mask_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that one of the joined masks takes."""
    return {name: mask_args[name] for name in (*part.keywords, *part.implied_names) if name in mask_args}
