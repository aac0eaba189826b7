"""Instructions that read registers and write one -> what they compute, for all threads at once.

`OPERATIONS` has a row for each: from the words of an instruction to an `Operation`, the types that it takes and gives
and a function of numbers (see `values`). What rounds rounds once, to nearest even. What PTX leaves open (ex2.approx,
lg2.approx, div.full and others) is numpy's, which is nearly always the nearest number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from tests.ptx import values as on
from tests.ptx.eight_bits import e4m3_bits, e4m3_values
from tests.ptx.faults import Unsupported
from tests.ptx.operands import Action, Scope, only, vector
from tests.ptx.parse import Statement
from tests.ptx.threads import Threads
from tests.ptx.values import DTYPES, HALVES, Array, is_float, size_of

Function = Callable[..., Array]


@dataclass(frozen=True, slots=True)
class Operation:
    """The types of the operands after the first, that of the first, and how the first comes from the others."""

    takes: tuple[str, ...]
    gives: str
    apply: Function


def build(statement: Statement, scope: Scope) -> Action:
    """What an instruction of `OPERATIONS` does."""
    operation = OPERATIONS[statement.words[0]](statement)
    target, *sources = statement.operands
    if len(sources) != len(operation.takes) or "|" in target:
        raise Unsupported(f"operands {', '.join(statement.operands)}")
    read = [scope.read(text, kind) for text, kind in zip(sources, operation.takes, strict=True)]
    write, apply = scope.write(target, operation.gives, statement.guard), operation.apply
    return lambda threads: write(threads, apply(*[one(threads) for one in read]))


def build_mov(statement: Statement, scope: Scope) -> Action:
    """Move a register, or pack registers into a wider one, or the other way."""
    kind, (target, source) = statement.words[-1], statement.operands
    if statement.words != ("mov", kind):
        raise Unsupported("modifiers")
    if not (target.startswith("{") or source.startswith("{")):
        one = scope.read(source, kind)
        put = scope.write(target, kind, statement.guard)
        return lambda threads: put(threads, one(threads))
    parts = vector(target if target.startswith("{") else source)
    bits = 8 * size_of(kind) // len(parts)
    whole, part = DTYPES[f"u{8 * size_of(kind)}"], f"u{bits}"
    if target.startswith("{"):
        read = scope.read(source, f"u{8 * size_of(kind)}")
        puts = [(n, scope.write(text, part, statement.guard)) for n, text in enumerate(parts) if text != "_"]

        def unpack(threads: Threads) -> None:
            held = read(threads)
            for n, put in puts:
                put(threads, (held >> whole(bits * n)).astype(DTYPES[part]))

        return unpack
    reads = [scope.read(text, part) for text in parts]
    write = scope.write(target, kind, statement.guard)

    def pack(threads: Threads) -> None:
        pieces = [one(threads).astype(whole) << whole(bits * n) for n, one in enumerate(reads)]
        write(threads, np.bitwise_or.reduce(np.broadcast_arrays(*pieces)))

    return pack


# What several instructions share


def _rounded(statement: Statement, allowed: set[str]) -> tuple[str, bool]:
    """The type of an instruction on floats, and whether it flushes subnormal numbers."""
    *words, kind = statement.words[1:]
    only(statement, tuple(words), allowed | {"rn", "ftz"})
    return kind, "ftz" in words and kind == "f32"


def _flushed(apply: Function, flush: bool) -> Function:
    return (lambda *given: on.flush(apply(*map(on.flush, given)))) if flush else apply


def _same(count: int, kind: str, apply: Function) -> Operation:
    return Operation((kind,) * count, kind, apply)


def _binary(whole: Function, half: Function, real: Function | None = None) -> Callable[[Statement], Operation]:
    """On integers (wrapping), on halves as float64, and on floats."""

    def operation(statement: Statement) -> Operation:
        kind = statement.words[-1]
        if is_float(kind):
            kind, flush = _rounded(statement, set())
            return _same(2, kind, half if kind in HALVES else _flushed(real or whole, flush))
        only(statement, statement.words[1:-1], set())
        return _same(2, f"u{kind[1:]}", whole)

    return operation


def _mul(statement: Statement) -> Operation:
    kind = statement.words[-1]
    if is_float(kind):
        return _binary(np.multiply, np.multiply)(statement)
    return _widened(statement, kind, 2)


def _mad(statement: Statement) -> Operation:
    kind = statement.words[-1]
    if is_float(kind):
        raise Unsupported("mad of floats")
    return _widened(statement, kind, 3)


def _widened(statement: Statement, kind: str, count: int) -> Operation:
    """mul and mad of integers: the product's low or high half, or all of it."""
    which = statement.words[1:-1]
    if which not in (("lo",), ("hi",), ("wide",)):
        raise Unsupported(f"modifiers {', '.join(which)}")
    wide = f"{kind[0]}{16 * size_of(kind)}"
    given = wide if which == ("wide",) else kind

    def product(a: Array, b: Array) -> Array:
        if which == ("hi",):
            return on.high_product(a, b)
        return a.astype(DTYPES[given]) * b.astype(DTYPES[given])

    if count == 2:
        return Operation((kind, kind), given, product)
    return Operation((kind, kind, given), given, lambda a, b, c: product(a, b) + c)


