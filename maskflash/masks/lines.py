"""A row or a column of a mask -> its visible tokens as runs, at the cost of that one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem

_PAIRS_AT_ONCE: Final = 1 << 20

Line = list[tuple[int, int]]


def row(problem: Problem, b: int, h: int, q: int) -> Line:
    """The columns that a row sees, as (start, stop), half open and ascending."""
    batch_row, head, query = (torch.tensor([n], device=problem.device) for n in (b, h, q))
    return _runs(problem, problem.kv_len, lambda keys: problem.visible(batch_row, head, query, keys))


def column(problem: Problem, b: int, h: int, kv: int) -> Line:
    """The rows that see a column, as (start, stop), half open and ascending."""
    batch_row, head, key = (torch.tensor([n], device=problem.device) for n in (b, h, kv))
    return _runs(problem, problem.q_len, lambda queries: problem.visible(batch_row, head, queries, key))


def _runs(problem: Problem, length: int, visible: Callable[[Tensor], Tensor]) -> Line:
    """Where a line turns visible and hidden, by turns, looked at in parts of bounded size."""
    turns: list[int] = []
    before = torch.zeros(1, dtype=torch.bool, device=problem.device)
    for start in range(0, length, _PAIRS_AT_ONCE):
        seen = visible(torch.arange(start, min(start + _PAIRS_AT_ONCE, length), device=problem.device))
        turned = torch.cat((before, seen[:-1])) != seen
        turns += (turned.nonzero()[:, 0] + start).tolist()
        before = seen[-1:]
    if len(turns) % 2:
        turns.append(length)
    return list(zip(turns[::2], turns[1::2], strict=True))
