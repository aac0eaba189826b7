"""Tools for testing masks and attention: one assertion, and Hypothesis strategies for masks and shapes.

Hypothesis is an extra (`pip install maskflash[test]`); only the strategies import it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from maskflash import presets
from maskflash.api import attention
from maskflash.backends.dense import DenseCall
from maskflash.backends.reference import error_budget, reference
from maskflash.errors import ArgumentError
from maskflash.expr.evaluate import Inputs
from maskflash.functions.function import Function
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import MaskLike
from maskflash.masks.predicate import mask as as_mask
from maskflash.masks.sight import Sight
from maskflash.op.asking import BackendChoice
from maskflash.scores import seeds
from maskflash.scores.dropout import keep
from maskflash.scores.score import Score, ScoreLike, as_score, own_arguments
from maskflash.scores.strength import BoundScore, Dropout

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "Shape",
    "assert_matches_dense",
    "columns",
    "dropout_keep",
    "error_budget",
    "masks",
    "reference",
    "scores",
    "shapes",
]


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one attention call: q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv).

    Attributes:
        batch: B, at least 0.
        heads: Hq, query heads.
        kv_heads: Hkv, heads of k and v; it divides `heads`.
        q_len: Sq, rows in tokens.
        kv_len: Skv, columns in tokens.
        head_dim: D, of q and k.
        v_head_dim: Dv, of v.
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 64
    kv_len: int = 64
    head_dim: int = 16
    v_head_dim: int = 16

    def __post_init__(self) -> None:
        for name in ("batch", "q_len", "kv_len"):
            arguments.integer("Shape", name, getattr(self, name))
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
            arguments.integer("Shape", name, getattr(self, name), low=1)
        if self.heads % self.kv_heads:
            raise ArgumentError(f"Shape: heads is {self.heads}, expected a multiple of kv_heads, {self.kv_heads}")

    def tensors(self, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Normally distributed q, k and v that require gradients."""
        dtype, on = arguments.dtype("Shape.tensors", dtype), arguments.device("Shape.tensors", device)
        draw = torch.Generator().manual_seed(_seed("Shape.tensors", seed))
        sizes = (
            (self.batch, self.heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.v_head_dim),
        )
        q, k, v = (torch.randn(size, generator=draw).to(on, dtype).requires_grad_() for size in sizes)
        return q, k, v


def assert_matches_dense(
    mask: MaskLike,
    shape: Shape | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    block_size: BlockSize = 128,
    scale: float | None = None,
    backend: BackendChoice = "auto",
    device: str = "cpu",
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    score: ScoreLike | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = True,
    seed: int = 0,
    **args: Any,
) -> None:
    """Assert that a mask's block map and its attention agree with evaluating every pair densely.

    The map must equal brute force tile by tile. out, lse and the gradients of q, k, v, sinks and whatever the score
    function looks up that requires gradients, with gradients that arrive at both out and lse, must be as near to
    float64 as twice a plain computation in `dtype`, plus one rounding unit of the result and of the terms it is summed
    from (a gradient of zero may be the difference of large terms), and one of float64 for the truth's own rounding.

    Args:
        mask: a mask or predicate.
        shape: sizes of the call.
        dtype: of q, k and v.
        block_size: tokens per tile, one number or a pair.
        scale: factor of the scores; None for 1/sqrt(D).
        backend: as in `compile`.
        device: of the tensors.
        q_offset: as in a call.
        kv_offset: as in a call.
        score: as in `compile`.
        sinks: as in a call.
        dropout_p: as in a call, with `seed`.
        return_lse: as in a call; without it there is no lse to check, and no gradient that arrives there.
        seed: of the random tensors, and of dropout.
        **args: the mask's own arguments, and the score function's.

    Raises:
        AssertionError: naming the result, its error and its budget, or the tile and its kinds.

    Example:
        >>> assert_matches_dense(presets.sliding_window(20), Shape(q_len=100, kv_len=100), block_size=32)
    """
    operation = "assert_matches_dense"
    shape = Shape() if shape is None else shape
    arguments.instance(operation, "shape", shape, Shape, "such as mf.testing.Shape(q_len=100)")
    dtype, seed = arguments.dtype(operation, dtype), _seed(operation, seed)
    checked = as_mask(mask)
    strength = None if score is None else as_score(operation, score)
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    sizes: dict[str, Any] = {"batch": shape.batch, "heads": shape.heads, "device": device, **offsets}
    seen = checked.at(shape.q_len, shape.kv_len, **sizes, **own_arguments(checked, args))
    dense = seen.dense()
    _assert_map(seen, dense, arguments.block_size(operation, block_size))
    q, k, v = shape.tensors(dtype, seed=seed, device=device)
    if sinks is not None:
        sinks = sinks.detach().to(torch.promote_types(sinks.dtype, dtype)).requires_grad_()
    draw = torch.Generator().manual_seed(seed + 1)
    given: dict[str, Any] = {"scale": scale, "block_size": block_size, "backend": backend, "sinks": sinks, **offsets}
    given |= {"score": strength, "dropout_p": dropout_p, "seed": seed if dropout_p else None}
    returned = attention(q, k, v, checked, **given, return_lse=return_lse, **args)
    ours = dict(zip(("out", "lse"), returned, strict=True)) if return_lse else {"out": returned}
    dout = torch.randn(ours["out"].shape, generator=draw).to(device, dtype)
    dlse = torch.randn(dout.shape[:3], generator=draw).to(device) * return_lse
    factor = shape.head_dim**-0.5 if scale is None else scale
    bound = None if strength is None else _bound(strength, shape, sizes, dtype, args)
    tensors = (*(() if strength is None else strength.held()), *args.values())
    learned = {id(x): x for x in tensors if isinstance(x, Tensor) and x.requires_grad}
    lengths = shape.batch, shape.heads, shape.q_len, shape.kv_len
    kept = (
        dropout_keep(seed, dropout_p, *lengths, q_offset, kv_offset).to(device).double() / (1 - dropout_p)
        if dropout_p
        else None
    )
    call = DenseCall(q, k, v, dense, factor, dout, dlse, sinks, bound, tuple(learned.values()), kept)
    exact, plain = call.results(torch.float64), call.results(dtype, backwards=True)
    terms = call.terms(exact)
    arriving = [x.to(result.dtype) for x, result in zip((dout, dlse), ours.values(), strict=False)]
    inputs = {"dq": q, "dk": k, "dv": v, **({} if sinks is None else {"dsinks": sinks})}
    inputs |= {f"dtable{n}": x for n, x in enumerate(learned.values())}
    gradients = torch.autograd.grad(tuple(ours.values()), tuple(inputs.values()), arriving, allow_unused=True)
    ours.update((name, x) for name, x in zip(inputs, gradients, strict=True) if x is not None)
    for name, found in ours.items():
        unit = torch.finfo(torch.promote_types(dtype, found.dtype) if "table" in name else dtype).eps
        unit = max(unit, torch.finfo(found.dtype).eps) + torch.finfo(torch.float64).eps
        budget = error_budget(plain[name], exact[name], dtype) + unit * terms[name]
        _assert_near(name, found.detach(), exact[name].double(), budget)


