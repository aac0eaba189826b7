"""A tensor as torch's attention takes one -> a mask that looks it up: where it is True, or is not as low as can be."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError, DenseMaskWarning
from maskflash.expr.ops import INDEX_VARIABLES
from maskflash.functions.sizes import Sizes
from maskflash.functions.traces import Reading
from maskflash.ground import arguments
from maskflash.masks.mask import Mask
from maskflash.trace.sources import Captured, View
from maskflash.trace.trace import Traced, trace

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
        if not self._takes(tensor.dtype):
            fix = (
                "; one that is added to the scores is the whole mask, or score=mf.scores.bias(x) beside another one"
                if tensor.dtype.is_floating_point
                else "; pass mask.bool() if nonzero means visible"
            )
            raise ArgumentTypeError(f"{operation}: mask has dtype {tensor.dtype}, expected torch.bool{fix}")
        _layout(operation, tensor)
        super().__init__(f"tensor of {' x '.join(map(str, tensor.shape))}", (), {})
        self.tensor = tensor
        self._layout = tensor.shape, tensor.stride()
        self._looks = 0

    @staticmethod
    def _takes(dtype: torch.dtype) -> bool:
        return dtype == torch.bool

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The tensor's entry."""
        layout = _layout("mask", self.tensor)
        return _look_up(layout.of(self.tensor), layout.looks_at, b, h, q, kv)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """One look-up; tensors that look at the same indices are traced once."""
        layout = _layout("mask", self.tensor)
        traced = _trace(layout.looks_at, self.tensor.dtype)
        name = Captured("@mask")
        part = layout.of(self.tensor)
        view = View(name, tuple(part.shape), part.stride(), 0)
        return replace(traced, tables=(view,), specialised=frozenset((name,)))

    def look(self) -> int:
        """Whether the tensor has another shape, or other strides."""
        if self._layout != (self.tensor.shape, self.tensor.stride()):
            self._layout = self.tensor.shape, self.tensor.stride()
            self._looks += 1
        return self._looks

    def reading(self) -> Reading:
        """The tensor."""
        return Reading(self._looks, {"@mask": self.tensor}, (), (self.tensor,))

    def read(self) -> dict[str, Any]:
        """The tensor."""
        return {"@mask": self.tensor}

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """Nothing, if the call has the tensor's sizes."""
        sizes.refuse_offsets(
            "a dense mask's rows and columns are those of q and k",
            "take the part that is meant instead: mask[..., offset : offset + q_len, :]",
        )
        wanted = (sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len)
        shape = (1,) * (4 - self.tensor.ndim) + tuple(self.tensor.shape)
        if any(size not in (1, needed) for size, needed in zip(shape, wanted, strict=True)):
            of_keys = self.tensor.shape == (sizes.batch, sizes.kv_len)
            fix = "; of one that says which keys of each batch row are seen, pass mask[:, None, None]" * of_keys
            raise ArgumentError(
                f"{sizes.operation}: mask has shape {tuple(self.tensor.shape)}, expected {wanted}, or 1 in place of "
                f"any{fix}"
            )
        return {}


class FloatMask(DenseMask):
    """A floating tensor that torch would add to the scores, as a mask: the pair is hidden where it is as low as can be.

    That is -inf, or the lowest number of bfloat16 or below, which libraries write in its place; of float16 its own
    lowest. A row of such numbers alone sees nothing here.
    """

    @staticmethod
    def _takes(dtype: torch.dtype) -> bool:
        return dtype.is_floating_point

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """Whether the tensor's entry leaves the pair visible."""
        return _is_shown(super().__call__(b, h, q, kv), self.tensor.dtype)


def _is_shown(entry: Any, dtype: torch.dtype) -> Any:
    """Whether a number that is added to a score leaves anything of it; NaN does."""
    lowest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
    return not entry <= lowest


class _Layout(NamedTuple):
    """Which of b, h, q and kv a tensor looks at, and the part of it that has an entry for each."""

    looks_at: tuple[str, ...]
    place: tuple[int | slice, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """That part, a view."""
        return tensor[self.place]


def _layout(operation: str, tensor: Tensor) -> _Layout:
    """How a tensor is read: a dimension of 1, or one that was expanded, is one that nobody need look at."""
    if not 2 <= tensor.ndim <= 4:
        raise ArgumentError(
            f"{operation}: mask has shape {tuple(tensor.shape)}, expected (q_len, kv_len), or (batch, heads, q_len, "
            "kv_len) where 1 serves all"
        )
    looked_at = [size != 1 and step != 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    names = INDEX_VARIABLES[4 - tensor.ndim :]
    layout = _Layout(
        tuple(name for name, here in zip(names, looked_at, strict=True) if here),
        tuple(slice(None) if here else 0 for here in looked_at),
    )
    pairs = layout.of(tensor).numel()
    if pairs > MOST_PAIRS:
        raise ArgumentError(
            f"{operation}: mask holds {pairs:,} pairs, more than {MOST_PAIRS:,}; write it as a predicate f(b, h, q, "
            "kv), of which no pair is stored"
        )
    return layout


def dense_mask(operation: str, tensor: Tensor, kind: type[DenseMask] = DenseMask, *, above: int = 2) -> DenseMask:
    """A tensor as a mask, with a warning the first time that there are better ways to write one.

    Args:
        operation: what messages call the call that got it.
        tensor: of bool, or of floats.
        kind: as what.
        above: how many calls of ours are between this one and the user's code.
    """
    global _warned
    mask = kind(operation, tensor)
    if not _warned:
        _warned = True
        warnings.warn(
            f"{operation}: got a dense mask: every pair of it is kept and read. Write it as a predicate f(b, h, q, "
            "kv), or as a preset such as mf.causal() & mf.document(lengths), and no pair is. (This is said once.)",
            DenseMaskWarning,
            stacklevel=2 + above,
        )
    return mask


_warned = False


@lru_cache(maxsize=64)
def _trace(looks_at: tuple[str, ...], dtype: torch.dtype) -> Traced:
    table = torch.zeros((1,) * len(looks_at), dtype=dtype)

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        entry = _look_up(table, looks_at, b, h, q, kv)
        return entry if dtype == torch.bool else _is_shown(entry, dtype)

    return replace(trace(mask), names=("mask",))


def _look_up(table: Tensor, looks_at: tuple[str, ...], *indices: Any) -> Any:
    place = tuple(index for name, index in zip(INDEX_VARIABLES, indices, strict=True) if name in looks_at)
    return table[place] if place else table
