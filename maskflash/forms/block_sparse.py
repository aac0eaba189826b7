"""Any mask <-> FlashAttention 4's block-sparse tensors: which blocks each line of blocks visits, and which need a mask.

    ▒ · ·      forward, kv blocks of each q block        backward, q blocks of each kv block
    █ ▒ ·      mask_block_cnt  1 1 1                     mask_block_cnt  1 1 1
    · █ ▒      mask_block_idx  0 1 2                     mask_block_idx  0 1 2
               full_block_cnt  0 1 1                     full_block_cnt  1 1 0
               full_block_idx  - 0 1                     full_block_idx  1 2 -

A list ascends: FlashAttention 4 walks it from its end and masks what lies past kv_len in the last block only. So a
ragged block of which all pairs inside the lengths are visible is full, as in its own `compute_block_sparsity`.
Source: flash_attn/cute/block_sparsity.py, block_sparse_utils.py and compute_block_sparsity.py of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import Runs
from maskflash.errors import ArgumentError
from maskflash.forms.tiled import SizedMask, listed_kinds, of_tiles
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import MaskLike, mask


class BlockLists(NamedTuple):
    """The blocks of each line: fields of FlashAttention 4's BlockSparseTensorsTorch, by their own names.

    Attributes:
        mask_block_cnt: (B, H, lines) int32, how many blocks of the line are partial; B or H of 1 serves all.
        mask_block_idx: (B, H, lines, n) int32, which: ascending, then zeros. n is as many as a line has, at least 1.
        full_block_cnt: (B, H, lines) int32, how many are full.
        full_block_idx: (B, H, lines, m) int32, likewise.
        block_size: (q_tokens, kv_tokens) of a block, whichever of the two the lines are made of.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class BlockSparse:
    """A mask's blocks, for `block_sparse_tensors` and `block_sparse_tensors_bwd` of FlashAttention 4.

    `BlockSparseTensorsTorch(**form.forward._asdict())` is what it takes.

    Attributes:
        q_len: rows in tokens.
        kv_len: columns in tokens.
        shape: (B, H, nQ, nKV) in blocks; B or H is 1 where the mask does not look at it.
        forward: kv blocks of each q block.
        backward: q blocks of each kv block.
    """

    q_len: int
    kv_len: int
    shape: tuple[int, int, int, int]
    forward: BlockLists
    backward: BlockLists

    def __repr__(self) -> str:
        partial, full = int(self.forward.mask_block_cnt.sum()), int(self.forward.full_block_cnt.sum())
        rows, columns = self.forward.block_size
        return (
            f"BlockSparse({self.q_len} x {self.kv_len} tokens, blocks of {rows} x {columns}, shape {self.shape}, "
            f"{full} full, {partial} partial)"
        )


