"""A seed and sizes -> which pairs dropout keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from maskflash.ground import arguments
from maskflash.scores import seeds
from maskflash.scores.dropout import keep
from maskflash.scores.strength import Dropout


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
