"""What a layer of Transformers does to its scores -> a score function, and its arguments; sinks of each row.

    softcap=50.0           cap * tanh(score / cap)                  Gemma 2, VaultGemma, VideoPrism
    position_bias=tensor   score + tensor[b, h, row, column]        T5 and its kin, Wav2Vec2-Conformer, SeamlessM4T
    sinks=tensor           one more score for each row, of no key   Inkling 2

A cap and a bias are arguments of functions that are traced once, so that no layer and no step traces again.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.scores.score import Score, score


@score
def _capped(score: Any, b: Any, h: Any, q: Any, kv: Any, *, cap: Any) -> Any:
    return cap * torch.tanh(score / cap)


def _biased(one_b: bool, one_h: bool, one_q: bool, one_kv: bool) -> Score:
    """What adds a tensor of all pairs, whose rows and columns are the call's own; 1 serves all."""

    def position_bias(score: Any, b: Any, h: Any, q: Any, kv: Any, *, bias: Any, row: Any, column: Any) -> Any:
        return score + bias[0 if one_b else b, 0 if one_h else h, 0 if one_q else q - row, 0 if one_kv else kv - column]

    return score(position_bias)


_BIASED: Final = {ones: _biased(*ones) for ones in product((False, True), repeat=4)}


def score_of(
    softcap: float | None, bias: Any, shape: tuple[int, int, int, int], offsets: tuple[int, int], layer: str
) -> tuple[Score | None, dict[str, Any]]:
    """The score function of a layer's call.

    Args:
        softcap: what no score exceeds; None for no such thing.
        bias: floating (B, Hq, Sq, Skv) or 1 in place of any, what is added to the scaled products; None for nothing.
        shape: (B, Hq, Sq, Skv) of the call.
        offsets: numbers of the first row and of the first column, as the mask counts.
        layer: for messages.

    Returns:
        The function, None where the scaled products are left as they are, and its arguments.

    Raises:
        ArgumentError: a bias of another shape, or one beside a softcap, since no model says which comes first.
        ArgumentTypeError: a bias that is no floating tensor.
    """
    if bias is None:
        return (None, {}) if softcap is None else (_capped, {"cap": float(softcap)})
    if softcap is not None:
        raise ArgumentError(
            f"{layer} asks for softcap and position_bias, which don't say which is first; use eager for this model"
        )
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        got = f"a tensor of {bias.dtype}" if isinstance(bias, Tensor) else f"a {type(bias).__name__}"
        raise ArgumentTypeError(f"{layer} has {got} as position_bias, expected a floating tensor")
    if bias.ndim != 4 or any(size not in (1, needed) for size, needed in zip(bias.shape, shape, strict=True)):
        raise ArgumentError(
            f"{layer} has a position_bias of shape {tuple(bias.shape)}, expected {shape}, or 1 in place of any"
        )
    one_b, one_h, one_q, one_kv = (size == 1 for size in bias.shape)
    return _BIASED[one_b, one_h, one_q, one_kv], {"bias": bias, "row": offsets[0], "column": offsets[1]}


def with_sinks(found: tuple[Tensor, Tensor], sinks: Any, layer: str) -> Tensor:
    """Attention in which each row has one more score, of a key whose value is 0.

    The row's weights then add up to exp(lse) / (exp(lse) + exp(sink)).

    Args:
        found: out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), without them.
        sinks: floating (B, Hq, Sq, 1), or 1 in place of any.
        layer: for messages.

    Raises:
        ArgumentError: sinks of another shape.
        ArgumentTypeError: sinks that are no floating tensor.
    """
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise ArgumentTypeError(f"{layer} has a {type(sinks).__name__} as sinks, expected a floating tensor")
    out, lse = found
    shape = (*lse.shape, 1)
    if sinks.ndim != 4 or any(size not in (1, needed) for size, needed in zip(sinks.shape, shape, strict=True)):
        raise ArgumentError(f"{layer} has sinks of shape {tuple(sinks.shape)}, expected {shape}, or 1 in place of any")
    share = torch.sigmoid(lse[..., None] - sinks)
    return (out * share).to(out.dtype)
