"""Tensors that a call writes to -> an error where one write would change another's numbers.

torch.ones(1, 1, 2).expand(5, 4, 2)      strides 0, 0, 1      all tokens are one token in memory
cache[:, 0] and cache[:, 1]              bytes interleave     no byte belongs to both
cache and cache[..., :64]                                     the second lies in the first
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from maskflash.errors import ArgumentError

_EFFORT = 1 << 20  # steps of looking for a byte of two tensors, whose bounds overlap; they take some milliseconds


class _Bytes:
    """The memory of a tensor as numpy may describe it; it is never read, and may be a GPU's."""

    def __init__(self, x: Tensor) -> None:
        width = x.element_size()
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": f"|V{width}",
            "shape": tuple(x.shape),
            "strides": tuple(stride * width for stride in x.stride()),
            "data": (x.data_ptr(), False),
        }


def check_apart(operation: str, written: Mapping[str, Tensor]) -> None:
    """Check that each element of these tensors has memory of its own.

    Args:
        operation: what messages call it.
        written: dense tensors by the arguments' names, all on one device.

    Raises:
        ArgumentError: two elements share memory, or can't be told not to.
    """
    for name, x in written.items():
        if not _own_elements(x):
            raise ArgumentError(
                f"{operation}: {name} of shape {tuple(x.shape)} has strides {x.stride()}, expected memory of its own "
                f"for each element, since it is written to; make it once by {name}.contiguous()"
            )
    for (name, x), (other, y) in combinations(written.items(), 2):
        if _share(x, y):
            raise ArgumentError(
                f"{operation}: {other} shares memory with {name}, expected memory of its own, since both are written "
                f"to; make another tensor for {other}"
            )


def _own_elements(x: Tensor) -> bool:
    """Whether each dimension, from the innermost in memory on, steps past all that those before it span."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < span:
                return False
            span += stride * (size - 1)
    return True


def _share(x: Tensor, y: Tensor) -> bool:
    """Whether some byte belongs to both."""
    if not (x.numel() and y.numel()):
        return False
    try:
        return np.shares_memory(np.asarray(_Bytes(x)), np.asarray(_Bytes(y)), max_work=_EFFORT)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
