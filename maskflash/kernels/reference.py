"""Turns q, k, v and a dense bool mask into attention's output and log-sum-exp with plain, differentiable torch ops.

Everything else is tested against this. It computes in the dtype it is given, so the same function in float64 is
the truth and in bfloat16 the "plain same-dtype implementation" that the error budget is made of.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense masked attention: out = softmax(scale · q kᵀ over the visible columns) v.

    Args:
        q: (B, Hq, Sq, D), any floating dtype.
        k: (B, Hkv, Skv, D), Hkv divides Hq; query head h reads head h // (Hq // Hkv).
        v: (B, Hkv, Skv, Dv).
        mask: bool, broadcastable to (B, Hq, Sq, Skv); True where the pair may attend.
        scale: factor of the scores.

    Returns:
        out: (B, Hq, Sq, Dv) and lse: (B, Hq, Sq), natural logarithm, both in q's dtype. A row that sees nothing
        has out 0, lse -inf and zero gradients; what hidden rows and columns hold, even NaN, has no effect.
    """
    batch, heads, q_len, _ = q.shape
    visible = mask.expand(batch, heads, q_len, k.shape[2])
    group = heads // k.shape[1]
    seen = visible.any(-1)
    used = visible.any(-2).unflatten(1, (k.shape[1], group)).any(2)
    # 0 * NaN is NaN, in forward and in backward: what nobody sees is replaced, not multiplied away.
    q = q.masked_fill(~seen[..., None], 0.0)
    k = k.masked_fill(~used[..., None], 0.0).repeat_interleave(group, dim=1)
    v = v.masked_fill(~used[..., None], 0.0).repeat_interleave(group, dim=1)
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    # A row without a visible column gets finite scores first, and its results are replaced afterwards.
    scores = scores.masked_fill(~seen[..., None], 0.0)
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1) @ v
    return out.masked_fill(~seen[..., None], 0.0), lse.masked_fill(~seen, -torch.inf)


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
    finite = exact.isfinite()
    if not bool(finite.any()):
        return 0.0
    truth = exact[finite].double()
    error = (plain[finite].double() - truth).abs().max().item()
    return 2 * error + torch.finfo(dtype or plain.dtype).eps * truth.abs().max().item()
