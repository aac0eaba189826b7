"""Matrix products: `mma.sync` of a warp, and Hopper's `wgmma` of four warps, with operands in shared memory.

A warp holds 16 rows of a product's result. Of each 8 by 8 part

    row 0   | lane 0 | lane 1 | lane 2 | lane 3 |      two numbers for each lane, side by side;
    row 1   | lane 4 | ...                             in 16 bits they share a register, as do four in 8 bits

Products are exact in float32 or nearly so, sums are float32's in numpy's order: a tensor core's order, and its way to
drop low bits of a sum, are not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.ptx.eight_bits import e4m3_values
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.operands import Action, Scope, integer, vector
from tests.ptx.parse import Statement
from tests.ptx.threads import Threads
from tests.ptx.values import UNSIGNED, Array, bf16_values

_SIZES: Final = {"e4m3": 1, "f16": 2, "bf16": 2, "tf32": 4}
_WARPGROUP: Final = 128  # threads


def numbers(bits: Array, kind: str) -> Array:
    """Elements of an operand -> float32; of tf32 the low 13 bits don't count."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "e4m3":
        return e4m3_values(bits)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else bf16_values(bits)


def _part(register: Array, kind: str) -> Array:
    """A register of an operand -> (warps, 8, 8) of 16 bits, (warps, 8, 4) of 32, or (warps, 8, 16) of 8."""
    words = np.ascontiguousarray(register.reshape(-1, 8, 4))
    return numbers(words.view(UNSIGNED[_SIZES[kind]]), kind)


def left_operand(registers: list[Array], kind: str) -> Array:
    """Four registers -> (warps, 16, 32, 16 or 8): upper and lower rows, then the same of the other columns."""
    parts = [_part(register, kind) for register in registers]
    return np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)], 2)


def right_operand(registers: list[Array], kind: str) -> Array:
    """Two registers -> (warps, 8, 32, 16 or 8), turned."""
    return np.concatenate([_part(register, kind) for register in registers], 2)


def spread(product: Array) -> list[Array]:
    """(warps, 16, N) float32 -> registers: of each 8 columns two of the upper rows, then two of the lower."""
    parts = product.reshape(len(product), 2, 8, -1, 4, 2)
    columns = range(parts.shape[3])
    return [parts[:, half, :, n, :, one].reshape(-1) for n in columns for half in (0, 1) for one in (0, 1)]


