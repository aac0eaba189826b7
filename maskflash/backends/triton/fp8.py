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
from maskflash.backends.triton.tiles import DIM_IN_8_BITS, least
from maskflash.errors import BackendError
from maskflash.ground.eight_bits import FORMAT

SCALED: Final = 128  # tokens that share a scale: no tile is longer, so of q, k and v each tile has one
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


def check(q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int]) -> None:
    """Check that a call can have 8-bit products.

    Raises:
        BackendError: the device has none, or dtype, head dims, lengths or block size don't suit them.
    """
    dim = max(q.shape[3], v.shape[3])
    reason = why_not_at(q.device, q.shape[2], k.shape[2], block_size)
    if reason is None and q.dtype not in _DTYPES:
        kind = str(q.dtype).removeprefix("torch.")
        reason = f"it takes bfloat16 and float16, which the backward computes in, got {kind}; cast q, k and v"
    if reason is None and dim > DIM_IN_8_BITS:
        reason = f"it serves head dims to {DIM_IN_8_BITS}, got {dim}"
    if reason is not None:
        raise refusal(reason)


def refusal(reason: str) -> BackendError:
    """The error of a call that can't have it."""
    return BackendError(f'attention: precision="fp8" can\'t serve this call: {reason}')


def why_not_at(device: torch.device, q_len: int, kv_len: int, block_size: tuple[int, int]) -> str | None:
    """What keeps all calls at these lengths from it, with the fix; None where nothing does.

    A block of keys may reach beyond the last one, and no block of SCALED tokens is there for a step that begins so far
    out: so blocks of keys divide those. Rows are cut into tiles that divide them, and no tile begins beyond the last.
    """
    rows, keys = least(FORMAT).values()
    if reason := gpu.without_products_in_8_bits(device):
        return reason
    if block_size[0] % rows or block_size[1] % keys or SCALED % block_size[1]:
        return f"it needs blocks of a multiple of {rows} rows, and of 32, 64 or 128 keys, got block_size {block_size}"
    if are_few(q_len, kv_len):
        return (
            f"of {q_len} queries and {kv_len} keys, to bring the keys to 8 bits costs more than it saves; compile "
            "another op without precision for steps of decoding"
        )
    if kv_len > _MOST_KEYS:
        return f"it serves up to {_MOST_KEYS} keys, got {kv_len}; leave precision out"
    return None


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
