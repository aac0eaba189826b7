"""Tensors of a call, and the values of a mask's slots -> arguments of the kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.problem import Problem

UNIT: Final = 8  # elements: head dims and strides are multiples of it, so that the compiler loads whole vectors
ALIGNMENT: Final = 16  # bytes of a vector
_LARGEST_STEP: Final = 2**23  # elements from token to token


def without_hidden(seen: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors (B, heads, tokens, n) with zeros for the tokens that nobody sees: 0 * NaN would be NaN in the kernels.

    See docs/decisions/0007 for what keeping them out inside the kernels costs.
    """
    if seen is None:
        return list(tensors)
    if seen.shape[1] > 1:  # query heads of a group share a key head: one that sees a token is enough
        seen = seen.unflatten(1, (tensors[0].shape[1], -1)).any(2)
    return [torch.where(seen[..., None], x, 0.0) for x in tensors]


def laid_out(*tensors: Tensor) -> list[Tensor]:
    """Tensors (B, heads, tokens, n) as the kernels address them; zeros are added to the last dimension where needed.

    It is dense and a multiple of UNIT long, as are all strides, and offsets inside a tile (128 tokens at most) fit 32
    bits. The first element lies at a multiple of ALIGNMENT: for others Triton compiles another kernel, which loads
    each number alone.
    """
    longer = (x if x.shape[3] % UNIT == 0 else pad(x, (0, -x.shape[3] % UNIT)) for x in tensors)
    return [x if _fits(x) else x.clone(memory_format=torch.contiguous_format) for x in longer]


def _fits(x: Tensor) -> bool:
    return (
        x.stride(3) == 1
        and x.stride(2) < _LARGEST_STEP
        and all(step % UNIT == 0 for step in x.stride()[:3])
        and x.data_ptr() % ALIGNMENT == 0
    )


def cut(x: Tensor, dim: int) -> Tensor:
    """A result without what `laid_out` added to its last dimension."""
    return x if x.shape[3] == dim else x[..., :dim].contiguous()


def addressed(**tensors: Tensor) -> dict[str, Any]:
    """Tensors (B, heads, tokens, n) and their strides but for the last, in units of UNIT elements, as arguments."""
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        batch_step, head_step, token_step, _ = x.stride()
        found[f"{name}_ptr"] = x
        found[f"{name}_b"] = batch_step // UNIT
        found[f"{name}_h"] = head_step // UNIT
        found[f"{name}_s"] = token_step // UNIT
    return found


def whole(dim: int) -> int:
    """A head dim as `laid_out` makes it."""
    return -(-dim // UNIT) * UNIT


def padded(dim: int) -> int:
    """The power of two, 16 at least, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def mask_values(problem: Problem) -> dict[str, Any]:
    """Offsets, params, and each table with its sizes and strides, as arguments: see `signature`."""
    found: dict[str, Any] = {"q_offset": _dense(problem.q_offset), "kv_offset": _dense(problem.kv_offset)}
    for slot, value in enumerate(problem.expr.coded(problem.inputs.params)):
        found[f"p{slot}"] = value
    for slot, table in enumerate(problem.inputs.tables):
        found[f"t{slot}"] = table.view(torch.uint8) if table.dtype == torch.bool else table  # bytes in memory
        for axis, (size, step) in enumerate(zip(table.shape, table.stride(), strict=True)):
            found[f"t{slot}_size{axis}"] = size
            found[f"t{slot}_stride{axis}"] = step
    return found


def _dense(offset: int | Tensor) -> int | Tensor:
    return offset.contiguous() if isinstance(offset, Tensor) else offset
