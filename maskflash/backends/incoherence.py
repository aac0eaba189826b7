"""Tensors -> e4m3 values and float32 scales, and back: x is about values * scale.

One scale for each head and block of tokens, so that the block's largest magnitude becomes 448, e4m3's largest number:

    tokens   0 ............ 127 | 128 .......... 255 | 256 ... 299        block = 128
    scales          s[0]        |        s[1]        |    s[2]            s = largest / 448

e4m3 has a sign, 4 bits of exponent and 3 of mantissa: rounding moves a number between 2^-6 and 448 by at most a
sixteenth of itself, a smaller one by at most 2^-10. It has NaN, and no infinity.

**Incoherent processing** of q and k: both are multiplied by one orthogonal matrix M, so their products stay what they
are, and what stands out in one dim is spread over all of them. M is a diagonal of random signs times a Hadamard matrix:

    q . k = (q M) . (k M)          M = diag(+-1) H / sqrt(P),     H = | 1  1 | x ... x | 1  1 |
                                                                      | 1 -1 |         | 1 -1 |

The signs keep vectors that are themselves rows of H, constant ones say, from becoming one large number.

Source: Shah et al., FlashAttention-3, 2024, section 3.3; Chee et al., QuIP, 2023, for incoherence.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.errors import BackendError
from maskflash.ground import modes
from maskflash.ground.eight_bits import LARGEST, quantised
from maskflash.ground.transfer import capturing

_SEED: Final = 0  # of M's signs: the same in every process, so the same inputs give the same bits
_APART: Final = 2.0**-60  # least scale by the head's largest: quotients of scales times sums of values stay finite
_LEAST: Final = 2 * torch.finfo(torch.float32).tiny  # of scales: normal numbers, however a factor is rounded


class Quantised(NamedTuple):
    """A tensor in 8 bits.

    Attributes:
        values: (B, H, S, P) float8_e4m3fn.
        scales: (B, H, ceil(S / block)) float32, positive, normal and finite.
    """

    values: Tensor
    scales: Tensor


def quantise(x: Tensor, block: int, *, incoherent: bool = False) -> Quantised:
    """A tensor in e4m3 with a scale for each block of tokens.

    Numbers that are not finite have no say in scales. In values they are NaN: the number alone, or all numbers of its
    token after incoherent processing.

    Args:
        x: (B, H, S, D), any strides and floating dtype; computed in float32.
        block: tokens of a block; the last one may be shorter.
        incoherent: multiply each token by M first. Then P is `width(D)`, else it is D.

    Raises:
        BackendError: a CUDA graph is being captured, and M isn't on the device yet.
    """
    x = x.float()
    factor = 1.0
    if incoherent:
        # Signs alone: 16-bit inputs and 1 are exact in TF32 too, should torch be told to use it. 1/sqrt(P) goes to the
        # scales. Nor may autocast bring the product to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            x = x @ incoherence(x.shape[3], x.device)
        factor = x.shape[3] ** -0.5
    magnitudes = torch.where(x.isfinite(), x.abs(), 0.0)
    tokens = magnitudes.amax(3) if x.shape[3] else magnitudes.sum(3)
    del magnitudes  # as large as x
    blocks = pad(tokens, (0, -x.shape[2] % block)).unflatten(2, (-1, block)).amax(3)
    scales = _scales(blocks, _LEAST / factor)
    return Quantised(quantised(x, spread(scales, block, x.shape[2])), scales * factor)


def spread(scales: Tensor, block: int, tokens: int) -> Tensor:
    """Scales (B, H, blocks) -> (B, H, tokens), of each token its block's."""
    return scales.repeat_interleave(block, 2)[:, :, :tokens]


def dequantise(quantised: Quantised, block: int) -> Tensor:
    """The float32 numbers that values and scales stand for; those of q M or k M after incoherent processing."""
    values, scales = quantised
    return values.float() * spread(scales, block, values.shape[2])[..., None]


def width(dim: int) -> int:
    """P, of M: the power of two that holds dim, 32 at least, which is the least that 8-bit products sum over."""
    return max(32, 1 << (dim - 1).bit_length())


@cache  # for good: CUDA graphs hold its address, and nobody tells when the last one is gone
def incoherence(dim: int, device: torch.device) -> Tensor:
    """M for vectors of `dim` numbers, without its factor 1/sqrt(P): (dim, P) float32 of 1 and -1.

    P is `width(dim)`. Vectors of other lengths count as followed by zeros, so their M has rows that are orthogonal, and
    no inverse.

    Raises:
        BackendError: it isn't on the device yet, and a CUDA graph is being captured there, which would keep the copy.
    """
    if capturing(device):
        raise BackendError(
            f'attention: a CUDA graph is being captured, and no call with precision="fp8" and head dim {dim} has run '
            "on its device yet; run the same call once before the capture"
        )
    draw = random.Random(_SEED)
    with modes.off():
        signs = torch.tensor(
            [1.0 if draw.random() < 0.5 else -1.0 for _ in range(dim)], dtype=torch.float32, device="cpu"
        )
        matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while matrix.shape[0] < width(dim):
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return (signs[:, None] * matrix[:dim]).to(device)


def _scales(largest: Tensor, least: float) -> Tensor:
    """The scales of blocks whose largest magnitudes are (..., blocks): 1 where all blocks hold zeros alone."""
    if not largest.numel():
        return largest
    head = largest.amax(-1, keepdim=True)
    scales = torch.maximum(largest, head * _APART) / LARGEST
    return torch.where(head == 0, 1.0, scales.clamp_min(least))
