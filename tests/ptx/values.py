"""Bits of registers <-> numbers of a PTX type, and arithmetic on them that rounds once.

A register is an array of unsigned integers, one for each thread, or of bools for a predicate. As numbers they are

    u32, b32       the bits themselves
    s32            their int32 view
    f32, f64       their float view
    f16, bf16      float64, which holds every product and (but for `odd_sum`) every sum of theirs exactly
    f16x2, bf16x2  float64 with a second axis of two: the low half first

and likewise for other widths.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.ptx.faults import Unsupported

Array = npt.NDArray[Any]

UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: Final = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
DTYPES: Final[dict[str, Any]] = {
    **{f"{sort}{8 * size}": dtype for size, dtype in UNSIGNED.items() for sort in "ub"},
    **{f"s{8 * size}": dtype for size, dtype in _SIGNED.items()},
    **{"f32": np.float32, "f64": np.float64, "pred": np.bool_},
}
HALVES: Final = ("f16", "bf16", "f16x2", "bf16x2")
_SMALLEST: Final = 2.0**-126  # normal float32
_DROPPED: Final = np.uint64((1 << 29) - 1)  # bits of a float64 that a float32 has no room for
_TIE: Final = np.uint64(1 << 28)  # they are exactly one half


def size_of(kind: str) -> int:
    """Bytes of a type; 0 for a predicate.

    Raises:
        Unsupported: there is no such type.
    """
    if kind == "pred":
        return 0
    if kind in HALVES:
        return 4 if kind.endswith("x2") else 2
    if kind not in DTYPES:
        raise Unsupported(f"type {kind}")
    return int(np.dtype(DTYPES[kind]).itemsize)


def is_float(kind: str) -> bool:
    """Whether numbers of a type are floats."""
    return kind in HALVES or kind[0] == "f"


def decode(bits: Array, kind: str) -> Array:
    """Unsigned integers of the type's size -> numbers."""
    if kind not in HALVES:
        return bits.view(DTYPES[kind]) if kind[0] in "sf" else bits
    halves = np.ascontiguousarray(bits).view(np.uint16)
    if kind.endswith("x2"):
        halves = halves.reshape(*np.shape(bits), 2)
    wide = halves.view(np.float16) if kind[0] == "f" else bf16_values(halves)
    return wide.astype(np.float64).reshape(halves.shape if kind.endswith("x2") else np.shape(bits))


def encode(values: Array, kind: str) -> Array:
    """Numbers -> unsigned integers of the type's size, rounded to nearest even where the type is a half."""
    if kind not in HALVES:
        typed = np.asarray(values, DTYPES[kind])
        return typed if kind == "pred" else typed.view(UNSIGNED[typed.dtype.itemsize])
    bits = f16_bits(values) if kind[0] == "f" else bf16_bits(values)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0] if kind.endswith("x2") else bits


def bf16_values(bits: Array) -> Array:
    """Bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(values: Array) -> Array:
    """Floats -> bits of bfloat16, rounded once; NaN is 0x7fff."""
    bits = odd_float32(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def toward_zero(values: Array) -> Array:
    """Floats -> the float16 next to them towards zero, as a number."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float16)
    return np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float16(0)), near).astype(np.float64)


def f16_bits(values: Array) -> Array:
    """Floats -> bits of float16, rounded once; NaN is 0x7fff."""
    return np.where(np.isnan(values), np.uint16(0x7FFF), np.asarray(values).astype(np.float16).view(np.uint16))


def odd_float32(values: Array) -> Array:
    """Floats -> float32; what it can't hold goes to the odd one of its neighbours, so that rounding again is right.

    Source: Boldo and Melquiond, Emulation of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd,
    2008.
    """
    if values.dtype == np.float32:
        return np.ascontiguousarray(values)
    near = np.asarray(values.astype(np.float32))
    bits = near.view(np.uint32)
    move = np.isfinite(values) & (near != values) & (bits & np.uint32(1) == 0)
    beyond = np.abs(near) > np.abs(values)
    return np.where(move, np.where(beyond, bits - np.uint32(1), bits + np.uint32(1)), bits).view(np.float32)


def odd_sum(a: Array, b: Array) -> Array:
    """The sum of float64, rounded to odd: see `odd_float32`."""
    total = a + b
    back = total - a
    lost = (a - (total - back)) + (b - back)  # exactly (Knuth's two-sum)
    bits = np.asarray(total).view(np.uint64)
    move = np.isfinite(total) & (lost != 0) & (bits & np.uint64(1) == 0)
    outwards = (lost > 0) == (total > 0)
    return np.where(move, np.where(outwards, bits + np.uint64(1), bits - np.uint64(1)), bits).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float32, rounded once.

    In float64 the product is exact. The sum is rounded there, which matters only where that makes a tie of it, or where
    float32 has fewer bits than it has for normal numbers.
    """
    product = a.astype(np.float64) * b
    total = product + c
    ties = np.asarray(total).view(np.uint64) & _DROPPED == _TIE
    if ties.any() or (np.abs(total) < _SMALLEST).any():
        total = odd_sum(product, np.asarray(c, np.float64))
    return np.asarray(total.astype(np.float32))


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded once: by fractions, thread by thread, where anything is rounded."""
    a, b, c = np.broadcast_arrays(a, b, c)
    out = np.array(a * b + c)
    for place in np.flatnonzero(np.isfinite(out) & (a * b != 0) & (c != 0)):
        out[place] = float(Fraction(float(a[place])) * Fraction(float(b[place])) + Fraction(float(c[place])))
    return out


def flush(values: Array) -> Array:
    """Subnormal float32 -> zero of its sign."""
    return np.where(np.abs(values) < np.float32(_SMALLEST), np.copysign(np.float32(0), values), values)


def quotient(a: Array, b: Array) -> Array:
    """Integers divided towards zero. By zero anything may come: all ones."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    out = a // divisor
    if a.dtype.kind == "i":
        out = out + ((a != out * divisor) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), out).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    """What `quotient` leaves, with the sign of a."""
    return (a - quotient(a, b) * b).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product of integers."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return np.asarray(((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype))
    exact = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in np.broadcast(a, b)]
    return np.array(exact, np.uint64).view(a.dtype)


def to_integer(values: Array, source: str, target: str) -> Array:
    """Whole floats -> integers, clamped; NaN is 0, or the top bit alone where 64 bits take part."""
    dtype = DTYPES[target]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    wide = values.astype(np.float64)
    inside = (wide > float(low)) & (wide < float(high))
    out = np.where(inside, np.where(inside, wide, 0).astype(dtype), np.where(wide > 0, dtype(high), dtype(low)))
    nothing = 1 << 8 * size_of(target) - 1 if "64" in source + target else 0
    return np.where(np.isnan(wide), np.array(nothing, np.uint64).astype(UNSIGNED[size_of(target)]).view(dtype), out)
