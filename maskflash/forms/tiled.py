"""Lists of tiles and a function for the partial ones -> a mask, for calls of the one size that the lists are for.

visible = tile is full, or tile is partial and function(b, h, q, kv)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.errors import ArgumentError, ArgumentTypeError, MaskIndexError
from maskflash.functions.function import Function
from maskflash.functions.sizes import Sizes
from maskflash.functions.written import copied
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import MaskLike, Predicate, RecordedMask


class _Sized(Function):
    """Serves one size alone.

    Attributes:
        shape: (batch, heads, q_len, kv_len); a batch or heads of 1 serve all.
        form: what the form is called.
        instead: what to do for another size.
    """

    shape: tuple[int, int, int, int]
    form: str
    instead: str

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """Nothing, if the sizes are right."""
        got = sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len
        fits = [want in (1, size) for size, want in zip(got[:2], self.shape[:2], strict=True)]
        if not all(fits) or got[2:] != self.shape[2:]:
            raise ArgumentError(
                f"{sizes.operation}: the {self.form} is for (batch, heads, q_len, kv_len) {self.shape}, got {got}; "
                f"make one of that size, or {self.instead}"
            )
        sizes.refuse_offsets(f"a {self.form} has its own rows and columns", f"{self.instead} instead")
        return {}


class _RecordedSized(_Sized, RecordedMask):
    """One that came out of a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        kind, recorded = super().__reduce__()
        return _again, (kind, recorded, self.shape, self.form, self.instead)


class SizedMask(_Sized, Predicate):
    """A mask for the one size that another engine's form is for."""

    def __init__(
        self, function: MaskLike, name: str, shape: tuple[int, int, int, int], form: str, instead: str
    ) -> None:
        super().__init__(function, name)
        self.shape = shape
        self.form = form
        self.instead = instead

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (_RecordedSized, self._recorded(), self.shape, self.form, self.instead)

    def __deepcopy__(self, memo: dict[int, Any]) -> SizedMask:
        function = copied(self.function, memo)
        return SizedMask(function, self.name, self.shape, self.form, self.instead)


def _again(
    kind: type[_RecordedSized], recorded: tuple[Any, ...], shape: tuple[int, int, int, int], form: str, instead: str
) -> _RecordedSized:
    made = kind(*recorded)
    made.shape, made.form, made.instead = shape, form, instead
    return made


def of_tiles(
    operation: str, function: Mask, kinds: Tensor, lengths: tuple[int, int], block_size: tuple[int, int]
) -> Mask:
    """The mask of tiles: the function itself where it alone says what they do.

    Args:
        operation: what messages call it.
        function: what is visible in partial tiles.
        kinds: (B, H, nQ, nKV) int8; B or H of 1 serves all.
        lengths: q_len and kv_len.
        block_size: tokens per tile.

    Raises:
        ArgumentTypeError: the function needs more than a pair's indices.
    """
    needed = [name for name in function.keywords if name not in function.defaults]
    if needed or function.implied_names:
        what = f"needs {', '.join(needed)}" if needed else "depends on the lengths of a call"
        raise ArgumentTypeError(
            f"{operation}: mask_mod {function.name} {what}, expected a function of (b, h, q, kv) alone, which is all "
            "that the kernel passes; pass a predicate with the values in it"
        )
    if _says_all(function, kinds, lengths, block_size):
        return function
    (batch, heads), (rows, columns) = kinds.shape[:2], block_size

    def listed(b: Any, h: Any, q: Any, kv: Any) -> Any:
        kind = kinds[b if batch > 1 else 0, h if heads > 1 else 0, q // rows, kv // columns]
        return kind == FULL or (kind == PARTIAL and function(b, h, q, kv))

    return Predicate(listed, function.name)


def listed_kinds(
    operation: str,
    partial: tuple[Tensor, Tensor],
    full: tuple[Tensor, Tensor] | None,
    across: int,
) -> Tensor:
    """The kinds of tiles as lists have them: (B, H, lines, across) int8.

    Args:
        operation: what messages call it.
        partial: counts (B, H, lines) and indices (B, H, lines, n) of partial tiles; what follows the counted ones may
            be anything. Dimensions may be missing from the left.
        full: those of full tiles, if there are any.
        across: tiles in a line.

    Raises:
        ArgumentError: a tile is in both lists.
    """
    chosen = _chosen(*partial, across)
    kinds = torch.where(chosen, PARTIAL, SKIP).to(torch.int8)
    if full is not None:
        chosen, others = torch.broadcast_tensors(chosen, _chosen(*full, across))
        both = chosen & others
        if bool(both.any()):
            tile = tuple(both.nonzero()[0].tolist())
            raise ArgumentError(f"{operation}: tile {tile} is in the list of full tiles and in that of partial ones")
        kinds = torch.where(others, FULL, kinds).to(torch.int8)
    return kinds


def _chosen(count: Tensor, indices: Tensor, across: int) -> Tensor:
    """Which tiles the counted indices of each line are: (B, H, lines, across) bool."""
    counted = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    places = indices.long().where(counted, across)  # a place for what doesn't count
    chosen = torch.zeros((*indices.shape[:-1], across + 1), dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, places, True)[..., :across]
    return chosen.reshape((1,) * (4 - chosen.ndim) + chosen.shape)


def _says_all(function: Mask, kinds: Tensor, lengths: tuple[int, int], block_size: tuple[int, int]) -> bool:
    """Whether a function alone, in all batch rows and heads, shows what the listed tiles do."""
    batch, heads = kinds.shape[:2]
    reads = function.traced({}).expr.reads
    if (batch == 1 and "b" in reads) or (heads == 1 and "h" in reads):
        return False  # the lists are for all rows (or heads), the function tells them apart
    tile = tuple(min(size, max(n, 1)) for size, n in zip(block_size, lengths, strict=True))  # as it fits
    sizes: dict[str, Any] = {"batch": batch, "heads": heads, "block_size": tile}
    try:
        own = function.block_map(*lengths, **sizes, device=kinds.device).kinds()
    except MaskIndexError:  # perhaps in a tile that isn't listed
        return False
    return bool(((kinds == PARTIAL) | (kinds == own)).all())
