"""q, k and v in 16 bits -> what the forward kernel takes in 8 bits; or why a call can't have precision="fp8"."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.backends.incoherence import quantise
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton.few import are_few
from maskflash.backends.triton.layout import addressed
from maskflash.errors import BackendError
from maskflash.ground.eight_bits import FORMAT

SCALED: Final = 128  # tokens that share a scale: no tile is longer, so of q, k and v each tile has one
_LEAST: Final = (64, 32)  # rows and keys of a tile: of fewer, Hopper's products are of 16 bits, or there are none
_DTYPES: Final = (torch.bfloat16, torch.float16)
_MOST_KEYS: Final = 2**23 - SCALED  # offsets inside a tile of v, whose head dims lie so far apart, fit 32 bits


class EightBits(NamedTuple):
    """Operands of a forward in 8 bits.

    Attributes:
        q: (B, Hq, Sq, P) e4m3, after incoherent processing.
        k: (B, Hkv, Skv, P) e4m3, after incoherent processing.
        v: (B, Hkv, Skv, Dv) e4m3; in memory the tokens of a head dim lie side by side.
        arguments: they and their scales, as arguments of the kernel.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    arguments: dict[str, Any]


def check(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> None:
    """Check that a call can have 8-bit products.

    Raises:
        BackendError: the device has none, or the dtype, the lengths or the block size don't suit them.
    """
    reason = gpu.without_products_in_8_bits(q.device)
    q_len, kv_len = q.shape[2], k.shape[2]
    if reason is None and q.dtype not in _DTYPES:
        kind = str(q.dtype).removeprefix("torch.")
        reason = f"it takes bfloat16 and float16, which the backward computes in, got {kind}; cast q, k and v"
    if reason is None and any(size % least for size, least in zip(block_size, _LEAST, strict=True)):
        reason = f"it needs a block_size of multiples of {_LEAST}, got {block_size}"
    if reason is None and are_few(q_len, kv_len):
        reason = (
            f"of {q_len} queries and {kv_len} keys, to bring the keys to 8 bits costs more than it saves; compile "
            "another op without precision for steps of decoding"
        )
    if reason is None and kv_len > _MOST_KEYS:
        reason = f"it serves up to {_MOST_KEYS} keys, got {kv_len}; leave precision out"
    if reason is not None:
        raise BackendError(f'attention: precision="fp8" can\'t serve this call: {reason}')


def eight_bits(q: Tensor, k: Tensor, v: Tensor) -> EightBits:
    """Quantise the operands of a call.

    Products of 8 bits want both operands with the numbers that they sum over side by side. Of P V these are v's tokens,
    so v is written turned around, once more a read and a write of its bytes; and filled with zeros up to whole blocks,
    so that the kernel loads vectors there too.
    """
    turned, keys = quantise(q, SCALED, incoherent=True), quantise(k, SCALED, incoherent=True)
    values = quantise(v, SCALED)
    kv_len = v.shape[2]
    columns = pad(values.values.view(torch.uint8).mT, (0, -kv_len % SCALED)).contiguous().view(FORMAT)
    arguments = {
        **addressed(q=turned.values, k=keys.values, v=columns),
        **{"q_scales": turned.scales, "k_scales": keys.scales, "v_scales": values.scales},
        "SCALED": SCALED,
    }
    return EightBits(turned.values, keys.values, columns.mT[:, :, :kv_len], arguments)