def build_mma(statement: Statement, scope: Scope) -> Action:
    """d = a b + c, 16 by 8, over 32 bytes of a row."""
    *form, kind, second, last = statement.words[2:]
    shape = f"m16n8k{32 // _SIZES.get(kind, 32)}"
    if form != ["aligned", shape, "row", "col", "f32"] or kind not in _SIZES or (second, last) != (kind, "f32"):
        raise Unsupported("a form of mma")
    scope.unguarded(statement)
    d, a, b, c = (vector(operand) for operand in statement.operands)
    puts = [scope.write(name, "f32", None) for name in d]
    left, right, sums = ([scope.read(x, t) for x in names] for names, t in ((a, "b32"), (b, "b32"), (c, "f32")))

    def run(threads: Threads) -> None:
        rows = left_operand([read(threads) for read in left], kind)
        columns = right_operand([read(threads) for read in right], kind)
        product = spread(np.matmul(rows, columns.swapaxes(1, 2)))
        results = [part + read(threads) for part, read in zip(product, sums, strict=True)]
        for put, result in zip(puts, results, strict=True):
            put(threads, result)

    return run


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where an operand of wgmma lies in shared memory, for each group of four warps: bytes; see `offsets`."""

    start: Array
    leading: Array
    stride: Array
    swizzle: int  # bytes: 128, 64, 32 or 0

    @classmethod
    def of(cls, words: Array) -> Descriptor:
        """From the 64 bits that each thread holds."""
        rows = words.reshape(-1, _WARPGROUP)
        if (rows != rows[:, :1]).any():
            raise Fault("wgmma descriptor", "threads of a warpgroup have different ones")
        bits = rows[:, 0]
        start, leading, stride = (
            (bits >> np.uint64(at) & np.uint64(0x3FFF)).astype(np.int64) << 4 for at in (0, 16, 32)
        )
        modes, base = bits >> np.uint64(62), bits >> np.uint64(49) & np.uint64(7)
        if (modes != modes[0]).any() or base.any():
            raise Unsupported("a descriptor with a base offset, or several swizzles in one product")
        shape = (-1, 1, 1)
        return cls(start.reshape(shape), leading.reshape(shape), stride.reshape(shape), (0, 128, 64, 32)[int(modes[0])])

    def addresses(self, rows: int, depth: int, size: int, turned: bool) -> Array:
        """(warpgroups, rows, depth) addresses of elements of `size` bytes.

        The operand lies in parts of 8 lines, `stride` bytes apart. A line has `swizzle` bytes of one row; turned, of
        one column, which goes on `leading` bytes later. The swizzle moves 16 bytes of a line to the place whose number
        is theirs xor the line's.
        """
        row, column = np.arange(rows)[None, :, None], np.arange(depth)[None, None]
        line = self.swizzle or 16
        if turned:
            wide = line // size
            if not self.swizzle:
                raise Unsupported("a turned operand without a swizzle")
            offset = row // wide * self.leading + column // 8 * self.stride + column % 8 * line + row % wide * size
        elif self.swizzle:
            offset = row // 8 * self.stride + row % 8 * line + column * size
        else:
            wide = 16 // size
            offset = row // 8 * self.stride + column // wide * self.leading + row % 8 * 16 + column % wide * size
        address = self.start + offset
        return np.asarray(address ^ (address >> 7 & (line // 16 - 1)) << 4)


def build_wgmma(statement: Statement, scope: Scope) -> Action:
    """d = a b + d, or a b: 64 by N, over 32 bytes of a row.

    It runs when it is issued. What it uses is held until it is waited for.
    """
    *form, left_kind, kind = statement.words[2:]
    found = re.fullmatch(r"m64n(\d+)k(\d+)", form[2]) if len(form) == 4 else None
    size = _SIZES.get(kind, 0)
    if not found or [form[0], form[1], form[3]] != ["sync", "aligned", "f32"] or left_kind != kind or not size:
        raise Unsupported("a form of wgmma")
    d, a, b, keep, *flags = statement.operands
    columns, depth, held = int(found[1]), int(found[2]), a.startswith("{")
    turns = [integer(flag) != 0 for flag in flags[2:]]
    if depth * size != 32 or [integer(flag) for flag in flags[:2]] != [1, 1] or len(d.split(",")) != columns // 2:
        raise Unsupported("a form of wgmma")
    turns = [False] * (2 - len(turns)) + turns
    scope.unguarded(statement)
    names, inputs = vector(d), vector(a) if held else []
    puts, sums = [scope.write(x, "f32", None) for x in names], [scope.read(x, "f32") for x in names]
    left = [scope.read(x, "b32" if held else "b64") for x in vector(a)]
    right, keeps = scope.read(b, "b64"), scope.read(keep, "pred")
    registers = frozenset(map(scope.number, names)), frozenset(map(scope.number, inputs))

    def run(threads: Threads) -> None:
        if held:
            rows = left_operand([read(threads) for read in left], kind).reshape(-1, 64, depth)
        else:
            rows = _shared_operand(threads, left[0](threads), (64, depth), kind, turns[0])
        others = _shared_operand(threads, right(threads), (columns, depth), kind, turns[1])
        threads.launch.products.begin(threads.warps, *registers)
        product = np.matmul(rows, others.swapaxes(1, 2)).reshape(-1, 16, columns)
        summed = np.broadcast_to(keeps(threads), threads.count)
        for put, read, part in zip(puts, sums, spread(product), strict=True):
            put(threads, np.where(summed, read(threads), np.float32(0)) + part if summed.any() else part)

    return run


def _shared_operand(threads: Threads, words: Array, shape: tuple[int, int], kind: str, turned: bool) -> Array:
    """(warpgroups, rows, depth) float32 from shared memory."""
    descriptor, size = Descriptor.of(np.broadcast_to(words, threads.count)), _SIZES[kind]
    groups = threads.warps.reshape(-1, 4)
    address = np.broadcast_to(descriptor.addresses(*shape, size, turned), (len(groups), *shape))
    bits = threads.launch.shared.read_aside(groups, address, size, *threads.launch.products.readers(groups))
    return numbers(bits, kind)


def build_wgmma_fence(statement: Statement, scope: Scope) -> Action:
    """Order what was done to registers before the products that follow."""
    scope.unguarded(statement)

    def run(threads: Threads) -> None:
        threads.launch.products.fence(threads.warps)

    return run


def build_wgmma_commit(statement: Statement, scope: Scope) -> Action:
    """End the group of products."""
    scope.unguarded(statement)

    def run(threads: Threads) -> None:
        threads.launch.products.commit(threads.warps)

    return run


def build_wgmma_wait(statement: Statement, scope: Scope) -> Action:
    """Wait for all but the last groups of products."""
    scope.unguarded(statement)
    left = integer(statement.operands[0])

    def run(threads: Threads) -> None:
        threads.launch.products.wait(threads.warps, left)

    return run
