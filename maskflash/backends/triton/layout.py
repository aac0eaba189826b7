"""Tensors of a call, and the values of a mask's and a score's slots -> arguments of the kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.problem import Problem
from maskflash.backends.triton.signature import SCORE
from maskflash.expr.evaluate import Inputs
from maskflash.expr.nodes import Expr
from maskflash.scores.dropout import threshold, words
from maskflash.scores.strength import BoundScore, Dropout

UNIT: Final = 8  # elements: head dims and strides are multiples of it, so that the compiler loads whole vectors
ALIGNMENT: Final = 16  # bytes of a vector
_LARGEST_STEP: Final = 2**23  # elements from token to token


def without_hidden(seen: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors (B, heads, tokens, n) with zeros for the tokens that nobody sees: 0 * NaN would be NaN in the kernels.

    See docs/decisions/0007 for what keeping them out inside the kernels costs.
    """
    if seen is None:
        return list(tensors)
    if seen.shape[1] > 1:  # query heads of a group share a key head: one that sees a token is enough
        seen = seen.unflatten(1, (tensors[0].shape[1], -1)).any(2)
    return [torch.where(seen[..., None], x, 0.0) for x in tensors]


def laid_out(*tensors: Tensor) -> list[Tensor]:
    """Tensors (B, heads, tokens, n) as the kernels address them; zeros are added to the last dimension where needed.

    It is dense and a multiple of UNIT long, as are all strides, and offsets inside a tile (128 tokens at most) fit 32
    bits. The first element lies at a multiple of ALIGNMENT: for others Triton compiles another kernel, which loads
    each number alone.
    """
    longer = (x if x.shape[3] % UNIT == 0 else pad(x, (0, -x.shape[3] % UNIT)) for x in tensors)
    return [x if fits(x) else x.clone(memory_format=torch.contiguous_format) for x in longer]


def fits(x: Tensor) -> bool:
    """Whether a tensor (B, heads, tokens, n) lies in memory as the kernels address it."""
    return (
        x.stride(3) == 1
        and x.stride(2) < _LARGEST_STEP
        and all(step % UNIT == 0 for step in x.stride()[:3])
        and x.data_ptr() % ALIGNMENT == 0
    )


def cut(x: Tensor, dim: int) -> Tensor:
    """A result without what `laid_out` added to its last dimension."""
    return x if x.shape[3] == dim else x[..., :dim].contiguous()


def addressed(**tensors: Tensor) -> dict[str, Any]:
    """Tensors (B, heads, tokens, n) and their strides but for the last, in units of UNIT elements, as arguments."""
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        batch_step, head_step, token_step, _ = x.stride()
        found[f"{name}_ptr"] = x
        found[f"{name}_b"] = batch_step // UNIT
        found[f"{name}_h"] = head_step // UNIT
        found[f"{name}_s"] = token_step // UNIT
    return found


def whole(dim: int) -> int:
    """A head dim as `laid_out` makes it."""
    return -(-dim // UNIT) * UNIT


def padded(dim: int) -> int:
    """The power of two, 16 at least, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def mask_values(problem: Problem) -> dict[str, Any]:
    """Offsets, params, and each table with its sizes and strides, as arguments: see `signature`."""
    return _values(problem.expr, problem.inputs, problem.q_offset, problem.kv_offset)


def score_values(score: BoundScore) -> dict[str, Any]:
    """The same of a score."""
    return _values(score.expr, score.inputs, score.q_offset, score.kv_offset, SCORE)


def dropout_values(dropout: Dropout, batch: int, heads: int, q_len: int, kv_len: int) -> dict[str, Any]:
    """What kernels decide by which pairs they keep."""
    rows, columns = words(dropout, batch, heads, q_len, kv_len)
    limit = threshold(dropout.p)
    return {"row_words": rows, "column_words": columns, "threshold": limit, "kept_scale": 1 / (1 - dropout.p)}


def _values(
    expr: Expr, inputs: Inputs, q_offset: int | Tensor, kv_offset: int | Tensor, prefix: str = ""
) -> dict[str, Any]:
    found: dict[str, Any] = {f"{prefix}q_offset": _dense(q_offset), f"{prefix}kv_offset": _dense(kv_offset)}
    for slot, value in enumerate(expr.coded(inputs.params)):
        found[f"{prefix}p{slot}"] = value
    for slot, table in enumerate(inputs.tables):
        name = f"{prefix}t{slot}"
        found[name] = table.view(torch.uint8) if table.dtype == torch.bool else table  # bytes in memory
        for axis, (size, step) in enumerate(zip(table.shape, table.stride(), strict=True)):
            found[f"{name}_size{axis}"] = size
            found[f"{name}_stride{axis}"] = step
    return found


def _dense(offset: int | Tensor) -> int | Tensor:
    return offset.contiguous() if isinstance(offset, Tensor) else offset
