"""Any mask <-> FlashInfer's packed custom mask: a bit for each pair, eight to a byte, the first pair's the lowest.

    q 0   ■ ■ · · ·      bits 11000 11100 01110 0      of sequence b from byte indptr[b] on: bit q * kv_len + kv
    q 1   ■ ■ ■ · ·      bytes 0b11100011 0b00011100   and zeros up to the next whole byte
    q 2   · ■ ■ ■ ·

It has N² bits by nature, an eighth of a dense mask. They are set by intervals, not by pairs.
Source: flashinfer/quantization/packbits.py and data/include/flashinfer/attention/variants.cuh of flashinfer 0.7.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.errors import ArgumentError, ArgumentTypeError, UnsupportedMask
from maskflash.forms.headless import sequence_intervals
from maskflash.forms.tiled import SizedMask
from maskflash.ground import arguments
from maskflash.masks.mask import Mask

MOST_BYTES: Final = 2**31 - 1  # FlashInfer counts them in 32 bits


@dataclass(frozen=True, slots=True, eq=False)
class PackedMask:
    """A mask as `packed_custom_mask` of FlashInfer's prefill, for sequences of one length.

    FlashInfer 0.7.4 takes `packed` as it is for one sequence. For several, pass `unpacked()` as `custom_mask`: given
    packed ones, `plan` takes where a sequence's *bits* begin for where its bytes do (flashinfer's pull request 2201).

    Attributes:
        q_len: rows in tokens.
        kv_len: columns in tokens.
        packed: (bytes,) uint8, sequence after sequence.
        indptr: (B + 1,) int32, the first byte of each sequence.
    """

    q_len: int
    kv_len: int
    packed: Tensor
    indptr: Tensor

    def unpacked(self) -> Tensor:
        """FlashInfer's `custom_mask`: (B * q_len * kv_len,) bool, eight times the memory."""
        batch, pairs = len(self.indptr) - 1, self.q_len * self.kv_len
        return unpack(self.packed).view(batch, -1)[:, :pairs].flatten() if batch else self.packed.bool()

    def __repr__(self) -> str:
        return (
            f"PackedMask({self.q_len} x {self.kv_len} tokens, {len(self.indptr) - 1} sequences, "
            f"{len(self.packed)} bytes)"
        )


def find_packed_mask(problem: Problem) -> PackedMask:
    """The bits of a problem's mask; the sequences are its batch rows.

    Raises:
        UnsupportedMask: heads differ, or there are more than 2³¹ - 1 bytes.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    each = -(-problem.q_len * problem.kv_len // 8)
    check_bytes("to_packed_mask", each * problem.batch)
    found = sequence_intervals("to_packed_mask", problem)
    row = found.rows
    base = row // max(problem.q_len, 1) * each * 8 + row % max(problem.q_len, 1) * problem.kv_len
    packed = set_bits(base + found.start, base + found.stop, each * problem.batch)
    indptr = torch.arange(problem.batch + 1, dtype=torch.int32) * each
    return PackedMask(problem.q_len, problem.kv_len, packed.to(problem.device), indptr.to(problem.device))


def check_bytes(operation: str, count: int) -> None:
    """Refuse a mask of more bytes than FlashInfer can count."""
    if count > MOST_BYTES:
        raise UnsupportedMask(
            f"{operation}: the mask has {count:,} bytes of bits, and FlashInfer counts {MOST_BYTES:,}; export fewer "
            "queries at a time, or use the mask itself: compile(mask) needs no bits"
        )


def set_bits(start: Tensor, stop: Tensor, count: int) -> Tensor:
    """Bytes in which the bits of intervals are set, the lowest of each byte first.

    Args:
        start: (intervals,) int64, the first bit of each; apart and ascending.
        stop: (intervals,) int64, one past its last.
        count: how many bytes.
    """
    first, last = start >> 3, stop >> 3
    head, tail = 256 - (1 << (start & 7)), (1 << (stop & 7)) - 1  # from `start` on; before `stop`
    within = first == last
    # Whole bytes between: -1 is 0xFF, and intervals are apart, so a running sum of steps is 0 or -1.
    steps = torch.zeros(count + 1, dtype=torch.int8)
    one = torch.ones((), dtype=torch.int8)
    between = last > first + 1
    steps[first[between] + 1] -= one
    steps[last[between]] += one
    found = torch.cumsum(steps, 0, dtype=torch.int8, out=steps).view(torch.uint8)
    # Bits of different intervals differ, so that to add is to set.
    found.index_add_(0, first, torch.where(within, head + tail - 255, head).to(torch.uint8))
    found.index_add_(0, last, torch.where(within, 0, tail).to(torch.uint8))
    return found[:count]


def unpack(packed: Tensor) -> Tensor:
    """The bits of bytes: (8 * bytes,) bool."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten().bool()


def packed_bytes(operation: str, name: str, packed: Any) -> Tensor:
    """A caller's packed bits, checked."""
    table = arguments.int_table(operation, name, packed, (1,))
    arguments.held(operation, name, table)
    if table.dtype != torch.uint8:
        raise ArgumentTypeError(f"{operation}: {name} has dtype {table.dtype}, expected torch.uint8, eight bits a byte")
    return table


def from_packed_mask(packed: Tensor, q_len: int, kv_len: int, *, batch: int = 1) -> Mask:
    """FlashInfer's `packed_custom_mask` as a mask; its bits are looked up where they are.

        visible = bit q * kv_len + kv of the sequence's bytes

    Args:
        packed: (bytes,) uint8, as `flashinfer.packbits(x, bitorder="little")` and `segment_packbits` make them:
            sequence after sequence, each from a whole byte on.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        batch: sequences, which are batch rows; the bytes of one serve any batch.

    Returns:
        A mask for calls of these lengths and this batch, without a q_offset.

    Raises:
        ArgumentTypeError: packed holds no bytes.
        ArgumentError: it holds another number of them.

    Example:
        >>> from_packed_mask(torch.tensor([0b1101], dtype=torch.uint8), 2, 2).dense(2, 2)[0, 0].int()
        tensor([[1, 0],
                [1, 1]], dtype=torch.int32)
    """
    operation = "from_packed_mask"
    table = packed_bytes(operation, "packed", packed)
    q_len, kv_len, batch = (
        arguments.length(operation, name, value, low=low)
        for name, value, low in (("q_len", q_len, 0), ("kv_len", kv_len, 0), ("batch", batch, 1))
    )
    each = -(-q_len * kv_len // 8)
    if len(table) != each * batch:
        raise ArgumentError(
            f"{operation}: packed has {len(table)} bytes, expected {each * batch}: {each} for each of {batch} "
            f"sequences of {q_len} x {kv_len} pairs"
        )

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        bit = q * kv_len + kv
        byte = bit // 8 + (b * each if batch > 1 else 0)
        return (table[byte] >> (bit % 8)) & 1 == 1

    name = f"{operation}({len(table)} bytes)"
    return SizedMask(visible, name, (batch, 1, q_len, kv_len), "packed mask", "pack one for that size")
