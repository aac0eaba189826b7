"""Loads, stores and asynchronous copies: instructions between registers, global and shared memory, and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from tests.ptx.faults import Unsupported
from tests.ptx.operands import Action, Reader, Scope, integer, only, vector
from tests.ptx.parse import Statement
from tests.ptx.tensor_maps import TensorMap
from tests.ptx.threads import Threads
from tests.ptx.values import UNSIGNED, Array, size_of

_SPACES: Final = {"global": 8, "shared": 4, "shared::cta": 4}  # bytes of their addresses
_HINTS: Final = {"nc", "ca", "cg", "cs", "wb", "weak", "v1", "v2", "v4"}  # of caches, and what is looked at elsewhere


def build_ld(statement: Statement, scope: Scope) -> Action:
    """Load one number or a vector."""
    if statement.words[1] == "param":
        return _parameter(statement, scope)
    space, kind, count = _form(statement)
    names = vector(statement.operands[0])
    if len(names) != count:
        raise Unsupported(f"{len(names)} registers for {count} numbers")
    load, active = _loader(space, statement, scope, count, size_of(kind)), scope.active(statement)
    puts = [(n, scope.write(name, kind, statement.guard)) for n, name in enumerate(names) if name != "_"]

    def run(threads: Threads) -> None:
        columns = np.ascontiguousarray(load(threads, active(threads)).T)
        for n, put in puts:
            put(threads, columns[n].view(f"i{size_of(kind)}") if kind[0] == "s" else columns[n])

    return run


def build_st(statement: Statement, scope: Scope) -> Action:
    """Store one number or a vector."""
    space, kind, count = _form(statement)
    names, size = vector(statement.operands[1]), size_of(kind)
    if len(names) != count:
        raise Unsupported(f"{len(names)} registers for {count} numbers")
    address, active = scope.address(statement.operands[0], _SPACES[space]), scope.active(statement)
    reads = [scope.read(name, f"u{8 * size}") for name in names]

    def run(threads: Threads) -> None:
        values = np.empty((threads.count, count), UNSIGNED[size])
        for n, read in enumerate(reads):
            values[:, n] = read(threads)
        some, launch = active(threads), threads.launch
        if space == "global":
            launch.memory.store(address(threads), some, values, size)
        elif some.any():
            launch.shared.store(threads.ids[some], address(threads)[some], values[some], size)

    return run


def build_atom(statement: Statement, scope: Scope) -> Action:
    """Add integers in global memory, in any order: what was there before, the result, is in nobody's hands.

    Nothing is written to its register: who looks there finds what the program had left.
    """
    *words, kind = statement.words[1:]
    only(statement, tuple(words), {"global", "gpu", "relaxed", "add"})
    if not {"global", "add"} <= set(words) or kind not in ("u32", "u64", "s32"):
        raise Unsupported("an atomic operation other than an integer's addition in global memory")
    size = size_of(kind)
    address, active = scope.address(statement.operands[1], 8), scope.active(statement)
    read = scope.read(statement.operands[2], f"u{8 * size}")

    def run(threads: Threads) -> None:
        values = np.broadcast_to(read(threads), threads.count)
        threads.launch.memory.add(address(threads), active(threads), values, size)

    return run


def _form(statement: Statement) -> tuple[str, str, int]:
    """The space that an instruction is about, its type and how many numbers."""
    *words, kind = statement.words[1:]
    space = next((word for word in words if word in _SPACES), "")
    if not space:
        raise Unsupported("a space other than global and shared")
    only(statement, tuple(words), {space, *_HINTS})
    counts = [int(word[1:]) for word in words if word in ("v1", "v2", "v4")]
    return space, f"{'s' if kind[0] == 's' else 'u'}{8 * size_of(kind)}", counts[0] if counts else 1


def _loader(space: str, statement: Statement, scope: Scope, count: int, size: int) -> Callable[[Threads, Array], Array]:
    address = scope.address(statement.operands[1], _SPACES[space])
    if space == "global":
        return lambda threads, active: threads.launch.memory.load(address(threads), active, count, size)

    def load(threads: Threads, active: Array) -> Array:
        out = np.zeros((threads.count, count), UNSIGNED[size])
        if active.any():
            out[active] = threads.launch.shared.load(threads.ids[active], address(threads)[active], count, size)
        return out

    return load


def _parameter(statement: Statement, scope: Scope) -> Action:
    """Load an argument of the kernel."""
    kind, (target, source) = statement.words[-1], statement.operands
    only(statement, statement.words[1:-1], {"param"})
    name, _, step = source.strip("[] ").partition("+")
    if name not in scope.program.params:
        raise Unsupported(f"parameter {name}")
    number, shift, mask = scope.program.params.index(name), 8 * integer(step or "0"), (1 << 8 * size_of(kind)) - 1
    dtype = UNSIGNED[size_of(kind)]
    put = scope.write(target, f"{'s' if kind[0] == 's' else 'u'}{8 * size_of(kind)}", statement.guard)

    def run(threads: Threads) -> None:
        bits = threads.launch.params[number]
        if isinstance(bits, TensorMap):
            raise Unsupported("a look into a tensor map")
        put(threads, np.asarray(dtype(bits >> shift & mask)))

    return run


def build_cp_async(statement: Statement, scope: Scope) -> Action:
    """Copy 4, 8 or 16 bytes from global to shared memory, or zeros where the last operand says so, some time later."""
    only(statement, statement.words[2:], {"ca", "cg", "shared", "shared::cta", "global"})
    size = integer(statement.operands[2])
    if size not in (4, 8, 16) or ("cg" in statement.words and size != 16):
        raise Unsupported(f"{size} bytes")
    target, source = scope.address(statement.operands[0], 4), scope.address(statement.operands[1], 8)
    active = scope.active(statement)
    taken = scope.read(statement.operands[3], "u32") if len(statement.operands) > 3 else None

    def run(threads: Threads) -> None:
        some = active(threads)
        reading = some & _all_or_nothing(threads, some, taken, size)
        words = threads.launch.memory.load(source(threads), reading, size // 4, 4)[some]
        rows = np.ascontiguousarray(words).view(np.uint8).reshape(-1, size)
        threads.launch.copies.begin(threads.ids[some], target(threads)[some], rows)

    return run


def _all_or_nothing(threads: Threads, some: Array, taken: Reader | None, size: int) -> Array:
    """Which threads copy; the others fill with zeros."""
    if taken is None:
        return threads.every
    counts = np.broadcast_to(taken(threads), threads.count)
    if ((counts != 0) & (counts != size) & some).any():
        raise Unsupported("a copy of some of its bytes")
    return counts != 0


def build_commit(statement: Statement, scope: Scope) -> Action:
    """End the group of copies."""
    scope.unguarded(statement)
    return lambda threads: threads.launch.copies.commit(threads.ids)


def build_wait(statement: Statement, scope: Scope) -> Action:
    """Wait for all but the last groups of copies."""
    scope.unguarded(statement)
    left = integer(statement.operands[0])
    return lambda threads: threads.launch.copies.wait(threads.ids, left)


def build_wait_all(statement: Statement, scope: Scope) -> Action:
    """Wait for all copies."""
    scope.unguarded(statement)

    def run(threads: Threads) -> None:
        threads.launch.copies.commit(threads.ids)
        threads.launch.copies.wait(threads.ids, 0)

    return run


def build_ldmatrix(statement: Statement, scope: Scope) -> Action:
    """Load matrices of 8 rows of 16 bytes: lanes 0-7 have the addresses of the first one's rows, 8-15 of the second's.

    row 0   | lane 0 | lane 1 | lane 2 | lane 3 |      two halves for each lane: where `mma` wants them;
    row 1   | lane 4 | ...                             .trans: the matrix is turned first
    """
    count, turned, names = _matrices(statement, 0)
    address = scope.address(statement.operands[1], 4)
    puts = [scope.write(name, "b32", None) for name in names]
    scope.unguarded(statement)

    def run(threads: Threads) -> None:
        some = _addressing(threads, count)
        rows = threads.launch.shared.load(threads.ids[some], address(threads)[some], 4, 4)
        matrices = rows.reshape(-1, count, 8, 4).view(np.uint16)  # (warps, count, 8, 8)
        words = np.ascontiguousarray(matrices.swapaxes(2, 3) if turned else matrices).view(np.uint32)
        for n, put in enumerate(puts):
            put(threads, np.ascontiguousarray(words[:, n]).reshape(-1))

    return run


def build_stmatrix(statement: Statement, scope: Scope) -> Action:
    """Store matrices: `ldmatrix` backwards."""
    count, turned, names = _matrices(statement, 1)
    address = scope.address(statement.operands[0], 4)
    reads = [scope.read(name, "b32") for name in names]
    scope.unguarded(statement)

    def run(threads: Threads) -> None:
        some = _addressing(threads, count)
        words = np.stack([read(threads).reshape(-1, 8, 4) for read in reads], 1)  # (warps, count, 8, 4)
        halves = words.view(np.uint16)
        rows = np.ascontiguousarray(halves.swapaxes(2, 3) if turned else halves).view(np.uint32).reshape(-1, 4)
        threads.launch.shared.store(threads.ids[some], address(threads)[some], rows, 4)

    return run


def _matrices(statement: Statement, place: int) -> tuple[int, bool, list[str]]:
    """How many matrices, whether they are turned, and their registers."""
    words, names = statement.words[1:], vector(statement.operands[place])
    only(statement, words, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"})
    counts = [int(word[1:]) for word in words if word in ("x1", "x2", "x4")]
    if counts != [len(names)] or "m8n8" not in words or words[-1] != "b16":
        raise Unsupported("a form of matrices")
    return counts[0], "trans" in words, names


def _addressing(threads: Threads, count: int) -> Array:
    """The lanes whose addresses count."""
    return threads.thread % 32 < 8 * count
