"""What expression tests share: predicates called as plain Python on every pair, and random ones to call."""

import functools
import itertools
import linecache
import operator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

import maskflash as mf
from maskflash.expr.evaluate import evaluate
from maskflash.trace.trace import trace


def grid(shape, device="cpu"):
    """Index tensors of every pair, that broadcast to `shape` (B, H, Sq, Skv)."""
    axes = [
        torch.arange(n, device=device).view([-1 if a == axis else 1 for a in range(4)]) for axis, n in enumerate(shape)
    ]
    return dict(zip(("b", "h", "q", "kv"), axes, strict=True))


def call(predicate, shape, mask_args, index=torch.tensor):
    """The predicate's truth at every pair, from calling it on 0-dim int64 tensors (or ints)."""
    seen = [bool(predicate(*map(index, pair), **mask_args)) for pair in itertools.product(*(range(n) for n in shape))]
    return torch.tensor(seen).view(shape)


def traced_values(predicate, shape, mask_args):
    """The predicate's truth at every pair, from its trace."""
    traced = trace(predicate, mask_args)
    return evaluate(traced.expr, traced.bind(mask_args), grid(shape))


def agree(predicate, shape=(1, 1, 9, 8), index=torch.tensor, **mask_args):
    """Check that tracing a predicate is calling it; returns the trace."""
    expected = call(predicate, shape, mask_args, index)
    got = traced_values(predicate, shape, mask_args)
    assert got.shape == expected.shape
    differing = (got != expected).nonzero().tolist()
    assert not differing, f"{trace(predicate, mask_args).expr}\ndiffers at (b, h, q, kv) = {differing[:5]}"
    return trace(predicate, mask_args)


TABLES = {
    "I64": torch.tensor([3, -2, 0, 7, 7, 11, -9]),
    "BIG": torch.tensor([2**62, -(2**62), 2**40, -1, 5]),
    "I32": torch.tensor([2**31 - 1, -(2**31), 4, 9, -6, 0], dtype=torch.int32),
    "I8": torch.tensor([127, -128, 5, 0, -3], dtype=torch.int8),
    "U8": torch.tensor([0, 255, 128, 3, 200, 1, 2], dtype=torch.uint8),
    "FLAG": torch.tensor([True, False, False, True, True]),
    "F32": torch.tensor([0.5, -1.5, 2.25, 1e30, 0.1, 7.0]),
    "WILD": torch.tensor([float("inf"), float("nan"), -float("inf"), 0.0, -2.0, 1.0]),
    "SORTED": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
    "SQUARE": torch.arange(30).view(5, 6) % 7,
}


def _binary(operands, operators):
    return st.builds("({} {} {})".format, operands, st.sampled_from(operators), operands)


@functools.cache
def integers(depth):
    """Texts of integer expressions in b, h, q, kv that always depend on one of them."""
    indices = st.sampled_from(["q", "kv", "q", "kv", "b", "h"])
    if depth == 0:
        return indices
    x, truth, real = integers(depth - 1), predicates(depth - 1), reals(depth - 1)
    number = st.sampled_from([0, 1, 2, 3, 5, 8, -1, -4, 100, 300, 2**31, -(2**31), 2**40, 2**62])
    divisor = st.sampled_from(["2", "3", "7", "-3", "(q % 4)", "(kv + 1)", "(kv - 3)"])
    sizes = {"I64": 7, "BIG": 5, "I32": 6, "I8": 5, "U8": 7, "SORTED": 12}
    table = st.sampled_from([f"{name}[{{}} % {size}]" for name, size in sizes.items()])
    bits, mask = st.sampled_from(["&", "|", "^"]), st.sampled_from(["1", "6", "7", "-8", "255"])
    shift, count = st.sampled_from(["<<", ">>"]), st.sampled_from(["1", "3", "(kv & 3)", "(kv - 2)"])
    return st.one_of(
        indices,
        _binary(x, ["+", "-", "*", "&", "|", "^"]),
        st.builds("({} {} {})".format, x, st.sampled_from(["+", "-", "*"]), number),
        st.builds("({} {} {})".format, number, st.sampled_from(["+", "-", "*"]), x),
        st.builds("({} {} {})".format, x, st.sampled_from(["//", "%"]), divisor),
        st.builds("torch.div({}, {}, rounding_mode='trunc')".format, x, divisor),
        st.builds("torch.fmod({}, {})".format, x, divisor),
        st.builds("({} {} {})".format, x, bits, mask),
        st.builds("({} {} {})".format, x, shift, count),
        st.builds(str.format, table, x),
        st.builds("I64[{}]".format, x),
        st.builds("({} ** {})".format, x, st.integers(2, 8)),
        st.builds("SQUARE[{} % 5, {} % 6]".format, x, x),
        st.builds("{}({}, {})".format, st.sampled_from(["torch.minimum", "torch.maximum"]), x, x),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), x, number),
        st.builds("{}{}".format, st.sampled_from(["-", "~", "abs"]), x.map("({})".format)),
        st.builds("torch.where({}, {}, {})".format, truth, x, x),
        st.builds("({} if {} else {})".format, x, truth, x),
        st.builds("{}.clamp({}, 9)".format, x, st.sampled_from([-5, 0, 2])),
        st.builds("{}.to(torch.{})".format, x, st.sampled_from(["int32", "uint8", "int64"])),
        st.builds("torch.floor({}).long()".format, real),
        st.builds("({}).long()".format, truth),
    )


