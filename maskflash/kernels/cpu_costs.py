"""Turns the shape of a dense-kernel call into its predicted cost: the one table that all CPU planning decides by.

The unit is one (query, key) pair of a long float32 call: 4 (forward) or 10 (backward) x heads x head dim
operations. A call over R rows and S columns costs

    call + column · S + R · S / rate(R)

`call` is the Python and dispatch overhead, `column` the traffic of reading K, V and adding to dK, dV, and rate(R)
the kernel's efficiency at R rows.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, Literal

import torch

Pass = Literal["forward", "backward"]

_TABLE_WORK: Final = 8 * 64  # heads x head dim at which the table was measured


@dataclass(frozen=True, slots=True)
class Costs:
    """What calls of one pass cost in one compute dtype.

    Attributes:
        native: compute in the tensors' own dtype; else in float32 copies of them.
        call: overhead of one call, in pairs.
        column: cost of one column of one call, in pairs.
        rows: ascending row counts; rates[i] holds from rows[i] on.
        rates: pairs per unit of cost.
    """

    native: bool
    call: float
    column: float
    rows: tuple[int, ...]
    rates: tuple[float, ...]

    def rate(self, rows: int) -> float:
        """Efficiency of a call of so many rows."""
        return self.rates[max(bisect_right(self.rows, rows) - 1, 0)]

    def of(self, rows: int, columns: int) -> float:
        """Cost of one call, in pairs."""
        return self.call + self.column * columns + rows * columns / self.rate(rows)

    def for_work(self, work: int) -> Costs:
        """The same costs where heads x head dim is `work`: overhead weighs more where a pair is cheaper."""
        return Costs(self.native, self.call * _TABLE_WORK / work, self.column, self.rows, self.rates)


# Measured at B1 H8 D64 on two cores, calls of 16 to 4,096 columns. The kernel splits rows by 32 below 192 rows, by 64
# below 768, by 256 from there: hence the steps. Long spans make backward's columns dear: K, V, dK and dV leave the cache.
_FLOAT32: Final[dict[Pass, Costs]] = {
    "forward": Costs(True, 2500, 10, (1, 8, 16, 32, 192), (0.15, 0.6, 0.8, 0.92, 0.97)),
    "backward": Costs(True, 2000, 50, (1, 8, 16, 32), (0.2, 0.6, 0.9, 1.0)),
}
_WIDENED: Final[dict[Pass, Costs]] = {
    p: Costs(False, c.call, c.column, c.rows, c.rates) for p, c in _FLOAT32.items()
}
# Half types in their own dtype, in pairs of the float32 kernel. Few rows are slow: products of 16-bit tiles are repacked.
_NATIVE_AMX: Final[dict[Pass, Costs]] = {
    "forward": Costs(
        True, 3500, 20, (1, 16, 64, 128, 256, 512, 1024), (0.1, 0.5, 1.2, 1.6, 2.1, 2.5, 2.9)
    ),
    "backward": Costs(True, 9000, 60, (1, 64, 128, 256, 512, 768), (0.05, 0.2, 0.4, 0.65, 0.9, 1.2)),
}
_NATIVE_AVX512: Final[dict[Pass, Costs]] = {
    "forward": Costs(True, 2500, 10, (1, 32, 192, 768), (0.1, 0.6, 0.8, 0.86)),
    "backward": Costs(True, 15000, 60, (1, 64, 192, 768), (0.05, 0.5, 0.9, 1.3)),
}


def candidates(pass_: Pass, dtype: torch.dtype) -> tuple[Costs, ...]:
    """The ways to compute one pass for tensors of `dtype` on this machine; the planner takes the cheapest."""
    if dtype in (torch.float32, torch.float64):
        return (_FLOAT32[pass_],)
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return (_WIDENED[pass_], _NATIVE_AMX[pass_])
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return (_WIDENED[pass_], _NATIVE_AVX512[pass_])
    return (_WIDENED[pass_],)
