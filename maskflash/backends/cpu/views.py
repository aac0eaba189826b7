"""q, k, v, out and others -> views of them for each unit: the heads and batch rows that calls compute at once.

Views are (N, G, tokens, ...), those of K and V's side (N, 1, tokens, ...): N key heads or batch rows, and the G query
heads of each that share the mask. Nothing is copied, whatever the strides.

    the mask's own       q's heads = k's heads       more query heads than key heads
    batch rows, heads
    1, 1                 one unit, N = B, G = Hq     a unit for each batch row, N = Hkv, G = Hq // Hkv
    B, 1                 a unit for each batch row
    1, Hq or B, Hq       a unit for each head: G = 1, with the key head that it reads
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Views = list[Tensor]


def units(plane: tuple[int, int], own: tuple[int, int], tensors: Sequence[Tensor]) -> list[Views]:
    """The units that one batch row and head of the mask computes.

    Args:
        plane: (b, h) of the mask.
        own: batch rows and heads that the mask has, 1 or those of q.
        tensors: q, k and others, each (B, Hq or Hkv, tokens, ...); its heads say on which side it is.

    Returns:
        For each unit a view of each tensor.
    """
    (b, h), (batch, map_heads) = plane, own
    heads, kv_heads = tensors[0].shape[1], tensors[1].shape[1]
    views = [x[b : b + 1] for x in tensors] if batch > 1 else list(tensors)
    if map_heads > 1:
        head = {heads: h, kv_heads: h // (heads // kv_heads)}
        return [[x[:, head[x.shape[1]] : head[x.shape[1]] + 1] for x in views]]
    if heads == kv_heads:
        return [views]
    return [[x[row].unflatten(0, (kv_heads, -1)) for x in views] for row in range(views[0].shape[0])]


def batch_rows(views: Views) -> list[Views]:
    """The same views for each of the N alone."""
    return [[x[n : n + 1] for x in views] for n in range(views[0].shape[0])]


def shared(x: Tensor, q: Tensor) -> Tensor:
    """K or V seen by all the heads of its group, without a copy."""
    return x if x.shape[:2] == q.shape[:2] else x.expand(*q.shape[:2], -1, -1)


def prepared(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Brings x to the compute dtype, `width` wide, with rows that are dense and don't overlap.

    The kernel reads garbage from rows that are not dense, and is 15x slower on rows closer than their width, such as
    those of an expanded tensor; all other strides it takes as they are.
    """
    x = x if x.dtype == dtype else x.to(dtype)
    if x.shape[3] < width:
        x = pad(x, (0, width - x.shape[3]))
    stride = x.stride()
    return x if stride[3] == 1 and stride[2] >= width else x.clone(memory_format=torch.contiguous_format)
