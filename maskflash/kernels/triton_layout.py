"""Tensors of a call, and the values of a mask's slots -> what the kernels are given: layouts, strides, arguments."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from maskflash.blocks.problem import Problem

_UNIT: Final = 8  # elements: strides that are multiples of it let the compiler load whole vectors
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


def laid_out(*tensors: Tensor) -> tuple[int, list[Tensor]]:
    """Tensors as the kernels address them, and the unit that all their strides but the last are multiples of.

    Their last dimension is dense, and offsets inside a tile (128 tokens at most) fit 32 bits.
    """
    unit = _UNIT if all(x.shape[3] % _UNIT == 0 for x in tensors) else 1

    def fits(x: Tensor) -> bool:
        return x.stride(3) == 1 and x.stride(2) < _LARGEST_STEP and all(step % unit == 0 for step in x.stride()[:3])

    return unit, [x if fits(x) else x.contiguous() for x in tensors]


def strides(unit: int, *tensors: Tensor) -> list[int]:
    """Of every dimension but the last, in units."""
    return [step // unit for x in tensors for step in x.stride()[:3]]


def padded(dim: int) -> int:
    """The power of two, 16 at least, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def mask_arguments(problem: Problem) -> list[Any]:
    """Params, then each table with its sizes and strides: what `emit.signature` names."""
    values: list[Any] = list(problem.inputs.params)
    for table in problem.inputs.tables:
        memory = table.view(torch.uint8) if table.dtype == torch.bool else table
        values += [memory, *table.shape, *table.stride()]
    return values
