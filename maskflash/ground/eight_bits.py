"""Numbers in 16 or 32 bits <-> numbers in 8, each with the scale of its vector: x = scale · code.

    x, one vector of a head    0.31  -2.24  0.007  1.12       its largest magnitude is 2.24
    scale                      2.24 / 448 = 0.005             so that this one becomes the largest code
    codes, float8_e4m3fn       64    -448   1.375  224        4 bits of exponent, 3 of mantissa

Codes of e4m3 are the upper bits of a float16: shifted there they are numbers 2⁸ times too small, subnormal ones too.
So they are widened, since torch's own conversion on a CPU takes several times as long. Only NaN is coded otherwise.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, for e4m3.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FORMAT: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
LARGEST_SCALE: Final = torch.finfo(torch.float32).max / LARGEST  # beyond it the largest code is no float32

_SHIFT: Final = 7  # from e4m3's place in 8 bits to its place in a float16
_SIGNS: Final = ~(1 << 14)  # but for the copy of the sign that the shift leaves beside it
_TOO_SMALL: Final = 256.0  # the quotient of the two formats' units
_NAN: Final = 0x7F  # its code, but for the sign


def scales_of(x: Tensor) -> Tensor:
    """The scale of each vector (..., D), float32 (...): that of its largest finite number, and never 0."""
    x = x.float()
    largest = x.abs().masked_fill_(~x.isfinite(), 0.0).amax(-1)
    return (largest / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)


def quantised(x: Tensor, scales: Tensor) -> Tensor:
    """X (..., D) as float8_e4m3fn under scales that broadcast to (...).

    Numbers beyond 448 scales become the largest there is. What is not finite becomes NaN.
    """
    x = x.float()
    codes = (x / scales[..., None]).clamp_(-LARGEST, LARGEST)
    return codes.masked_fill_(~x.isfinite(), torch.nan).to(FORMAT)


def widen(codes: Tensor, scales: Tensor, out: Tensor, halves: Tensor) -> None:
    """Write scale · code into out.

    Args:
        codes: (..., D) float8_e4m3fn.
        scales: float32 that broadcasts to (...), at most `LARGEST_SCALE`.
        out: (..., D), floating. In 64 bits numbers are exact, in 32 they are rounded once; in 16 they are rounded to
            float32, and then again.
        halves: (..., D) int16, memory for what comes between.
    """
    bits = codes.view(torch.int8)
    halves.copy_(bits).bitwise_left_shift_(_SHIFT).bitwise_and_(_SIGNS)
    # One for each vector: torch multiplies by numbers that several vectors share at a third of the speed.
    factors = scales.to(torch.promote_types(out.dtype, torch.float32)).mul(_TOO_SMALL).expand(codes.shape[:-1])
    factors = factors.contiguous()[..., None]
    if out.dtype.itemsize == 2:
        out.copy_(halves.view(torch.float16) * factors)
    else:
        out.copy_(halves.view(torch.float16)).mul_(factors)
    if bits.device.type != "cpu" or _has_nan(bits):
        out.masked_fill_(bits.bitwise_and(_NAN) == _NAN, torch.nan)


def _has_nan(bits: Tensor) -> bool:
    """Whether there is a NaN: it is the largest of all codes, and of those with a sign."""
    return bits.numel() > 0 and (bool(bits.amax() == _NAN) or bool(bits.view(torch.uint8).amax() == 128 + _NAN))


def widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale · code, in a dtype: see `widen`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    widen(codes, scales, out, torch.empty(codes.shape, dtype=torch.int16, device=codes.device))
    return out
