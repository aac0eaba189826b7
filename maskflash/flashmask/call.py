"""The call that FlashMask's users write -> attention under column intervals: their layout, names and rules."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from torch import Tensor

from maskflash.api import attention
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.op.asking import BackendChoice
from maskflash.presets import basic
from maskflash.scores.seeds import probability


def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    return_softmax_lse: bool = False,
    return_seed_offset: bool = False,
    fixed_seed_offset: Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    softmax_scale: float | None = None,
    block_mask: Tensor | None = None,
    backend: BackendChoice = "auto",
) -> Any:
    """Attention under FlashMask's vectors, with the arguments of `paddle.nn.functional.flashmask_attention`.

    Args:
        query: (B, Sq, Hq, D) float32, bfloat16, float16 or float64.
        key: (B, Skv, Hkv, D), Hkv divides Hq.
        value: (B, Skv, Hkv, Dv).
        startend_row_indices: (B or 1, Hm, Skv, n) int32, Hm one of 1, Hkv, Hq; query head h reads h // (Hq / Hm). What
            hides row i of column j, v being its vectors:
                causal, n = 1: i >= v0, and what causal hides
                causal, n = 2: v0 <= i < v1, and what causal hides
                causal, n = 4: v0 <= i < v1 or v2 <= i < v3, and what causal hides (FlashMask has no such form)
                else,   n = 2: i >= v0 or i < v1
                else,   n = 4: v0 <= i < v1 or v2 <= i < v3
            Numbers beyond the rows are clipped; an interval that ends before it starts hides nothing.
        dropout: probability of dropping a weight, less than 1; any with training=False, which drops none. The seed is
            drawn from torch's default generator: what `mf.attention` keeps with `dropout_p=`, this does.
        causal: row i sees the columns j <= i + Skv - Sq: aligned to the bottom right.
        window_size: instead of vectors: row i sees from `left` columns before to `right` after its own, i + Skv - Sq,
            both ends included. One number is for both sides, None stands for a side without an end; with causal, right
            counts as 0.
        return_softmax_lse: also return the log-sum-exp.
        return_seed_offset: False: Paddle's generators are not there; torch.manual_seed repeats what is dropped.
        fixed_seed_offset: None, likewise.
        rng_name: "", likewise.
        training: whether dropout applies.
        name: without effect, as in Paddle's eager mode.
        softmax_scale: positive factor of the scores; None for 1/sqrt(D).
        block_mask: None; tiles are found from the vectors.
        backend: as in `compile`.

    Returns:
        out: (B, Sq, Hq, Dv) in query's dtype; 0 in rows that see nothing.
        lse: if asked for, (B, Hq, Sq) float32 (float64 for float64), -inf in rows that see nothing. Both are
            differentiable in query, key and value.

    Raises:
        ArgumentError: shapes, devices or ranges that don't fit, or arguments that exclude one another.
        ArgumentTypeError: types or dtypes that don't fit.

    Source: Wang et al., FlashMask, 2024 (arXiv 2410.01359), section 4.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 6, 2, 16).unbind()
        >>> ends = torch.tensor([3, 3, 3, 6, 6, 6], dtype=torch.int32)  # two documents of three tokens
        >>> flashmask_attention(q, k, v, ends.view(1, 1, 6, 1), causal=True).shape
        torch.Size([1, 6, 2, 16])
    """
    operation = "flashmask_attention"
    for what, asked in (
        ("return_seed_offset", return_seed_offset),
        ("fixed_seed_offset", fixed_seed_offset),
        ("rng_name", rng_name),
        ("block_mask", block_mask),
    ):
        _check_default(operation, what, asked)
    causal = arguments.flag(operation, "causal", causal)
    for what, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"{operation}: {what} is a {type(x).__name__}, expected a tensor")
        arguments.held(operation, what, x, on_meta=True)
        if x.ndim != 4:
            raise ArgumentError(
                f"{operation}: {what} has shape {tuple(x.shape)}, expected 4 dimensions (batch, tokens, heads, "
                "head_dim)"
            )
    return_softmax_lse = arguments.flag(operation, "return_softmax_lse", return_softmax_lse)
    training = arguments.flag(operation, "training", training)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ArgumentTypeError(f"{operation}: dropout is {dropout!r}, expected a number from 0 to 1")
    dropout_p = probability(operation, dropout, "dropout") if training else 0.0
    q_len, kv_len, heads, kv_heads = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    mask: Mask | None = _CAUSAL if causal else None
    offset = kv_len - q_len  # aligned to the bottom right, as column intervals are by themselves
    if window_size is not None:
        if startend_row_indices is not None:
            raise ArgumentError(f"{operation}: got window_size and startend_row_indices, expected one of them")
        left, right = _sides(operation, window_size)
        mask = _window(left, 0 if causal else right)
    elif startend_row_indices is not None:
        mask = ColumnIntervals.from_flashmask(startend_row_indices, causal)
        given = startend_row_indices.shape
        if given[1] not in (1, kv_heads, heads):
            expected = " or ".join(str(n) for n in sorted({1, kv_heads, heads}))
            raise ArgumentError(f"{operation}: startend_row_indices has {given[1]} heads, expected {expected}")
        if given[2] != kv_len or given[0] not in (1, query.shape[0]):
            raise ArgumentError(
                f"{operation}: startend_row_indices has shape {tuple(given)}, expected batch {query.shape[0]} (or 1) "
                f"and {kv_len} columns, one for each token of key"
            )
        offset = 0
    out, lse = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        scale=softmax_scale,
        backend=backend,
        q_offset=offset,
        dropout_p=dropout_p,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_default(operation: str, argument: str, value: object) -> None:
    """Check that an argument of Paddle's that means nothing here is as Paddle has it by default."""
    if value is None or value is False or (isinstance(value, str) and not value):
        return
    got = repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
    raise ArgumentError(f"{operation}: {argument} is {got}, expected it left out: {_WITHOUT[argument]}")


def _sides(name: str, window_size: int | tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """How far a window reaches to the left and to the right."""
    pair = window_size if isinstance(window_size, tuple | list) else (window_size, window_size)
    if len(pair) != 2:
        raise ArgumentError(f"{name}: window_size is {window_size!r}, expected an int or (left, right)")
    left, right = (arguments.side(name, "window_size", side) for side in pair)
    return left, right


_OTHER_NUMBERS: Final = "dropout's seed is torch's; torch.manual_seed repeats it, and mf.attention takes seed="
_WITHOUT: Final = {
    **dict.fromkeys(("return_seed_offset", "fixed_seed_offset", "rng_name"), _OTHER_NUMBERS),
    "block_mask": "tiles without a visible pair are found from the vectors, and skipped; what only it hides is a mask "
    "to join, ColumnIntervals.from_flashmask(vectors, causal) & mf.mask(lambda b, h, q, kv: ...)",
}

# Traced once, since a call makes no mask of its own.
_CAUSAL: Final = basic.causal()
_window: Final = lru_cache(maxsize=64)(basic.sliding_window)
