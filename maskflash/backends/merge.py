"""Attention over parts of the keys -> attention over all of them: each part is an out and its log-sum-exp (lse).

         keys   0 ........ 511   512 ...... 1023          the same queries see both parts
                  out₀, lse₀        out₁, lse₁

    lse = log Σ exp(lseᵢ)          Σ goes over the parts
    out = Σ exp(lseᵢ - lse) outᵢ   each part weighs what its softmax summed up

A part with lse -inf saw nothing: it counts for nothing. A row of such parts alone has out 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments


def merge(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over several disjoint sets of keys, from attention over each of them.

    A shared prefix, the pages of a long cache and the keys of other machines can be attended one by one, with
    `return_lse=True`, and merged. Differentiable in outs and lses, so gradients reach each part's queries and keys.

    Args:
        outs: attention's output over each part: tensors (..., D) of one shape, dtype and device, or one tensor
            (parts, ..., D). Floating dtypes.
        lses: attention's log-sum-exp over each part, natural logarithm: tensors (...), or one (parts, ...). A part
            whose lse is -inf counts for nothing in that row, whatever its out holds, NaN too.

    Returns:
        out: (..., D), in the dtype of outs; 0 in rows whose parts are all -inf. lse: (...), -inf in those rows.
        Both are computed in float32, in float64 if outs or lses are, and lse is left in it.

    Raises:
        ArgumentTypeError: outs or lses are no floating tensors, or tensors of different dtypes.
        ArgumentError: there is no part, or the shapes, devices or numbers of outs and lses don't fit.

    Example:
        >>> import maskflash as mf
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
        >>> halves = [mf.attention(q, k[:, :, i], v[:, :, i], return_lse=True) for i in (slice(40), slice(40, 64))]
        >>> out, lse = merge(*zip(*halves, strict=True))
        >>> torch.allclose(out, mf.attention(q, k, v), atol=1e-5)
        True
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    _check_fit(outs, lses)
    total = torch.float64 if torch.float64 in (outs[0].dtype, lses[0].dtype) else torch.float32
    each = torch.stack(lses).to(total)
    nothing = each == -torch.inf
    # In a row without any part softmax is of zeros, and what comes of it is replaced: -inf - -inf is NaN.
    nowhere = nothing.all(0)
    safe = each.masked_fill(nowhere, 0.0)
    weights = safe.softmax(0)[..., None]
    # 0 * NaN is NaN, in forward and in backward: what counts for nothing is replaced, not multiplied away.
    shares = (w * torch.where(none, 0.0, out) for w, out, none in zip(weights, outs, nothing[..., None], strict=True))
    return reduce(torch.add, shares).to(outs[0].dtype), safe.logsumexp(0).masked_fill(nowhere, -torch.inf)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge one more part into out (..., D) and lse (...), in place; a part that saw nothing in a row has 0 there.

    This is `merge` of two parts in one pass over out, since exp(part_lse - merged lse) = sigmoid(part_lse - lse).
    """
    weight = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -torch.inf, 0.0)  # also where neither saw anything
    out.lerp_(part.to(out.dtype), weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def _parts(name: str, given: Any) -> list[Tensor]:
    """The tensors of a sequence, or of dimension 0 of a tensor: floating, of one shape, dtype and device."""
    parts = list(given.unbind()) if isinstance(given, Tensor) and given.ndim else given
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise ArgumentTypeError(
            f"merge: {name} is a {type(given).__name__}, expected a sequence of tensors, or one tensor (parts, ...)"
        )
    if not parts:
        raise ArgumentError(f"merge: {name} is empty, expected at least one part")
    for place, part in enumerate(parts):
        each = f"{name}[{place}]"
        arguments.instance("merge", each, part, Tensor, "pass what attention returns with return_lse=True")
        arguments.held("merge", each, part, on_meta=True)
        if not part.is_floating_point():
            raise ArgumentTypeError(f"merge: {each} has dtype {part.dtype}, expected a floating dtype")
        if part.dtype != parts[0].dtype:
            raise ArgumentTypeError(f"merge: {each} has dtype {part.dtype}, expected {name}[0]'s {parts[0].dtype}")
        if part.shape != parts[0].shape:
            raise ArgumentError(
                f"merge: {each} has shape {tuple(part.shape)}, expected {name}[0]'s {tuple(parts[0].shape)}"
            )
        if part.device != parts[0].device:
            raise ArgumentError(f"merge: {each} is on {part.device}, expected {name}[0]'s {parts[0].device}")
    return list(parts)


def _check_fit(outs: list[Tensor], lses: list[Tensor]) -> None:
    out, lse = outs[0], lses[0]
    if len(outs) != len(lses):
        raise ArgumentError(f"merge: got {len(outs)} outs and {len(lses)} lses, expected one lse for each out")
    if out.ndim == 0 or out.shape[:-1] != lse.shape:
        raise ArgumentError(
            f"merge: outs have shape {tuple(out.shape)} and lses {tuple(lse.shape)}, expected (..., D) and (...)"
        )
    if out.device != lse.device:
        raise ArgumentError(f"merge: lses are on {lse.device}, expected the {out.device} of outs")
