"""A problem with few rows -> what they see and their map, from all pairs at once: a step of decoding.

row 0    # # . .   # # . .   . . . .        its tiles   ▒ ▒ ·
row 1    # # # #   . . . .   . . . .
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows, intervals_of
from maskflash.analysis.problem import Problem

_MOST_ROWS: Final = 8
_MOST_PAIRS: Final = 1 << 18


class Evaluated(NamedTuple):
    """What all pairs of a problem say."""

    rows: Rows
    block_map: BlockMap


def evaluate_all(problem: Problem) -> Evaluated | None:
    """Evaluate all pairs of a problem; None where they are many."""
    (batch, heads, lines, across), (rows, width) = problem.shape, problem.block_size
    q_len, kv_len = problem.q_len, problem.kv_len
    if q_len > _MOST_ROWS or batch * heads * q_len * kv_len > _MOST_PAIRS or 0 in problem.shape:
        return None
    b, h, q, kv = (torch.arange(n) for n in (batch, heads, q_len, kv_len))
    visible = problem.visible(b[:, None, None, None], h[:, None, None], q[:, None], kv)
    bits = visible.expand(batch, heads, q_len, kv_len).numpy()
    rows = min(rows, q_len)  # a tile may be far higher
    some, every = np.zeros((2, batch, heads, lines * rows, across * width), dtype=np.bool_)
    every[:] = True
    some[..., :q_len, :kv_len] = every[..., :q_len, :kv_len] = bits
    tiles = batch, heads, lines, rows, across, width
    kinds = np.any(some.reshape(tiles), axis=(3, 5)).astype(np.int8) + np.all(every.reshape(tiles), axis=(3, 5))
    block_map = BlockMap.from_kinds(torch.from_numpy(kinds), q_len, kv_len, problem.block_size)
    count = np.count_nonzero(bits, axis=-1)
    hulls = bits.argmax(-1), np.where(count > 0, kv_len - bits[..., ::-1].argmax(-1), 0)
    start, stop = intervals_of(bits.reshape(-1, kv_len)) or hulls
    first, last = (torch.from_numpy(x).view(-1, *count.shape) for x in (start, stop))
    return Evaluated(Rows(first, last, torch.from_numpy(count)), block_map)
