"""Attention sinks -> what one more term in each row's softmax does to out, to lse, and its gradient.

    P = exp(s - lse)        lse = log(exp(sink) + Σ exp(s))        s are a row's scores, `sink` its head's number

The term takes its share of a row and gives nothing to out. -inf takes no share. A row that sees nothing has out 0 and
lse = sink. Source: the learned sinks of gpt-oss (OpenAI, 2025); Miller, Attention Is Off By One, 2023, for sink 0.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_AT_ONCE: Final = 1 << 14  # rows: torch sums fewer than 32768 numbers in one order, whatever the threads


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let the sinks take their shares, in place.

    Args:
        out: (B, Hq, Sq, Dv), 0 in rows that see nothing.
        lse: (B, Hq, Sq), without the sinks.
        sinks: (Hq,).
    """
    whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.exp(lse - whole).nan_to_num_(0.0)  # -inf - -inf, in a row of nothing; where lse is NaN, out is
    out.mul_(share[..., None])
    lse.copy_(whole)


def gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks, in an order of summation that does not depend on threads.

    The sink's own score has P = exp(sink - lse) and no value, so that dS = P ∘ (0 - delta).

    Args:
        sinks: (Hq,).
        lse: (B, Hq, Sq), with the sinks in it.
        delta: (B, Hq, Sq), row sums of dO ∘ O, less dlse.

    Returns:
        (Hq,) in the dtype of sinks.
    """
    sink = sinks.to(lse.dtype)[:, None]
    nothing = lse == -torch.inf
    terms = (torch.exp(sink - lse.masked_fill(nothing, 0.0)) * delta).masked_fill(nothing | (sink == -torch.inf), 0.0)
    found = torch.zeros_like(sinks, dtype=lse.dtype)
    for part in terms.split(_AT_ONCE, dim=2):
        found -= part.sum(2).sum(0)
    return found.to(sinks.dtype)
