"""Any mask -> FlexAttention's BlockMask, with the lists and the function its kernels read; and back.

The block map is ours, so the lists cost what the mask's boundary costs. FlexAttention counts a ragged tile at the end
of a row or column as partial, also where all of its pairs inside the lengths are visible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import FULL, PARTIAL
from maskflash.errors import ArgumentTypeError
from maskflash.expr.evaluate import compute
from maskflash.forms.tiled import SizedMask, listed_kinds, of_tiles
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def to_block_mask(problem: Problem) -> BlockMask:
    """The BlockMask of a problem's mask: its tensors equal those of `create_block_mask`, tile by tile.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    kinds = classify(problem).block_map.kinds().to(problem.device)
    for axis, length, size in zip((2, 3), (problem.q_len, problem.kv_len), problem.block_size, strict=True):
        if length % size:
            kinds.narrow(axis, length // size, 1).clamp_(max=PARTIAL)
    count, indices = _listed(kinds == PARTIAL)
    full_count, full_indices = _listed(kinds == FULL)
    return BlockMask.from_kv_blocks(
        count,
        indices,
        full_count,
        full_indices,
        BLOCK_SIZE=problem.block_size,
        mask_mod=_mask_mod(problem),
        seq_lengths=(problem.q_len, problem.kv_len),
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
    function = of_tiles(mask(block_mask.mask_mod), kinds, block_mask.seq_lengths, block_mask.BLOCK_SIZE)
    shape = (*kinds.shape[:2], *block_mask.seq_lengths)
    return SizedMask(function, f"from_flex({function.name})", shape, "BlockMask", "use its mask_mod")


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's tiles are chosen, and which: these first, ascending, then the others; int32."""
    order = chosen.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return chosen.sum(3, dtype=torch.int32), order.int()


def _mask_mod(problem: Problem) -> MaskMod:
    """The mask as a function of tensors that torch can map over and compile."""
    expr, inputs = problem.expr, problem.inputs

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        given = (index.to(torch.int64) for index in (b, h, q_idx, kv_idx))
        return compute(expr, inputs, problem.indices(*given), _read)[0].to(torch.bool)

    return mask_mod


def _read(table: Tensor, indices: list[Tensor]) -> tuple[Tensor, None]:
    """A look-up without a look at the indices: analysis has found those that guards let through in range."""
    if 0 in table.shape:
        return table.new_zeros(()), None
    wrapped = (torch.where(index < 0, index + size, index) for index, size in zip(indices, table.shape, strict=True))
    safe = tuple(index.clamp(0, size - 1) for index, size in zip(wrapped, table.shape, strict=True))
    return table[safe] if safe else table, None
