"""A mask and a pair -> which of its parts and conditions hid or showed it, with their values and source lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from torch import Tensor

from maskflash.expr.reasons import Reason, Reasons, find_reasons
from maskflash.ground import arguments
from maskflash.masks.combination import Combination, Step, connect
from maskflash.masks.mask import Mask
from maskflash.masks.sight import Sight

_SETTLING: Final = {"bitand": False, "bitor": True}  # what one operand has to be for a join to be that
_SHOWN: Final = 12  # reasons, and parts not looked at, that str() writes out
_OWN: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True, slots=True, eq=False)
class Why:
    """Why a query sees a key or doesn't; true where it does.

    Attributes:
        mask: the mask's name.
        pair: (b, h, q, kv), as asked for.
        visible: the answer.
        reasons: the conditions that decide it, in the order they are looked at.
        unread: conditions that were passed over, since others had settled the matter.
    """

    mask: str
    pair: tuple[int, int, int, int]
    visible: bool
    reasons: tuple[Reason, ...]
    unread: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.visible

    def __str__(self) -> str:
        return "\n".join((self._answer(), *(f"  {line}" for line in self._lines())))

    def _repr_html_(self) -> str:
        from maskflash.visualize import notebook

        return notebook.of_answer(self._answer(), self._lines())

    def _answer(self) -> str:
        b, h, q, kv = self.pair
        place = f" (batch row {b}, head {h})" if b or h else ""
        return f"{self.mask}: query {q} {'sees' if self.visible else 'does not see'} key {kv}{place}"

    def _lines(self) -> list[str]:
        lines = []
        for mask, own in groupby(self.reasons[:_SHOWN], lambda reason: reason.mask):
            lines += [f"{mask}:"] * (mask != self.mask)
            indent = "  " * (mask != self.mask)
            lines += [f"{indent}{reason}{_written(reason)}" for reason in own]
        if len(self.reasons) > _SHOWN:
            lines.append(f"and {len(self.reasons) - _SHOWN} more")
        if self.unread:
            more = f"; and {len(self.unread) - _SHOWN} more" if len(self.unread) > _SHOWN else ""
            lines.append(f"not looked at: {'; '.join(self.unread[:_SHOWN])}{more}")
        return lines


def why(sight: Sight, pair: tuple[int, int, int, int]) -> Why:
    """The answer to `Mask.why` for (b, h, q, kv)."""
    mask, sizes = sight.mask, sight.sizes
    values = arguments.mask_args(sizes.operation, sight.mask_args, mask.keywords, mask.defaults)
    b, h, q, kv = pair
    rows, columns = (int(x[b]) if isinstance(x, Tensor) else x for x in (sizes.q_offset, sizes.kv_offset))
    asked = b, h, q + rows, kv + columns

    def of(part: Mask) -> Reasons:
        own = {name: values[name] for name in part.keywords if name in values}
        problem = Sight.of(part, sizes, own).problem
        return find_reasons(problem.expr, problem.inputs, problem.names, asked, part.name)

    return Why(mask.name, pair, *_find(mask, of))


def _find(mask: Mask, of: Callable[[Mask], Reasons]) -> Reasons:
    """The reasons of a mask; of joined ones those of the parts that decide."""
    if not isinstance(mask, Combination):
        return of(mask)
    steps = mask.steps()
    found = [of(step) if isinstance(step, Mask) else None for step in steps]
    truths: list[bool] = []
    for step, looked_at in zip(steps, found, strict=True):
        if looked_at is not None:
            truths.append(looked_at.truth)
        elif not isinstance(step, Mask):
            truths.append(connect(step[0], *(truths[operand] for operand in step[1])))
    deciding = [part for place in _deciding(steps, truths) if (part := found[place])]
    reasons = tuple(reason for part in deciding for reason in part.reasons)
    return Reasons(truths[-1], reasons, tuple(text for part in deciding for text in part.unread))


def _deciding(steps: list[Step], truths: list[bool]) -> list[int]:
    """The places, in order, of the masks that the last step's truth rests on."""
    rests_on = {len(steps) - 1}
    for place in reversed(range(len(steps))):
        step = steps[place]
        if place not in rests_on or isinstance(step, Mask):
            continue
        op, operands = step
        settled = truths[place] is _SETTLING.get(op)
        rests_on |= {operand for operand in operands if not settled or truths[operand] is truths[place]}
    return sorted(rests_on)


def _written(reason: Reason) -> str:
    """Where a condition was written; conditions of presets are the library's own."""
    source = reason.source
    if source is None or source.filename.startswith(_OWN) or not source.line:
        return ""
    code = f': "{source.text}"' if source.text else ""
    return f"   [{source}{code}]"
