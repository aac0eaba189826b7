"""Any mask <-> FlashInfer's block-sparse rows: which blocks of keys each block of queries visits, with bits for pairs.

    ▒ · ·    indptr   0 1 3 5        blocks of R queries and C keys, in compressed rows (scipy's BSR)
    █ ▒ ·    indices  0, 0 1, 1 2
    · █ ▒    mask     (5, R, C), where a block is partial

Bits are packed by row of blocks: its first query's pairs with the keys of all its blocks, one after the other, then its
second query's; the lowest bit of a byte first, and each row of blocks from a whole byte on.
Source: BlockSparseAttentionWrapper.plan in flashinfer/sparse.py of flashinfer 0.7.4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.errors import ArgumentError
from maskflash.forms.headless import sequence_intervals
from maskflash.forms.packed_mask import check_bytes, packed_bytes, set_bits, unpack
from maskflash.forms.tiled import SizedMask
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.mask import Mask


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """A mask's blocks for FlashInfer's BlockSparseAttentionWrapper: `plan(indptr, indices, M, N, R, C, ...)`.

    FlashInfer has no batch: sequences stand one after the other, each on whole blocks. Query q of sequence b is row
    b * ceil(q_len / R) * R + q of q, and key kv is row b * ceil(kv_len / C) * C + kv of k and v; what pads them may be
    anything, and what the queries between two sequences see is of no use.

    FlashInfer 0.7.4 takes for pairs `mask=form.unpacked()`: given `packed_mask`, `plan` takes where a row of blocks'
    *bits* begin for where its bytes do.

    Attributes:
        indptr: (MB + 1,) int32, where the blocks of each row of blocks begin.
        indices: (nnz,) int32, which blocks of keys, ascending in a row.
        M: rows of q.
        N: rows of k and v, a multiple of C.
        R: queries of a block.
        C: keys of a block.
        packed_mask: (bytes,) uint8; None where all pairs of every block are visible.
        mask_indptr: (MB + 1,) int32, the first byte of each row of blocks; None likewise.
        batch: sequences.
    """

    indptr: Tensor
    indices: Tensor
    M: int
    N: int
    R: int
    C: int
    packed_mask: Tensor | None
    mask_indptr: Tensor | None
    batch: int = 1

    def unpacked(self) -> Tensor | None:
        """FlashInfer's `mask`: (nnz, R, C) bool, eight times the memory; None where packed_mask is."""
        if self.packed_mask is None or self.mask_indptr is None:
            return None
        found = torch.zeros(len(self.indices), self.R, self.C, dtype=torch.bool, device=self.indices.device)
        starts, blocks = self.mask_indptr.tolist(), self.indptr.tolist()
        for line in range(len(blocks) - 1):
            bits = unpack(self.packed_mask[starts[line] : starts[line + 1]])
            size = (blocks[line + 1] - blocks[line]) * self.C
            rows = min(self.R, self.M - line * self.R)
            of_line = bits[: rows * size].view(rows, -1, self.C) if size else bits.view(rows, 0, self.C)
            found[blocks[line] : blocks[line + 1], :rows] = of_line.transpose(0, 1)
        return found

    def __repr__(self) -> str:
        bits = 0 if self.packed_mask is None else len(self.packed_mask)
        return (
            f"BlockRows({self.M} x {self.N} tokens, blocks of {self.R} x {self.C}, {len(self.indices)} blocks, "
            f"{bits} bytes of bits)"
        )