def _fma(statement: Statement) -> Operation:
    kind, flush = _rounded(statement, set())
    exact = {"f32": on.fma32, "f64": on.fma64}.get(kind, lambda a, b, c: on.odd_sum(a * b, c))
    return _same(3, kind, _flushed(exact, flush))


def _div(statement: Statement) -> Operation:
    kind = statement.words[-1]
    if is_float(kind):
        kind, flush = _rounded(statement, {"full", "approx"})
        return _same(2, kind, _flushed(np.divide, flush))
    only(statement, statement.words[1:-1], set())
    return _same(2, kind, on.quotient)


def _rem(statement: Statement) -> Operation:
    only(statement, statement.words[1:-1], set())
    return _same(2, statement.words[-1], on.remainder)


def _unary(
    apply: Function, allowed: tuple[str, ...] = (), kinds: tuple[str, ...] = ()
) -> Callable[[Statement], Operation]:
    """One operand, of one of these types, or of any."""

    def operation(statement: Statement) -> Operation:
        kind, flush = _rounded(statement, set(allowed))
        if kinds and kind not in kinds:
            raise Unsupported(f"type {kind}")
        return _same(1, kind, _flushed(apply, flush))

    return operation


def _extremum(largest: bool) -> Callable[[Statement], Operation]:
    def operation(statement: Statement) -> Operation:
        kind = statement.words[-1]
        if not is_float(kind):
            only(statement, statement.words[1:-1], set())
            return _same(2, kind, np.maximum if largest else np.minimum)
        kind, flush = _rounded(statement, {"NaN"})
        return _same(2, kind, _flushed(partial(_extreme, largest, "NaN" in statement.words), flush))

    return operation


def _extreme(largest: bool, keep_nan: bool, a: Array, b: Array) -> Array:
    """The larger or smaller number; of a number and NaN the number, unless NaN is kept. -0 is less than 0."""
    pick = ((np.maximum if keep_nan else np.fmax), (np.minimum if keep_nan else np.fmin))[not largest]
    zeros, negative = (a == 0) & (b == 0), (np.signbit(a), np.signbit(b))
    sign = np.logical_and(*negative) if largest else np.logical_or(*negative)
    return np.where(zeros, np.where(sign, a.dtype.type(-0.0), a.dtype.type(0.0)), pick(a, b))


def _logic(apply: Function, count: int = 2) -> Callable[[Statement], Operation]:
    def operation(statement: Statement) -> Operation:
        only(statement, statement.words[1:-1], set())
        return _same(count, statement.words[-1], apply)

    return operation


def _shift(left: bool) -> Callable[[Statement], Operation]:
    """By the width of the type, or more: nothing of the number is left but its sign."""

    def operation(statement: Statement) -> Operation:
        only(statement, statement.words[1:-1], set())
        kind, bits = statement.words[-1], 8 * size_of(statement.words[-1])

        def shifted(a: Array, count: Array) -> Array:
            inside = np.minimum(count, np.uint32(bits - 1)).astype(a.dtype)
            if left:
                return np.where(count < bits, a << inside, a.dtype.type(0))
            return np.where((count < bits) | (a.dtype.kind == "i"), a >> inside, a.dtype.type(0))

        return Operation((kind, "u32"), kind, shifted)

    return operation


