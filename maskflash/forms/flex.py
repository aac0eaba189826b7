"""Any mask -> FlexAttention's BlockMask, with the lists and the function its kernels read; and back.

The block map is ours, so the lists cost what the mask's boundary costs. FlexAttention counts a ragged tile at the end
of a row or column as partial, also where all of its pairs inside the lengths are visible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import FULL, PARTIAL
from maskflash.errors import ArgumentTypeError
from maskflash.forms.modifiers import modifier
from maskflash.forms.tiled import SizedMask, listed_kinds, of_tiles
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask

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
    full = None
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    partial = block_mask.kv_num_blocks, block_mask.kv_indices
    kinds = listed_kinds("from_flex", partial, full, block_mask.kv_indices.shape[-1])
    function = of_tiles("from_flex", mask(block_mask.mask_mod), kinds, block_mask.seq_lengths, block_mask.BLOCK_SIZE)
    shape = (*kinds.shape[:2], *block_mask.seq_lengths)
    return SizedMask(function, f"from_flex({function.name})", shape, "BlockMask", "use its mask_mod")


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's tiles are chosen, and which: these first, ascending, then the others; int32."""
    order = chosen.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return chosen.sum(3, dtype=torch.int32), order.int()
