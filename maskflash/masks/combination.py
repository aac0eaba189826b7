"""Masks joined by & | ^ ~ -> a mask of their common arguments.

Masks are joined in loops, so one may be thousands of joins deep. What is done with the masks below a join goes along
its steps, never down by recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, TypeVar

from torch import Tensor

from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import aside
from maskflash.functions.traces import Reading
from maskflash.masks.mask import Mask
from maskflash.trace.combine import Join, combine
from maskflash.trace.sources import Captured
from maskflash.trace.trace import Traced

SYMBOLS: Final = {"bitand": "&", "bitor": "|", "bitxor": "^", "and": "and"}
_LONGEST_NAME: Final = 1000  # characters

Step = Mask | Join
T = TypeVar("T")


class Combination(Mask):
    """Masks joined by a connective; both sides are always reached, as under Python's `&`, but those of "and".

    Attributes:
        op: the connective, as expressions have it.
        parts: two masks, or the one that is negated.
        leaves: how many masks are joined, all told.
    """

    reachable: ClassVar[tuple[str, ...]] = ("parts",)

    def __init__(self, op: str, *parts: Mask) -> None:
        self.op = op
        self.parts = parts
        self.leaves: int = sum(part.leaves if isinstance(part, Combination) else 1 for part in parts)
        self._reading = Reading(-1)  # replaced as a whole, for threads
        keywords = tuple(dict.fromkeys(name for part in parts for name in part.keywords))
        defaults: dict[str, Any] = {}
        for part in parts:
            for name, value in part.defaults.items():
                if all(name not in other.keywords or name in other.defaults for other in parts):
                    defaults.setdefault(name, value)
        implied = tuple(dict.fromkeys(name for part in parts for name in part.implied_names))
        sizes = tuple(dict.fromkeys(size for part in parts for size in part.sizes))
        super().__init__(_name(op, parts, self.leaves), keywords, defaults, implied, sizes)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The parts' answers, joined."""
        return folded(self.steps(), lambda part: part(b, h, q, kv, **own(part, mask_args)), connect)

    def steps(self) -> list[Step]:
        """The joined masks, each once, and their joins, each after its operands; the last is the whole."""
        steps: list[Step] = []
        places: dict[int, int] = {}
        stack: list[tuple[Mask, bool]] = [(self, False)]
        while stack:
            mask, reached = stack.pop()
            if id(mask) in places:
                continue
            if isinstance(mask, Combination) and not reached:
                stack.append((mask, True))
                stack += [(part, False) for part in reversed(mask.parts)]
                continue
            places[id(mask)] = len(steps)
            steps.append(
                (mask.op, tuple(places[id(part)] for part in mask.parts)) if isinstance(mask, Combination) else mask
            )
        return steps

    def joined(self) -> tuple[Mask, ...]:
        """The masks themselves, in order."""
        return self.twin(_masks_of)

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """What any part's call implies."""
        return {name: value for part in self.joined() for name, value in part.implied(sizes).items()}

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The parts' expressions, joined."""
        places = {id(mask): place for place, mask in enumerate(self.joined())}
        tensors: dict[int, Captured] = {}  # names by tensor: masks that hold the same one share a slot

        def of(mask: Mask) -> Traced:
            traced = mask.slots(own(mask, mask_args))[0].traced
            names = {}
            for name, value in mask.reading().slots.items():
                new = Captured(_of_mask(places[id(mask)], name))
                names[name] = tensors.setdefault(id(value), new) if isinstance(value, Tensor) else new
            return traced.renamed(names)

        return combine([of(step) if isinstance(step, Mask) else step for step in self.steps()])

    @property
    def followed(self) -> bool:
        """Whether that is so for all of the masks."""
        return all([mask.followed for mask in self.joined()])

    def look(self) -> int:
        """Whether any of the masks has something else now."""
        masks = self.joined()
        stamp = sum([mask.look() for mask in masks])
        if stamp != self._reading.stamp:
            readings = [mask.reading() for mask in masks]
            slots = {_of_mask(place, name): x for place, of in enumerate(readings) for name, x in of.slots.items()}
            first: dict[int, int] = {}
            tensors = (value for value in slots.values() if isinstance(value, Tensor))
            same = tuple(first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors))
            held = tuple(tensor for mask in masks for tensor in mask.held())
            self._reading = Reading(stamp, slots, (*(of.structure for of in readings), same), held)
        return stamp

    def reading(self) -> Reading:
        """What all of them capture, by mask, and which of their tensors are the same."""
        return self._reading

    def read(self) -> dict[str, Any]:
        """See `reading`."""
        self._look_aside()
        return {_of_mask(place, name): x for place, mask in enumerate(self.joined()) for name, x in mask.read().items()}

    @aside
    def _look_aside(self) -> None:
        self.look()

    def __reduce__(self) -> tuple[Any, ...]:
        return _joined_again, (self.steps(),)


def _masks_of(whole: Combination) -> tuple[Mask, ...]:
    return tuple([step for step in whole.steps() if isinstance(step, Mask)])


def negated(mask: Mask) -> Combination:
    """The pairs that a mask hides."""
    return Combination("not", mask)


def joined(mask: Mask, other: Mask, op: str) -> Mask:
    """Two masks under a connective."""
    return Combination(op, mask, other)


def connect(op: str, x: Any, *others: Any) -> Any:
    """A connective, of the parts' answers."""
    match op:
        case "not":
            return x ^ True
        case "bitand" | "and":
            return x & others[0]
        case "bitor":
            return x | others[0]
    return x ^ others[0]


def folded(steps: Sequence[Step], of_mask: Callable[[Mask], T], of_join: Callable[..., T]) -> T:
    """The value of the last step, from those of masks and, at joins, from the connective and its operands' values."""
    last = {operand: place for place, step in enumerate(steps) if isinstance(step, tuple) for operand in step[1]}
    values: dict[int, T] = {}  # that are still needed
    for place, step in enumerate(steps):
        if isinstance(step, Mask):
            values[place] = of_mask(step)
            continue
        op, operands = step
        value = of_join(op, *(values[operand] for operand in operands))
        for operand in {operand for operand in operands if last[operand] == place}:
            del values[operand]
        values[place] = value
    return values[len(steps) - 1]


def _of_mask(place: int, name: str) -> str:
    """What a combination calls a value that one of its masks captures."""
    return f"@{place}.{name[1:]}"


def own(part: Mask, mask_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that one of the joined masks takes."""
    return {name: mask_args[name] for name in (*part.keywords, *part.implied_names) if name in mask_args}


def _name(op: str, parts: Sequence[Mask], leaves: int) -> str:
    """The connective as one would write it; of what would be too long to read, how many masks there are."""
    names = [
        f"({part})" if isinstance(part, Combination) and part.op not in ("not", op) else f"{part}" for part in parts
    ]
    name = f"~{names[0]}" if op == "not" else f" {SYMBOLS[op]} ".join(names)
    return name if len(name) <= _LONGEST_NAME else f"{leaves:,} joined mask{'s' * (leaves > 1)}"


def _joined_again(steps: Sequence[Step]) -> Mask:
    """The mask of such steps."""
    masks: list[Mask] = []
    for step in steps:
        masks.append(step if isinstance(step, Mask) else Combination(step[0], *(masks[place] for place in step[1])))
    return masks[-1]
