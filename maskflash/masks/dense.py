"""A boolean tensor, as torch's attention takes one, -> a mask that looks it up."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from maskflash import arguments
from maskflash.errors import ArgumentError, ArgumentTypeError, DenseMaskWarning
from maskflash.expr.nodes import INDEX_VARIABLES
from maskflash.expr.trace import Traced, trace
from maskflash.masks.mask import Call, Mask

MOST_PAIRS: Final = 1 << 30  # of a dense mask; a byte each, and as much again while it is analysed


class DenseMask(Mask):
    """A boolean tensor as a mask: True where the pair is visible.

    Every pair of it is read to find the tiles, and a backward pass needs it unchanged; a predicate, a preset or column
    intervals say the same in less. Rows are the query tensor's own, so it takes no q_offset.

    Attributes:
        tensor: (q_len, kv_len), or with heads or with batch and heads before; a dimension of 1 serves all.

    Raises:
        ArgumentTypeError: not a tensor of bool.
        ArgumentError: a shape that means nothing, or too many pairs.

    Example:
        >>> DenseMask("example", torch.tensor([[True, False], [True, True]])).block_map(2, 2, block_size=1).counts
        {'full': 3, 'partial': 0, 'skip': 1}
    """

    def __init__(self, operation: str, tensor: Tensor) -> None:
        arguments.held(operation, "mask", tensor, on_meta=True)
        if tensor.dtype != torch.bool:
            fix = (
                "; one that is added to the scores is `mask == 0` if it holds 0 and -inf, else it has no form here"
                if tensor.dtype.is_floating_point
                else "; pass mask.bool() if nonzero means visible"
            )
            raise ArgumentTypeError(f"{operation}: mask has dtype {tensor.dtype}, expected torch.bool{fix}")
        if not 2 <= tensor.ndim <= 4:
            raise ArgumentError(
                f"{operation}: mask has shape {tuple(tensor.shape)}, expected (q_len, kv_len), or (batch, heads, "
                "q_len, kv_len) where 1 serves all"
            )
        shape = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
        stride = (0,) * (4 - tensor.ndim) + tensor.stride()
        # A dimension that was expanded is one that nobody need look at.
        seen = [size != 1 and step != 0 for size, step in zip(shape, stride, strict=True)]
        table = tensor[tuple(slice(None) if here else 0 for here in seen[4 - tensor.ndim :])]
        if table.numel() > MOST_PAIRS:
            raise ArgumentError(
                f"{operation}: mask holds {table.numel():,} pairs, more than {MOST_PAIRS:,}; write it as a predicate "
                "f(b, h, q, kv), of which no pair is stored"
            )
        super().__init__(f"tensor of {' x '.join(map(str, tensor.shape))}", (), {})
        self.tensor = tensor
        self._shape = shape
        self._table = table
        self._looks_at = tuple(name for name, here in zip(INDEX_VARIABLES, seen, strict=True) if here)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The tensor's entry."""
        return _look_up(self._table, self._looks_at, b, h, q, kv)

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """One look-up; tensors that look at the same indices are traced once."""
        return replace(_trace(self._looks_at), tables=(self._table,))

    def implied(self, call: Call) -> dict[str, int]:
        """Nothing, if the call has the tensor's sizes."""
        if isinstance(call.q_offset, Tensor) or call.q_offset != 0:
            raise ArgumentError(
                f"{call.operation}: got a q_offset with a dense mask, whose rows are those of q; take the rows "
                "instead: mask[..., offset : offset + q_len, :]"
            )
        wanted = (call.batch, call.heads, call.q_len, call.kv_len)
        if any(size not in (1, needed) for size, needed in zip(self._shape, wanted, strict=True)):
            raise ArgumentError(
                f"{call.operation}: mask has shape {tuple(self.tensor.shape)}, expected {wanted}, or 1 in place of any"
            )
        return {}


def dense_mask(operation: str, tensor: Tensor) -> DenseMask:
    """A tensor as a mask, with a warning the first time that there are better ways to write one."""
    global _warned
    mask = DenseMask(operation, tensor)
    if not _warned:
        _warned = True
        warnings.warn(
            f"{operation}: got a dense mask: every pair of it is kept and read. Write it as a predicate f(b, h, q, "
            "kv), or as a preset such as mf.causal() & mf.document(lengths), and no pair is. (This is said once.)",
            DenseMaskWarning,
            stacklevel=4,
        )
    return mask


_warned = False


@lru_cache(maxsize=16)
def _trace(looks_at: tuple[str, ...]) -> Traced:
    table = torch.zeros((1,) * len(looks_at), dtype=torch.bool)
    return replace(trace(lambda b, h, q, kv: _look_up(table, looks_at, b, h, q, kv)), names=("mask",))


def _look_up(table: Tensor, looks_at: tuple[str, ...], *indices: Any) -> Any:
    place = tuple(index for name, index in zip(INDEX_VARIABLES, indices, strict=True) if name in looks_at)
    return table[place] if place else table
