"""Hypothesis strategies: random masks, score functions, column intervals and sizes.

Hypothesis is an extra (`pip install maskflash[test]`); only these functions import it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from maskflash import presets
from maskflash.ground import arguments
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask as as_mask
from maskflash.scores.score import Score, as_score
from maskflash.testing.shape import Shape

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def masks(max_len: int = 64, batch: int = 2, heads: int = 4) -> SearchStrategy[Mask]:
    """Random masks: presets and written predicates, with tables, combined by & | ^ ~ at most twice.

    Args:
        max_len: tokens that tables have room for.
        batch: batch rows that tables have room for.
        heads: heads that tables have room for.
    """
    from hypothesis import strategies as st

    _sizes("masks", 0, max_len=max_len)
    _sizes("masks", 1, batch=batch, heads=heads)
    number = st.integers(0, max_len)
    seeds = st.integers(0, 2**16)
    written = st.builds(
        _written, st.sampled_from(_WRITTEN), seeds, st.just(max_len), st.just(batch), st.just(heads), number
    )
    preset = st.one_of(
        st.builds(presets.full),
        st.builds(presets.causal),
        st.builds(presets.sliding_window, number, number),
        st.builds(presets.prefix_lm, number),
        st.builds(presets.padding, number),
        st.builds(presets.global_tokens, number),
        st.builds(presets.dilated_window, number, st.integers(1, 5)),
        st.builds(_documents, st.lists(st.integers(0, max_len), min_size=1, max_size=6)),
        st.integers(1, 8).flatmap(
            lambda side: st.builds(presets.natten, st.just(side), st.just(side), *[st.integers(1, side)] * 2)
        ),
    )
    leaves = st.booleans().flatmap(lambda own: written if own else preset)
    joined = st.builds(
        lambda join, x, y: join(x, y), st.sampled_from([operator.and_, operator.or_, operator.xor]), leaves, leaves
    )
    return st.one_of(leaves, joined, joined.map(operator.invert))


def scores(
    max_len: int = 64, batch: int = 2, heads: int = 4, dtype: torch.dtype = torch.float32
) -> SearchStrategy[Score]:
    """Random score functions: up to three steps that scale, add or cap, then perhaps one that hides; tables learn.

    Args:
        max_len: tokens that tables have room for.
        batch: batch rows that tables have room for.
        heads: heads that tables have room for.
        dtype: of the tables.
    """
    from hypothesis import strategies as st

    _sizes("scores", 0, max_len=max_len)
    _sizes("scores", 1, batch=batch, heads=heads)
    dtype = arguments.dtype("scores", dtype)

    def build(steps: list[Callable[..., Any]], last: Callable[..., Any] | None, seed: int) -> Score:
        draw = torch.Generator().manual_seed(seed)
        sizes = (heads,), (batch, max_len), (2 * max_len + 1,)
        tables = [torch.randn(size, generator=draw).to(dtype).requires_grad_() for size in sizes]
        return as_score("scores", [step(*tables, max_len) for step in (*steps, last) if step is not None])

    steps = st.lists(st.sampled_from(_STEPS), min_size=1, max_size=3)
    return st.builds(build, steps, st.sampled_from((None, *_HIDING)), st.integers(0, 2**16))


def columns(q_len: int, kv_len: int, batch: int = 1, heads: int = 1) -> SearchStrategy[ColumnIntervals]:
    """Random column intervals, of every layout, for calls of these sizes; also empty, overlapping and clipped ones.

    Args:
        q_len: rows in tokens.
        kv_len: columns in tokens.
        batch: batch rows; the vectors have as many, or one.
        heads: query heads; the vectors have a divisor of it.
    """
    from hypothesis import strategies as st

    _sizes("columns", 0, q_len=q_len, kv_len=kv_len)
    _sizes("columns", 1, batch=batch, heads=heads)

    def build(names: tuple[str, ...], causal: bool, rows: int, groups: int, near: bool, seed: int) -> ColumnIntervals:
        draw = torch.Generator().manual_seed(seed)
        shape = (rows, groups, kv_len)
        vectors = {name: torch.randint(-2, q_len + 3, shape, generator=draw, dtype=torch.int32) for name in names}
        if near:  # as documents have them: the same for many columns
            vectors = {name: x[..., :1].clamp(min=q_len // 2).expand(shape) for name, x in vectors.items()}
        return ColumnIntervals(**vectors, causal=causal)

    layouts = [("lts",), ("lts", "lte"), ("lts", "ute"), ("lts", "lte", "ute"), ("lts", "lte", "uts", "ute")]
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return st.builds(
        build,
        st.sampled_from(layouts),
        st.booleans(),
        st.sampled_from(sorted({1, batch})),
        st.sampled_from(divisors),
        st.booleans(),
        st.integers(0, 2**16),
    )


def shapes(max_len: int = 64, max_batch: int = 2, max_heads: int = 4, max_head_dim: int = 24) -> SearchStrategy[Shape]:
    """Random sizes of a call: ragged and empty lengths, grouped heads, v's head dim unlike k's.

    Args:
        max_len: of queries and keys.
        max_batch: batch rows.
        max_heads: query heads.
        max_head_dim: of k and of v.
    """
    from hypothesis import strategies as st

    _sizes("shapes", 0, max_len=max_len)
    _sizes("shapes", 1, max_batch=max_batch, max_heads=max_heads, max_head_dim=max_head_dim)

    def grouped(shape: Shape) -> SearchStrategy[Shape]:
        divisors = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0]
        return st.sampled_from(divisors).map(lambda kv_heads: replace(shape, kv_heads=kv_heads))

    length = st.integers(0, max_len)
    dim = st.integers(1, max_head_dim)
    return st.builds(
        Shape,
        batch=st.integers(1, max_batch),
        heads=st.integers(1, max_heads),
        q_len=length,
        kv_len=length,
        head_dim=dim,
        v_head_dim=dim,
    ).flatmap(grouped)


def _sizes(operation: str, low: int, **sizes: int) -> None:
    """Check what a strategy is told of sizes."""
    for name, size in sizes.items():
        arguments.integer(operation, name, size, low=low)


def _documents(lengths: list[int]) -> Mask:
    """Documents for calls of any length, also those that have no room for all."""
    return as_mask(presets.document(lengths=lengths).__call__)


def _written(make: Callable[..., Any], seed: int, max_len: int, batch: int, heads: int, n: int) -> Mask:
    """A predicate over random tables: ids (batch, max_len) in runs, marks (max_len,) bool, spans (heads,)."""
    draw = torch.Generator().manual_seed(seed)
    room = max(max_len, 1)
    ids = torch.randint(0, 2, (batch, room), generator=draw).cumsum(1) // 3
    marks = torch.rand(room, generator=draw) < 0.3
    spans = torch.randint(1, room + 1, (heads,), generator=draw, dtype=torch.int32)
    return as_mask(make(ids, marks, spans, n))


def _branching(marks: Tensor, n: int) -> Any:
    def predicate(b: Any, h: Any, q: Any, kv: Any) -> Any:
        if q < n:
            return kv < n
        if marks[q]:
            return True
        return (q - n) // 7 == (kv - n) // 7 or (q ^ kv) & 3 == 0

    return predicate


_WRITTEN: Final[tuple[Callable[..., Any], ...]] = (
    lambda ids, marks, spans, n: lambda b, h, q, kv: q >= kv and ids[b, q] == ids[b, kv],
    lambda ids, marks, spans, n: lambda b, h, q, kv: abs(q - kv) < spans[h],
    lambda ids, marks, spans, n: lambda b, h, q, kv: 0 <= q - kv < spans[h] and ids[b, q] == ids[b, kv],
    lambda ids, marks, spans, n: lambda b, h, q, kv: marks[kv] or q - n <= kv <= q,
    lambda ids, marks, spans, n: _branching(marks, n),
)


_STEPS: Final[tuple[Callable[..., Any], ...]] = (
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score * of_head[h],
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score * (1 + of_token[b, q] / 2),
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score + of_head[h] * (kv - q) / (n + 1),
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score + of_token[b, q] - of_token[b, kv],
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score + of_distance[kv - q + n],
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: 3 * torch.tanh(score / 3),
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: torch.exp(-(score**2)) * of_token[b, kv],
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score if score > 0 else score * of_head[h],
)
_HIDING: Final[tuple[Callable[..., Any], ...]] = (
    lambda of_head, of_token, of_distance, n: lambda score, b, h, q, kv: score if (q + kv) % 5 else -torch.inf,
    lambda of_head, of_token, of_distance, n: (
        lambda score, b, h, q, kv: torch.where(kv > q + n // 2, -torch.inf, score)
    ),
)
