"""Bits of e4m3 <-> float32: a sign, 4 bits of exponent (its bias is 7), 3 of mantissa.

0x00 ... 0x07    multiples of 2^-9        0x7e    448, the largest
0x08 ... 0x7e    (1 + m/8) 2^(e - 7)      0x7f    NaN; there is no infinity
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tests.ptx.values import Array


def _numbers() -> Array:
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    values = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa * 2.0**-9)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_NUMBERS: Final = _numbers()
_LARGEST: Final = 448.0


def e4m3_values(bits: Array) -> Array:
    """Bits of e4m3 -> float32."""
    return _NUMBERS[bits]


def e4m3_bits(values: Array) -> Array:
    """Floats -> bits of e4m3, rounded once to nearest even; what is larger than 448 is 448, NaN is 0x7f."""
    size = np.minimum(np.abs(values.astype(np.float64)), _LARGEST)
    exponent = np.maximum(np.floor(np.log2(np.where(size > 0, size, 1.0))), -6)
    step = 2.0 ** (exponent - 3)
    rounded = np.rint(size / step) * step
    bits = np.searchsorted(_NUMBERS[:127], rounded).astype(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), bits | np.signbit(values).astype(np.uint8) << 7)
