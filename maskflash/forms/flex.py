"""Any mask -> FlexAttention's BlockMask, with the lists and the function its kernels read; and back.

The block map is ours, so the lists cost what the mask's boundary costs. FlexAttention counts a ragged tile at the end
of a row or column as partial, also where all of its pairs inside the lengths are visible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.errors import ArgumentError, ArgumentTypeError, MaskIndexError
from maskflash.forms.modifiers import modifier
from maskflash.functions.sizes import Sizes
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate, mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def to_block_mask(problem: Problem) -> BlockMask:
    """The BlockMask of a problem's mask: its tensors equal those of `create_block_mask`, tile by tile.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    function = modifier(problem.expr, problem.inputs, problem.q_offset, problem.kv_offset, problem.device)
    return of_block_map(classify(problem).block_map, function, problem.device)


def of_block_map(block_map: BlockMap, mask_mod: MaskMod, device: torch.device) -> BlockMask:
    """The BlockMask of a block map, with a function for its partial tiles.

    Args:
        block_map: the tiles.
        mask_mod: the mask of which they are.
        device: where its tensors go.
    """
    lengths = block_map.q_len, block_map.kv_len
    kinds = block_map.kinds().to(device)
    for axis, length, size in zip((2, 3), lengths, block_map.block_size, strict=True):
        if length % size:
            kinds.narrow(axis, length // size, 1).clamp_(max=PARTIAL)
    rows = *_listed(kinds == PARTIAL), *_listed(kinds == FULL)
    columns = *_listed(kinds.mT == PARTIAL), *_listed(kinds.mT == FULL)
    return BlockMask(
        lengths,
        *rows,
        *columns,
        BLOCK_SIZE=block_map.block_size,
        mask_mod=mask_mod,
    )


def from_flex(block_mask: BlockMask) -> Mask:
    """FlexAttention's mask as one of ours: exactly the pairs that FlexAttention's kernels let attend.

        visible = tile in the full list, or tile in the partial list and mask_mod(b, h, q, kv)

    Where the lists are those of mask_mod, as `create_block_mask` makes them, the mask is mask_mod itself. Without
    torch.compile, FlexAttention looks at mask_mod alone, whatever the lists say.

    A score_mod is no part of a BlockMask. It is a score function as it is: `attention(q, k, v, mask, score=score_mod)`.

    Args:
        block_mask: with a mask_mod that can be traced, and tensors on one device.

    Returns:
        A mask for calls of the lengths, and if they are not 1 the batch and heads, that `block_mask` is for, without a
        q_offset.

    Raises:
        MaskTraceError: its mask_mod does something that can't become an expression.
        ArgumentError: a tile is in both lists.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> flex = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 256, 256, device="cpu")
        >>> from_flex(flex).block_map(256, 256).counts
        {'full': 1, 'partial': 2, 'skip': 1}
    """
    if not isinstance(block_mask, BlockMask):
        raise ArgumentTypeError(
            f"from_flex: block_mask is a {type(block_mask).__name__}, expected a BlockMask; compile() takes a mask_mod"
        )
    function = mask(block_mask.mask_mod)
    kinds = _kinds(block_mask)
    if not _says_all(function, kinds, block_mask):
        function = _of_tiles(function, kinds, *block_mask.BLOCK_SIZE)
    return _FlexMask(function, (*kinds.shape[:2], *block_mask.seq_lengths))


class _FlexMask(Predicate):
    """A mask for the one size that a BlockMask is for."""

    def __init__(self, function: Mask, shape: tuple[int, ...]) -> None:
        super().__init__(function, f"from_flex({function.name})")
        self.shape = shape

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """Nothing, if the sizes are right."""
        got = sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len
        fits = [want in (1, size) for size, want in zip(got[:2], self.shape[:2], strict=True)]
        if not all(fits) or got[2:] != self.shape[2:]:
            raise ArgumentError(
                f"{sizes.operation}: the BlockMask is for (batch, heads, q_len, kv_len) {self.shape}, got {got}; make "
                "one of that size, or use its mask_mod"
            )
        sizes.refuse_offsets("a BlockMask has its own rows and columns", "use its mask_mod instead")
        return {}


def _of_tiles(function: Mask, kinds: Tensor, rows: int, columns: int) -> Mask:
    """The mask of listed tiles, and of a function inside the partial ones."""
    batch, heads = kinds.shape[:2]

    def listed(b: Any, h: Any, q: Any, kv: Any) -> Any:
        kind = kinds[b if batch > 1 else 0, h if heads > 1 else 0, q // rows, kv // columns]
        return kind == FULL or (kind == PARTIAL and function(b, h, q, kv))

    return Predicate(listed, function.name)


def _says_all(function: Mask, kinds: Tensor, block_mask: BlockMask) -> bool:
    """Whether a function alone, in all batch rows and heads, shows what the listed tiles do."""
    batch, heads = kinds.shape[:2]
    reads = function.traced({}).expr.reads
    if (batch == 1 and "b" in reads) or (heads == 1 and "h" in reads):
        return False  # the lists are for all rows (or heads), the function tells them apart
    lengths = block_mask.seq_lengths
    tile = tuple(min(size, max(n, 1)) for size, n in zip(block_mask.BLOCK_SIZE, lengths, strict=True))  # as it fits
    sizes: dict[str, Any] = {"batch": batch, "heads": heads, "block_size": tile}
    try:
        own = function.block_map(*lengths, **sizes, device=kinds.device).kinds()
    except MaskIndexError:  # perhaps in a tile that isn't listed
        return False
    return bool(((kinds == PARTIAL) | (kinds == own)).all())


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's tiles are chosen, and which: these first, ascending, then the others; int32."""
    order = chosen.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return chosen.sum(3, dtype=torch.int32), order.int()


def _kinds(block_mask: BlockMask) -> Tensor:
    """The kinds of tiles as the lists have them: (B, H, nQ, nKV) int8."""
    partial = _chosen(block_mask.kv_num_blocks, block_mask.kv_indices)
    kinds = torch.where(partial, PARTIAL, SKIP).to(torch.int8)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _chosen(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        if bool((full & partial).any()):
            tile = tuple((full & partial).nonzero()[0].tolist())
            raise ArgumentError(f"from_flex: tile {tile} is in the list of full tiles and in that of partial ones")
        kinds[full] = FULL
    return kinds


def _chosen(count: Tensor, indices: Tensor) -> Tensor:
    """The inverse of `_listed`; what follows the chosen ones in a row may be anything."""
    counted = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    places = indices.long().where(counted, 0)
    chosen = torch.zeros_like(indices).scatter_add_(-1, places, counted.to(indices.dtype)) > 0
    return chosen.view((1,) * (4 - chosen.ndim) + chosen.shape)
