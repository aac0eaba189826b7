"""q, k, v and a dense bool mask -> attention's output and log-sum-exp, by plain, differentiable operations of torch.

Everything else is tested against this. It computes in the dtype it is given, so the same function in float64 is
the truth and in bfloat16 the "plain same-dtype implementation" that the error budget is made of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.errors import ArgumentError
from maskflash.ground import arguments, qkv


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense masked attention: out = softmax(score(scale · q kᵀ) over the visible columns) v.

    Args:
        q: (B, Hq, Sq, D), any floating dtype.
        k: (B, Hkv, Skv, D), Hkv divides Hq; query head h reads head h // (Hq // Hkv).
        v: (B, Hkv, Skv, Dv).
        mask: bool, broadcastable to (B, Hq, Sq, Skv); True where the pair may attend.
        scale: factor of the scores.
        sinks: (Hq,), scores of one more column whose v is 0, for each head; None for none.
        score: what becomes of the scaled products (B, Hq, Sq, Skv); -inf hides a pair. None: they stay what they are.
        kept: of dropout, floating (B, Hq, Sq, Skv): what each weight is multiplied by; None for 1.

    Returns:
        out: (B, Hq, Sq, Dv) and lse: (B, Hq, Sq), natural logarithm, both in q's dtype. A row that sees nothing
        has out 0, lse -inf (or the sink) and zero gradients in q, k and v; what hidden rows and columns hold, even
        NaN, has no effect.
    """
    qkv.check(q, k, v, "reference")
    scale = arguments.scale("reference", scale)
    if sinks is not None:
        qkv.check_sinks(sinks, q, "reference")
    arguments.instance("reference", "mask", mask, Tensor, "Mask.dense makes one")
    arguments.held("reference", "mask", mask)
    batch, heads, q_len, _ = q.shape
    wanted = batch, heads, q_len, k.shape[2]
    sizes = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.dtype != torch.bool or mask.ndim > 4 or any(size not in (1, needed) for size, needed in sizes):
        raise ArgumentError(
            f"reference: mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of {wanted}, or 1 in "
            "place of any"
        )
    visible = mask.expand(batch, heads, q_len, k.shape[2])
    group = heads // k.shape[1]
    seen = visible.any(-1)
    used = visible.any(-2).unflatten(1, (k.shape[1], group)).any(2)
    # 0 * NaN is NaN, in forward and in backward: what nobody sees is replaced, not multiplied away.
    q = q.masked_fill(~seen[..., None], 0.0)
    k = k.masked_fill(~used[..., None], 0.0).repeat_interleave(group, dim=1)
    v = v.masked_fill(~used[..., None], 0.0).repeat_interleave(group, dim=1)
    scores = q @ k.mT * scale
    if score is not None:
        if scores.requires_grad:  # 0 * inf is NaN: what a hidden pair's score changes is nothing
            scores.register_hook(lambda gradient: gradient.masked_fill(~visible, 0.0))
        scores = score(scores).to(q.dtype)
        visible = visible & (scores != -torch.inf)
        seen = visible.any(-1)
    scores = scores.masked_fill(~visible, -torch.inf)
    # A row without a visible column gets finite scores first, and its results are replaced afterwards.
    scores = scores.masked_fill(~seen[..., None], 0.0)
    empty = q.new_full((heads,), -torch.inf) if sinks is None else sinks.to(q.dtype)
    empty = empty.masked_fill(empty == -torch.inf, -torch.inf)  # which is none, and has no gradient
    empty = empty[:, None].expand(batch, heads, q_len)  # lse of a row that sees nothing
    if sinks is not None:
        scores, v = torch.cat((scores, empty[..., None]), dim=-1), pad(v, (0, 0, 0, 1))
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * (kept if sinks is None else pad(kept, (0, 1), value=1.0))
    out = weights @ v
    return out.masked_fill(~seen[..., None], 0.0), torch.where(seen, scores.logsumexp(-1), empty)


def error_budget(plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> float:
    """Largest error a kernel may make: twice that of a plain implementation, plus one rounding unit.

        budget = 2 · max|plain - exact| + eps(dtype) · max|exact|

    Args:
        plain: the result of `reference` computed in the kernel's own dtype.
        exact: the result of `reference` in float64; -inf (the lse of an empty row) is left out.
        dtype: whose rounding unit counts; that of `plain` when omitted.

    Returns:
        The budget for max|kernel - exact|, in the units of the result.

    Source: the practice of FlashAttention's and attention-gym's tests, which replaces hand-tuned tolerances.
    """
    for name, x in (("plain", plain), ("exact", exact)):
        arguments.instance("error_budget", name, x, Tensor, "reference makes one")
        arguments.held("error_budget", name, x)
    if plain.shape != exact.shape:
        raise ArgumentError(
            f"error_budget: plain has shape {tuple(plain.shape)}, expected that of exact, {tuple(exact.shape)}"
        )
    unit = arguments.dtype("error_budget", plain.dtype if dtype is None else dtype)
    finite = exact.isfinite()
    if not bool(finite.any()):
        return 0.0
    truth = exact[finite].double()
    error = (plain[finite].double() - truth).abs().max().item()
    return 2 * error + torch.finfo(unit).eps * truth.abs().max().item()