def _bfe(statement: Statement) -> Operation:
    """Bits start to start + length; beyond the word they are its sign, or 0."""
    only(statement, statement.words[1:-1], set())
    kind, bits = statement.words[-1], 8 * size_of(statement.words[-1])

    def extracted(a: Array, start: Array, asked: Array) -> Array:
        start, asked = (np.minimum(x & np.uint32(255), np.uint32(bits)).astype(np.int64) for x in (start, asked))
        length = np.minimum(asked, bits - start)
        up = np.clip(bits - start - length, 0, bits - 1).astype(a.dtype)
        down = np.clip(bits - length, 0, bits - 1).astype(a.dtype)
        beyond = np.where((asked > 0) & (a < 0), np.array(-1).astype(a.dtype), a.dtype.type(0))
        return np.where(length > 0, (a << up) >> down, beyond)

    return Operation((kind, "u32", "u32"), kind, extracted)


def _bfi(statement: Statement) -> Operation:
    """The low `length` bits of a, in place of those of b from `start` on."""
    only(statement, statement.words[1:-1], set())
    kind = statement.words[-1]
    if kind != "b32":
        raise Unsupported(f"type {kind}")

    def inserted(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = (np.minimum(x & np.uint32(255), np.uint32(32)).astype(np.uint64) for x in (start, length))
        one = np.uint64(1)
        mask = ((one << length) - one) << start
        return (b.astype(np.uint64) & ~mask | a.astype(np.uint64) << start & mask).astype(np.uint32)

    return Operation((kind, kind, "u32", "u32"), kind, inserted)


def _lop3(statement: Statement) -> Operation:
    only(statement, statement.words[1:], {"b32"})

    def looked_up(a: Array, b: Array, c: Array, table: Array) -> Array:
        rows = [(a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) for n in range(8) if table >> n & 1]
        return np.bitwise_or.reduce(np.broadcast_arrays(*rows)) if rows else np.uint32(0) * a

    return Operation(("u32",) * 4, "u32", looked_up)


def _prmt(statement: Statement) -> Operation:
    """Each byte of the result is one of eight, or its sign."""
    only(statement, statement.words[1:], {"b32"})

    def permuted(a: Array, b: Array, selector: Array) -> Array:
        a, b, selector = np.broadcast_arrays(a, b, selector)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        out = np.zeros(a.shape, np.uint32)
        for n in range(4):
            pick = selector >> np.uint32(4 * n) & np.uint32(15)
            byte = (both >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            out |= np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * n)
        return out

    return Operation(("u32",) * 3, "u32", permuted)


_SIGNS: Final[dict[str, Any]] = {
    **{
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def _setp(statement: Statement) -> Operation:
    """A comparison; of floats, false with NaN unless its name ends with u. Then, if asked for, and / or a predicate."""
    name, *words, kind = statement.words[1:]
    only(statement, tuple(words), {"and", "or", "ftz"})
    if is_float(kind):
        compare = _real_comparison(name)
        compare = (lambda a, b, real=compare: real(on.flush(a), on.flush(b))) if "ftz" in words else compare
    elif name in _SIGNS and not (name[0] in "lh" and name[1] in "os" and kind[0] == "s"):
        compare = _SIGNS[name]
    else:
        raise Unsupported(f"comparison {name}")
    if joined := {"and": np.logical_and, "or": np.logical_or}.get(words[0] if words else ""):
        return Operation((kind, kind, "pred"), "pred", lambda a, b, p: joined(compare(a, b), p))
    return Operation((kind, kind), "pred", compare)


def _real_comparison(name: str) -> Function:
    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    sign = _SIGNS.get(name.removesuffix("u") if len(name) == 3 else name)
    if sign is None or name in ("lo", "ls", "hi", "hs"):
        raise Unsupported(f"comparison {name}")
    if len(name) == 3:
        return lambda a, b: sign(a, b) | unordered(a, b)
    return lambda a, b: sign(a, b) & ~unordered(a, b)


def _selp(statement: Statement) -> Operation:
    only(statement, statement.words[1:-1], set())
    kind = f"u{8 * size_of(statement.words[-1])}"
    return Operation((kind, kind, "pred"), kind, lambda a, b, p: np.where(p, a, b))


def _cvta(statement: Statement) -> Operation:
    """Generic addresses are those of global memory, and of parameters."""
    only(statement, statement.words[1:], {"to", "global", "param", "u64"})
    return _same(1, "u64", lambda a: a)


_ROUNDINGS: Final = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}


def _cvt(statement: Statement) -> Operation:
    """From one type to another: rounded where it must be said, integers wrapped, floats clamped to integers."""
    *words, target, source = statement.words[1:]
    if words == ["rna"] and (target, source) == ("tf32", "f32"):
        return Operation(("f32",), "u32", lambda a: (a.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000))
    if words == ["rn", "satfinite"] and (target, source) == ("e4m3x2", "f32"):
        return Operation((source, source), "u16", _pair_of_e4m3)
    if words == ["rn", "satfinite"] and (target, source) == ("e4m3x2", "f16x2"):
        return Operation((source,), "u16", lambda pair: _pair_of_e4m3(pair[..., 1], pair[..., 0]))
    if words == ["rz"] and (target, source) == ("f16", "f32"):
        return Operation((source,), target, on.toward_zero)
    only(statement, tuple(words), {"rn", "ftz", *_ROUNDINGS})
    if source == "e4m3x2":
        return Operation(("u16",), "f16x2", lambda a: np.stack([e4m3_values(a & 255), e4m3_values(a >> 8)], -1))
    if target in ("f16x2", "bf16x2"):
        return Operation((source, source), target, lambda high, low: np.stack(np.broadcast_arrays(low, high), -1))
    whole = next((word for word in words if word in _ROUNDINGS), None)
    if not is_float(source):
        if target in HALVES and size_of(source) > 4:
            raise Unsupported(f"{source} to {target}")
        held = "f64" if target in HALVES else target
        return Operation((source,), target, lambda a: a.astype(DTYPES[held]))
    if not is_float(target):
        if whole is None:
            raise Unsupported("a float to an integer without rounding")
        rounding = _ROUNDINGS[whole]
        return Operation((source,), target, lambda a: on.to_integer(rounding(a), source, target))
    rounded = _ROUNDINGS[whole] if whole else (lambda a: a)
    if target in HALVES:
        return Operation((source,), target, rounded)
    flush = "ftz" in words and "f32" in (source, target)
    return Operation((source,), target, _flushed(lambda a: rounded(a).astype(DTYPES[target]), flush))


def _pair_of_e4m3(high: Array, low: Array) -> Array:
    return (e4m3_bits(high).astype(np.uint16) << np.uint16(8)) | e4m3_bits(low)


OPERATIONS: Final[dict[str, Callable[[Statement], Operation]]] = {
    "add": _binary(np.add, on.odd_sum, np.add),
    "sub": _binary(np.subtract, lambda a, b: on.odd_sum(a, -b), np.subtract),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rem": _rem,
    "neg": _unary(np.negative),
    "abs": _unary(np.abs),
    "min": _extremum(False),
    "max": _extremum(True),
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "not": _logic(np.invert, 1),
    "shl": _shift(True),
    "shr": _shift(False),
    "bfe": _bfe,
    "bfi": _bfi,
    "lop3": _lop3,
    "prmt": _prmt,
    "ex2": _unary(np.exp2, ("approx",), ("f32",)),
    "lg2": _unary(np.log2, ("approx",), ("f32",)),
    "rcp": _unary(np.reciprocal, ("approx",), ("f32", "f64")),
    "sqrt": _unary(np.sqrt, ("approx",), ("f32", "f64")),
    "rsqrt": _unary(lambda a: np.reciprocal(np.sqrt(a)), ("approx",), ("f32",)),
    "setp": _setp,
    "selp": _selp,
    "cvta": _cvta,
    "cvt": _cvt,
}