def _bound(score: Score, shape: Shape, sizes: dict[str, Any], dtype: torch.dtype, args: dict[str, Any]) -> BoundScore:
    """A score function in a call, with what of it is a mask."""
    call = Sizes.checked("assert_matches_dense", shape.q_len, shape.kv_len, **sizes)
    slots, params, tables = Function.bind(score.at(dtype), call, own_arguments(score, args))
    wanted = tuple(table.requires_grad for table in tables)
    inputs = Inputs(slots.expr.decoded(params), tuple(tables))
    return BoundScore(slots.expr, inputs, wanted, sizes["q_offset"], sizes["kv_offset"])


def dropout_keep(
    seed: int | Tensor,
    p: float,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
) -> Tensor:
    """Which pairs a call with this seed keeps, visible or not.

    Args:
        seed: an int of 64 bits, or an int64 tensor of one element.
        p: how likely a pair is dropped, 0 <= p < 1.
        batch: batch rows.
        heads: query heads.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        q_offset: as in a call.
        kv_offset: as in a call.

    Returns:
        (batch, heads, q_len, kv_len) bool, on the seed's device; on the CPU for an int.

    Raises:
        ArgumentError: a number out of range, or a tensor of another shape.
        ArgumentTypeError: something of another type.

    Source: docs/numerics.md specifies it bit by bit.

    Example:
        >>> keep = dropout_keep(7, 0.25, batch=1, heads=1, q_len=3, kv_len=8)
        >>> keep.int()
        tensor([[[[0, 0, 0, 1, 1, 0, 1, 1],
                  [0, 1, 0, 0, 0, 0, 1, 1],
                  [1, 1, 1, 1, 1, 1, 1, 1]]]], dtype=torch.int32)
        >>> part = dropout_keep(7, 0.25, 1, 1, 2, 5, q_offset=1, kv_offset=3)
        >>> torch.equal(part, keep[:, :, 1:, 3:])
        True
    """
    operation = "dropout_keep"
    p = seeds.probability(operation, p, "p")
    arguments.length(operation, "batch", batch, low=1)
    arguments.length(operation, "heads", heads, low=1)
    arguments.length(operation, "q_len", q_len)
    arguments.length(operation, "kv_len", kv_len)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    given = seeds.given(operation, seed, device)
    rows = arguments.offset(operation, "q_offset", q_offset, batch)
    columns = arguments.offset(operation, "kv_offset", kv_offset, batch)
    return keep(Dropout(p, given, rows, columns), batch, heads, q_len, kv_len)


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


def _seed(operation: str, value: Any) -> int:
    """Of torch's generators."""
    seed = arguments.integer(operation, "seed", value, low=None)
    if not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"{operation}: seed is {seed:.3g}, expected a number of 64 bits")
    return seed


def _sizes(operation: str, low: int, **sizes: int) -> None:
    """Check what a strategy is told of sizes."""
    for name, size in sizes.items():
        arguments.integer(operation, name, size, low=low)


def _assert_map(seen: Sight, dense: Tensor, block_size: tuple[int, int]) -> None:
    rows, columns = block_size
    found = seen.block_map(block_size).kinds()
    for i, band in enumerate(dense.split(rows, 2) if dense.numel() else ()):
        for j, tile in enumerate(band.split(columns, 3)):
            expected = tile.flatten(2).any(2).to(torch.int8) + tile.flatten(2).all(2).to(torch.int8)
            wrong = (found[:, :, i, j].expand_as(expected) != expected).nonzero()
            if len(wrong):
                b, h = wrong[0].tolist()
                kinds = ("skip", "partial", "full")
                got, wanted = (kinds[int(x.expand_as(expected)[b, h])] for x in (found[:, :, i, j], expected))
                raise AssertionError(
                    f"{seen.mask}: tile ({i}, {j}) of batch row {b}, head {h} is {got}, expected {wanted}"
                )


def _assert_near(name: str, found: Tensor, exact: Tensor, budget: float) -> None:
    finite = exact.isfinite()
    if not torch.equal(found.double()[~finite], exact[~finite]):
        raise AssertionError(f"{name}: rows that see nothing should hold {exact[~finite][:1].tolist()}")
    error = (found.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3g} exceeds its budget of {budget:.3g}")


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
