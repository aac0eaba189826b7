"""A problem -> the first and the last column that each row sees, and how many, without a look at pairs.

Where they are as many as lie between, they are all: most rows of most masks see one interval. Formulas tell, or the
columns' pieces of the problem turned over, if its mask comes apart that way too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.blocks.formula import find_formula
from maskflash.blocks.pieces import find_pieces
from maskflash.blocks.problem import Problem

_PIECES_AT_ONCE: Final = 1 << 18  # starts held together


@dataclass(frozen=True, slots=True, eq=False)
class Hulls:
    """What rows see, for each batch row and head of the problem's shape; all (B, H, q_len) int64.

    Attributes:
        start: the first column.
        stop: one past the last; not after start where the row sees nothing.
        count: how many columns.
    """

    start: Tensor
    stop: Tensor
    count: Tensor


def find_hulls(problem: Problem) -> Hulls | None:
    """The hulls of all rows; None where only the pairs tell."""
    formula = find_formula(problem)
    if formula is not None:
        parts = [_hull(start, stop) for start, stop in formula.intervals()]
        return Hulls(*(torch.cat(x).view(1, 1, -1) for x in zip(*parts, strict=True)))
    turned = problem.turned()
    pieces = None if turned is None else find_pieces(turned)
    if pieces is None:
        return None
    batch, heads = problem.shape[:2]
    found = torch.empty(3, batch, heads, problem.q_len, dtype=torch.int64, device=problem.device)
    for b, h, rows in _parts(batch, heads, problem.q_len, pieces.most):
        start, visible = pieces.cut(b, h, rows)
        stop = torch.cat((start[1:], torch.full_like(start[:1], problem.kv_len)))
        found[:, b, h, rows] = torch.stack(_hull(start, torch.where(visible, stop, start)))
    return Hulls(*found)


def _hull(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First column, one past the last, and how many, of disjoint intervals (n, ...), some of them empty."""
    # Interval by interval: reductions over a short first dimension are ten times slower.
    first, last, count = torch.full_like(start[0], torch.iinfo(torch.int64).max), torch.zeros_like(stop[0]), 0
    for a, z in zip(start, stop, strict=True):
        some = a < z
        first = torch.minimum(first, a.masked_fill(~some, torch.iinfo(torch.int64).max))
        last = torch.maximum(last, z * some)
        count = count + (z - a) * some
    return first, last, torch.as_tensor(count)


def _parts(batch: int, heads: int, rows: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Batch rows, heads and rows of at most about _PIECES_AT_ONCE pieces."""
    step = max(1, _PIECES_AT_ONCE // most)
    head_step = max(1, step // rows)
    for b in range(batch):
        for h in range(0, heads, head_step):
            for row in range(0, rows, step):
                yield slice(b, b + 1), slice(h, min(h + head_step, heads)), slice(row, min(row + step, rows))
