"""The shape of a dense-kernel call -> its predicted cost: the one table that all CPU planning decides by.

The unit is one (query, key) pair of a long unmasked float32 call: 4 (forward) or 10 (backward) x heads x head dim
operations. A call over R rows and S columns costs

    call + column · S + R · S / (rate(R) · (masked if it has a mask else 1))

`call` is the Python and dispatch overhead, `column` the traffic of reading K, V and adding to dK, dV, rate(R) the
kernel's efficiency at R rows, and `masked` that of its extra pass over the scores.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch

Pass = Literal["forward", "backward"]

TABLE_WORK: Final = 8 * 64  # heads x head dim at which the table was measured
_KEY_BLOCK: Final = 512  # columns that torch's kernel takes at once


@dataclass(frozen=True, slots=True)
class Costs:
    """What calls of one pass cost in one compute dtype.

    Attributes:
        native: compute in the tensors' own dtype; else in float32 copies of them.
        call: overhead of one call, in pairs.
        column: cost of one column of one call, in pairs.
        masked: efficiency of a call with a mask, relative to one without.
        rows: ascending row counts; rates[i] holds from rows[i] on.
        rates: pairs per unit of cost.
        flag: whether triangles get the kernel's own causal flag; a call with a bias can't.
        tiled: a call is computed tile by tile, without tiles that nobody sees: nothing is gained by cutting it.
    """

    native: bool
    call: float
    column: float
    masked: float
    rows: tuple[int, ...]
    rates: tuple[float, ...]
    flag: bool = True
    tiled: bool = False

    def rate(self, rows: float) -> float:
        """Efficiency of a call of so many rows."""
        return self.rates[max(bisect_right(self.rows, rows) - 1, 0)]

    def of(self, rows: float, columns: float, *, masked: bool) -> float:
        """Cost of one call, in pairs."""
        rate = self.rate(rows) * (self.masked if masked else 1.0)
        return self.call + self.column * columns + rows * columns / rate

    def of_causal(self, size: int) -> float:
        """Cost of one call of size x size under the kernel's own causal flag, in pairs."""
        if self.tiled:
            return self.of(size, size / 2, masked=True)
        if not self.flag:
            return self.of(size, size, masked=True)
        # The kernel leaves out whole key blocks only: row r is computed up to the next multiple of _KEY_BLOCK.
        whole, rest = divmod(size, _KEY_BLOCK)
        pairs = _KEY_BLOCK**2 * whole * (whole + 1) / 2 + rest * size
        return self.call + self.column * size + pairs / self.rate(size)

    def for_work(self, work: int) -> Costs:
        """The same costs where heads x head dim is `work`: overhead weighs more where a pair is cheaper."""
        return replace(self, call=self.call * TABLE_WORK / work)


# By what torch says the CPU can do. Measured at B1 H8 D64: on two cores of a Xeon with AVX512 (no AMX), calls of 32 to
# 1,024 rows and 128 to 2,048 columns whose data was not in the caches; on one core of an AMD EPYC with AVX2, calls of 8
# to 1,024 rows, repeated (`call` and `column` are the Xeon's). The kernel splits rows by 32 below 192 rows, by 64 below
# 768, by 256 from there: hence the steps. Below 192 rows what was measured with AVX512 differs: 0.83 of full speed at
# first, 0.45 to 0.5 when measured again; the table is between.
_FLOAT32: Final[dict[str, dict[Pass, Costs]]] = {
    "AVX512": {
        "forward": Costs(
            True,
            3000,
            10,
            0.89,
            (1, 8, 16, 32, 64, 96, 160, 192, 320),
            (0.12, 0.35, 0.45, 0.53, 0.57, 0.6, 0.64, 0.92, 0.97),
        ),
        "backward": Costs(True, 2000, 50, 0.94, (1, 8, 16, 32, 96, 192, 320), (0.15, 0.4, 0.5, 0.58, 0.64, 0.92, 1.0)),
    },
    "AVX2": {
        "forward": Costs(
            True,
            3000,
            10,
            0.94,
            (1, 8, 16, 32, 64, 160, 192, 320, 768),
            (0.12, 0.55, 0.66, 0.8, 0.83, 0.86, 0.93, 0.97, 1.05),
        ),
        "backward": Costs(
            True,
            2000,
            50,
            0.97,
            (1, 8, 16, 32, 64, 160, 192, 320, 768),
            (0.15, 0.45, 0.58, 0.68, 0.75, 0.82, 0.87, 0.92, 0.97),
        ),
    },
}
# Forward of bfloat16 in its own dtype, in pairs of the float32 kernel. Few rows are slow: products of 16-bit tiles are
# repacked. Not measured on the machine that the table above comes from, which has no 16-bit products.
_NATIVE_AMX: Final = Costs(True, 3500, 20, 1.0, (1, 16, 64, 128, 256, 512, 1024), (0.1, 0.5, 1.2, 1.6, 2.1, 2.5, 2.9))
_NATIVE_AVX512: Final = Costs(True, 2500, 10, 1.0, (1, 32, 192, 768), (0.1, 0.6, 0.8, 0.86))
TILED: Final = Costs(False, 20_000, 10, 0.97, (1, 8, 32, 64), (0.1, 0.4, 0.8, 1.0), tiled=True)
"""Calls by our own tiles, in either pass: many short operations each."""


def candidates(pass_: Pass, dtype: torch.dtype) -> tuple[Costs, ...]:
    """The ways to compute one pass for tensors of `dtype` on this machine; the planner takes the cheapest."""
    # A CPU that nothing was measured on gets the table by which few rows are worth avoiding.
    costs = _FLOAT32.get(torch.backends.cpu.get_cpu_capability(), _FLOAT32["AVX512"])[pass_]
    if dtype in (torch.float32, torch.float64):
        return (costs,)
    widened = replace(costs, native=False)
    # The kernel's backward adds each of its blocks to gradients of the tensors' own dtype: it rounds too often.
    if pass_ == "backward" or dtype != torch.bfloat16:
        return (widened,)
    if torch.cpu._is_amx_tile_supported():
        return (widened, _NATIVE_AMX)
    if torch.cpu._is_avx512_bf16_supported():
        return (widened, _NATIVE_AVX512)
    return (widened,)