@functools.cache
def reals(depth):
    """Texts of floating-point expressions."""
    x = integers(max(depth - 1, 0))
    leaves = st.one_of(
        st.builds("({} / {})".format, x, st.sampled_from(["2", "3", "(kv + 1)", "(q - 4)"])),
        st.builds("({} * {})".format, x, st.sampled_from(["0.5", "-1.25", "0.1"])),
        st.builds("F32[{} % 6]".format, x),
        st.builds("WILD[{} % 6]".format, x),
    )
    if depth == 0:
        return leaves
    y = reals(depth - 1)
    return st.one_of(
        leaves,
        _binary(y, ["+", "-", "*", "/"]),
        st.builds("{}({})".format, st.sampled_from(["torch.sqrt", "torch.round", "torch.ceil", "abs", "-"]), y),
        st.builds("torch.where({}, {}, {})".format, predicates(depth - 1), y, y),
        st.builds("{}({}, {})".format, st.sampled_from(["torch.minimum", "torch.maximum", "min", "max"]), y, y),
        st.builds("({} {} {})".format, y, st.sampled_from(["//", "%"]), y),
    )


@functools.cache
def predicates(depth):
    """Texts of truth values."""
    x = integers(depth)
    comparison = ["<", "<=", ">", ">=", "==", "!="]
    number = st.sampled_from([0, 1, 3, 5, -2, 64, 2**31])
    leaves = st.one_of(
        _binary(x, comparison),
        st.builds("({} {} {})".format, x, st.sampled_from(comparison), number),
        st.builds("FLAG[{} % 5]".format, x),
    )
    if depth == 0:
        return leaves
    y = predicates(depth - 1)
    return st.one_of(
        leaves,
        _binary(y, ["and", "or", "&", "|", "^"]),
        st.builds("(not {})".format, y),
        st.builds("({} if {} else {})".format, y, y, y),
        st.builds("({} <= {} < {})".format, x, x, x),
        _binary(reals(depth - 1), comparison),
    )


_count = itertools.count()


def compile_predicate(text, with_source=True):
    """A predicate of this text; with source it is lowered from its syntax tree, without it forks."""
    name = f"<predicate {next(_count)}>" if with_source else "<nowhere>"
    source = f"f = lambda b, h, q, kv: {text}\n"
    if with_source:
        linecache.cache[name] = (len(source), None, [source], name)
    scope = {"torch": torch, **TABLES}
    exec(compile(source, name, "exec"), scope)
    return scope["f"]


@pytest.fixture(scope="session")
def brute():
    """The functions above: test modules can't import one another under importlib."""
    return SimpleNamespace(grid=grid, call=call, traced_values=traced_values, agree=agree, compile=compile_predicate)


@pytest.fixture(scope="session", name="agree")
def agree_fixture():
    return agree


@pytest.fixture(scope="session")
def texts():
    """The strategy of random predicates' texts."""
    return predicates(2)


AFFINE = [
    lambda q, kv, n, m: q - kv >= n,
    lambda q, kv, n, m: abs(q - kv - n) <= m,
    lambda q, kv, n, m: 2 * (q - kv) != n,
    lambda q, kv, n, m: q < n,
    lambda q, kv, n, m: kv >= n,
    lambda q, kv, n, m: 3 * kv - 1 > n or q == m,
    lambda q, kv, n, m: q - kv == n if kv > m else q > 5,
    lambda q, kv, n, m: max(min(q - n, kv), 0) <= kv - m,
    lambda q, kv, n, m: -q < n - kv,
]
JOINS = st.sampled_from([operator.and_, operator.or_, operator.xor])


def compared(compare, n, m):
    return mf.mask(lambda b, h, q, kv: compare(q, kv, n, m))


def affine_masks(max_len=64):
    """Random masks that compare only q, kv and q - kv with numbers of about `max_len` at most; they have formulas."""
    number = st.integers(-max_len // 2, max_len)
    leaves = st.one_of(
        st.builds(mf.full),
        st.builds(compared, st.sampled_from(AFFINE), number, number),
        st.builds(mf.sliding_window, *[st.integers(0, max_len)] * 2),
        st.builds(mf.prefix_lm, st.integers(0, max_len)),
    )

    def joined(inner):
        return st.one_of(st.builds(lambda join, x, y: join(x, y), JOINS, inner, inner), inner.map(operator.invert))

    return st.recursive(leaves, joined, max_leaves=4)