def to_block_sparse(problem: Problem) -> BlockSparse:
    """The blocks of a problem's mask; a block is a tile.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    found = classify(problem).block_map
    forward, backward = _lists(found, problem.device), _lists(found.turned(), problem.device)
    backward = backward._replace(block_size=forward.block_size)
    return BlockSparse(problem.q_len, problem.kv_len, found.shape, forward, backward)


def _lists(found: BlockMap, device: torch.device) -> BlockLists:
    """The blocks of each row of tiles."""
    partial, full = (_listed(found.rows, found.shape[:3], full) for full in (False, True))
    count, indices, full_count, full_indices = (x.to(device) for x in (*partial, *full))
    return BlockLists(count, indices, full_count, full_indices, found.block_size)


def _listed(runs: Runs, shape: tuple[int, int, int], full: bool) -> tuple[Tensor, Tensor]:
    """How many full (or partial) tiles each line has, and which."""
    line, tile = runs.tiles(full=full)
    lines = len(runs.offsets) - 1
    count = torch.bincount(line, minlength=lines)
    most = max(1, int(count.max())) if lines else 1
    indices = torch.zeros(lines, most, dtype=torch.int32)
    indices[line, torch.arange(len(line)) - (count.cumsum(0) - count)[line]] = tile.int()
    return count.int().view(shape), indices.view(*shape, most)


def from_block_sparse(
    tensors: Any, mask_mod: MaskLike, q_len: int, kv_len: int, *, block_size: BlockSize | None = None
) -> Mask:
    """FlashAttention 4's block-sparse mask as one of ours: exactly the pairs that its forward lets attend.

        visible = block in the full list, or block in the partial list and mask_mod(b, h, q, kv)

    Where the lists are those of mask_mod, the mask is mask_mod itself.

    Args:
        tensors: BlockSparseTensorsTorch, `BlockSparse.forward`, or whatever has `mask_block_cnt` (B, H, nQ),
            `mask_block_idx` (B, H, nQ, n), and `full_block_cnt` and `full_block_idx` or None: int32, on one device.
        mask_mod: a mask of ours, or a predicate, that says what its CuTe function does in partial blocks.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        block_size: tokens per block, one number or (q_tokens, kv_tokens); None where `tensors.block_size` says it.

    Returns:
        A mask for calls of these lengths, and if they are not 1 of this batch and these heads, without a q_offset.

    Raises:
        ArgumentTypeError: a list holds no integers, or is missing.
        ArgumentError: lists of other lines than the lengths have, a block that isn't there, or is listed twice.
        MaskTraceError: mask_mod does something that can't become an expression.

    Example:
        >>> from maskflash import causal
        >>> form = causal().to_block_sparse(256, 256)
        >>> from_block_sparse(form.forward, causal(), 256, 256).block_map(256, 256).counts
        {'full': 1, 'partial': 2, 'skip': 1}
    """
    operation = "from_block_sparse"
    q_len, kv_len = (
        arguments.length(operation, name, length) for name, length in (("q_len", q_len), ("kv_len", kv_len))
    )
    given = getattr(tensors, "block_size", None) if block_size is None else block_size
    if given is None:
        raise ArgumentError(f"{operation}: block_size is None, and tensors says none; pass (q_tokens, kv_tokens)")
    rows, columns = arguments.block_size(operation, given)
    lattice = -(-q_len // rows), -(-kv_len // columns)
    partial = _checked(tensors, "mask", lattice)
    full = _checked(tensors, "full", lattice) if getattr(tensors, "full_block_cnt", None) is not None else None
    if full is not None and any(len({x, y} - {1}) > 1 for x, y in zip(partial[0].shape, full[0].shape, strict=True)):
        raise ArgumentError(
            f"{operation}: full_block_cnt has shape {tuple(full[0].shape)}, expected batch and heads as in "
            f"mask_block_cnt, {tuple(partial[0].shape)}, or 1"
        )
    kinds = listed_kinds(operation, partial, full, lattice[1])
    function = of_tiles(operation, mask(mask_mod), kinds, (q_len, kv_len), (rows, columns))
    shape = (kinds.shape[0], kinds.shape[1], q_len, kv_len)
    return SizedMask(function, f"{operation}({function.name})", shape, "block-sparse form", "use its mask_mod")


def _checked(tensors: Any, kind: str, lattice: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The counts and indices of one kind of blocks: those that count are there, and once."""
    operation, names = "from_block_sparse", (f"{kind}_block_cnt", f"{kind}_block_idx")
    count, indices = (
        arguments.int_table(operation, name, getattr(tensors, name, None), (dims,))
        for name, dims in zip(names, (3, 4), strict=True)
    )
    for name, table in zip(names, (count, indices), strict=True):
        arguments.held(operation, name, table)
    if count.shape[2] != lattice[0] or count.shape != indices.shape[:3]:
        raise ArgumentError(
            f"{operation}: {names[0]} has shape {tuple(count.shape)} and {names[1]} {tuple(indices.shape)}, expected "
            f"(B, H, {lattice[0]}) and (B, H, {lattice[0]}, n), a line for each q block; pass the forward's lists"
        )
    if bool(((count < 0) | (count > indices.shape[3])).any()):
        raise ArgumentError(f"{operation}: {names[0]} counts more blocks than {names[1]} lists, or fewer than none")
    counted = torch.arange(indices.shape[3], device=indices.device) < count[..., None]
    wrong = counted & ((indices < 0) | (indices >= lattice[1]))
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ArgumentError(
            f"{operation}: {names[1]} is {int(indices[place])} at {place}, expected a kv block from 0 to "
            f"{lattice[1] - 1}"
        )
    ordered = indices.where(counted, lattice[1] + torch.arange(indices.shape[3], device=indices.device)).sort(3)[0]
    again = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(again):
        raise ArgumentError(
            f"{operation}: {names[1]} lists a block twice in line {tuple(again[0, :3].tolist())}, so that its pairs "
            "would count twice; list it once"
        )
    return count, indices