def find_block_rows(problem: Problem) -> BlockRows:
    """The blocks of a problem's mask, which are its tiles; the sequences are its batch rows.

    Raises:
        UnsupportedMask: heads differ, or there are more than 2³¹ - 1 bytes of bits.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    operation, (rows, columns), batch = "to_block_rows", problem.block_size, problem.batch
    q_len, kv_len = problem.q_len, problem.kv_len
    seen = sequence_intervals(operation, problem)
    runs = classify(problem).block_map.rows
    units, heads, n_q, n_kv = problem.shape
    line, block = replace(runs, full=torch.ones_like(runs.full)).tiles(full=True)
    kept = line // max(n_q, 1) % heads == 0
    line, block = line[kept], block[kept]
    line = line // max(heads * n_q, 1) * n_q + line % max(n_q, 1)
    times = batch if units == 1 else 1
    moved = torch.arange(times)[:, None]
    line = (line + moved * n_q).flatten()
    sequence = line // max(n_q, 1)
    count = torch.bincount(line, minlength=batch * n_q)
    indptr = torch.cat((count.new_zeros(1), count.cumsum(0)))
    indices = block.repeat(times) + sequence * n_kv
    form = BlockRows(
        indptr=indptr.int(),
        indices=indices.int(),
        M=max(batch - 1, 0) * n_q * rows + q_len * min(batch, 1),
        N=batch * n_kv * columns,
        R=rows,
        C=columns,
        packed_mask=None,
        mask_indptr=None,
        batch=batch,
    )
    ragged = bool((block == kv_len // columns).any())  # a block that goes on after the last key
    if not ragged and bool(runs.full.all()):
        return _on(form, problem.device)
    width = count * columns
    height = torch.full_like(count, rows)
    height[-1:] = form.M - (len(count) - 1) * rows
    first_byte = torch.cat((count.new_zeros(1), ((width * height + 7) // 8).cumsum(0)))
    check_bytes(operation, int(first_byte[-1]))
    # Every block that an interval meets is listed, so that its keys stand side by side among the bits of its query.
    row = seen.rows
    unit, q = row // max(q_len, 1), row % max(q_len, 1)
    home = unit * n_q + q // rows
    place = torch.searchsorted(line * n_kv + block.repeat(times), home * n_kv + seen.start // columns) - indptr[home]
    start = first_byte[home] * 8 + q % rows * width[home] + place * columns + seen.start % columns
    packed = set_bits(start, start + seen.stop - seen.start, int(first_byte[-1]))
    return _on(replace(form, packed_mask=packed, mask_indptr=first_byte.int()), problem.device)


def _on(form: BlockRows, device: torch.device) -> BlockRows:
    """The form with its tensors on a device."""
    names = ("indptr", "indices", "packed_mask", "mask_indptr")
    held = {name: getattr(form, name) for name in names}
    return replace(form, **{name: x.to(device) for name, x in held.items() if x is not None})


def from_block_rows(
    indptr: Tensor,
    indices: Tensor,
    M: int,
    N: int,
    block_size: BlockSize,
    *,
    mask: Tensor | None = None,
    packed_mask: Tensor | None = None,
) -> Mask:
    """FlashInfer's block-sparse rows as a mask: what BlockSparseAttentionWrapper's arguments of these names show.

        visible = block (q // R, kv // C) is listed, and its pair's bit is set or there are no bits

    Args:
        indptr: (MB + 1,) ints, where the blocks of each row of blocks begin.
        indices: (nnz,) ints, which blocks of keys, ascending in a row.
        M: rows in tokens.
        N: columns in tokens, a multiple of C.
        block_size: (R, C), or one number for both.
        mask: (nnz, R, C) bool.
        packed_mask: (bytes,) uint8, its bits by rows of blocks, as FlashInfer packs them.

    Returns:
        A mask for calls of M and N tokens, without a q_offset.

    Raises:
        ArgumentTypeError: numbers that are none, bits that are no bytes.
        ArgumentError: sizes that don't fit one another, a block that isn't there, or is listed twice.

    Example:
        >>> rows, blocks = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1])
        >>> from_block_rows(rows, blocks, 4, 4, 2).dense(4, 4)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    operation = "from_block_rows"
    rows, columns = arguments.block_size(operation, block_size)
    M, N = arguments.length(operation, "M", M), arguments.length(operation, "N", N)
    if N % columns:
        raise ArgumentError(f"{operation}: N is {N}, expected a multiple of C, {columns}; FlashInfer pads k and v")
    line, block, first = _checked(operation, indptr, indices, (-(-M // rows), N // columns))
    count = first.diff()
    listed = torch.zeros(len(count), N // columns, dtype=torch.bool, device=block.device)
    listed[line, block] = True
    height = (M - rows * torch.arange(len(count), device=block.device)).clamp(max=rows)
    if mask is not None and packed_mask is None:
        packed_mask = _packed(operation, mask, (len(block), rows, columns), first, height)
    name, sized = f"{operation}({len(block)} blocks)", "block rows"
    shape, instead = (1, 1, M, N), "list blocks for that size"
    if packed_mask is None:
        return SizedMask(lambda b, h, q, kv: listed[q // rows, kv // columns], name, shape, sized, instead)
    bits = packed_bytes(operation, "packed_mask", packed_mask)
    width = count * columns
    sizes = (width * height + 7) // 8
    if len(bits) != int(sizes.sum()):
        raise ArgumentError(
            f"{operation}: packed_mask has {len(bits)} bytes, expected {int(sizes.sum())}, a bit for each pair of "
            "every listed block, each row of blocks from a whole byte on"
        )
    begin = torch.zeros_like(listed, dtype=torch.int64)
    begin[line, block] = (sizes.cumsum(0) - sizes)[line] * 8 + (torch.arange(len(block)) - first[line]) * columns

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        row, tile = q // rows, kv // columns
        bit = begin[row, tile] + (q % rows) * width[row] + kv % columns
        return listed[row, tile] and (bits[bit // 8] >> (bit % 8)) & 1 == 1

    return SizedMask(visible, name, shape, sized, instead)


def _checked(
    operation: str, indptr: Tensor, indices: Tensor, lattice: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of blocks and the block of keys of each listed block, and where rows begin: int64, on the CPU."""
    given = {"indptr": indptr, "indices": indices}
    first, block = (arguments.int_table(operation, name, value, (1,)) for name, value in given.items())
    for name, table in zip(given, (first, block), strict=True):
        arguments.held(operation, name, table)
    first, block = first.long().cpu(), block.long().cpu()
    right = len(first) == lattice[0] + 1 and int(first[0]) == 0 and int(first[-1]) == len(block)
    if not right or bool((first.diff() < 0).any()):
        raise ArgumentError(
            f"{operation}: indptr has shape {tuple(first.shape)}, expected {lattice[0] + 1} numbers that rise from 0 "
            f"to {len(block)}, as many as there are indices"
        )
    wrong = ((block < 0) | (block >= lattice[1])).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ArgumentError(
            f"{operation}: indices is {int(block[place])} at {place}, expected a block of keys from 0 to "
            f"{lattice[1] - 1}"
        )
    line = torch.repeat_interleave(torch.arange(lattice[0]), first.diff())
    fallen = ((block[1:] <= block[:-1]) & (line[1:] == line[:-1])).nonzero()
    if len(fallen):
        raise ArgumentError(
            f"{operation}: indices falls or repeats at {int(fallen[0]) + 1}, expected blocks that ascend in each row; "
            "sort them, and list each once"
        )
    return line, block, first


def _packed(operation: str, mask: Any, shape: tuple[int, int, int], first: Tensor, height: Tensor) -> Tensor:
    """A mask of pairs of blocks as packed bits."""
    if isinstance(mask, Tensor):
        arguments.held(operation, "mask", mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ArgumentError(f"{operation}: mask is {got}, expected torch.bool {shape}, the pairs of each listed block")
    parts = []
    for low, high, rows in zip(first[:-1].tolist(), first[1:].tolist(), height.tolist(), strict=True):
        bits = mask[low:high, :rows].cpu().transpose(0, 1).flatten()
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
        parts.append((bits << torch.arange(8)).sum(1).to(torch.uint8))
    return torch.cat([torch.zeros(0, dtype=torch.uint8), *parts])
