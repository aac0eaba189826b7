"""A backward's tensors -> the gradients of what a score looks up, the same bits whichever program comes first.

    walk 1      |dS * d value / d T| summed over each row      float32, no two programs at one place
    units       2^61 of them are at least the sum of all rows  so no sum of integers overflows
    walk 2      dS * d value / d T in units, at its index      int64, added atomically: in any order the same
    at last     sums in units -> the table's dtype

A unit is 2^-61 of all that is added, so what rounding to it loses is far below a float32's own rounding.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.backends.triton.launch import Launcher
from maskflash.scores.strength import BoundScore

_BITS: Final = 61  # of a sum's 63: the rows' sums are rounded
_MOST: Final = 126  # a factor is 2 to this power at most, so that it is a float32


def untouched(score: BoundScore | None) -> tuple[Tensor, ...]:
    """Gradients of tables that nothing was read of."""
    if score is None:
        return ()
    return tuple(map(_zeros_like, _wanted(score)))


def table_gradients(launcher: Launcher, score: BoundScore | None, own: dict[str, Any]) -> tuple[Tensor, ...]:
    """The gradients of a score's tables that want one, dense, in order.

    Args:
        launcher: of the call.
        score: its score.
        own: arguments of the kernel that other passes have too.

    Returns:
        Like the tables. NaN throughout a table to which a sum that is infinite or NaN was to be added.
    """
    wanted = () if score is None else _wanted(score)
    if score is None or not wanted:
        return ()
    batch, heads, q_len, _ = launcher.q.shape
    device = launcher.q.device
    totals = torch.empty((len(wanted), batch, heads, q_len), dtype=torch.float32, device=device)
    sums = [torch.zeros(table.shape, dtype=torch.int64, device=device) for table in wanted]
    named = {f"sums{slot}": x for slot, x in zip(_slots(score), sums, strict=True)}
    factors = torch.ones(len(wanted), dtype=torch.float32, device=device)
    measured = {**own, **named, "totals": totals, "factors": factors}
    launcher.run("dtables", {**measured, "MEASURE": True})
    total = totals.double().flatten(1).sum(1)
    finite = total.isfinite()
    exponents = torch.frexp(torch.where(finite, total, 1.0)).exponent  # a total is less than 2 to its exponent
    powers = (_BITS - exponents).clamp(max=_MOST)
    torch.ldexp(finite.float(), powers, out=factors)  # 0 where nothing can be added
    launcher.run("dtables", {**measured, "MEASURE": False})
    units = torch.where(finite, torch.ldexp(finite.double(), -powers), math.nan)
    return tuple((x * unit).to(table.dtype) for x, unit, table in zip(sums, units, wanted, strict=True))


def _wanted(score: BoundScore) -> tuple[Tensor, ...]:
    return tuple(score.inputs.tables[slot] for slot in _slots(score))


def _slots(score: BoundScore) -> list[int]:
    return [slot for slot, wanted in enumerate(score.wanted) if wanted]


def _zeros_like(table: Tensor) -> Tensor:
    return torch.zeros(table.shape, dtype=table.dtype, device=table.device)
