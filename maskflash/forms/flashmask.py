"""Any mask -> FlashMask's column vectors, where each column hides few enough runs of rows."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.changes import find_changes
from maskflash.analysis.problem import Problem
from maskflash.errors import UnsupportedMask
from maskflash.masks.columns import ColumnIntervals

_RUNS: Final = 4  # kept of each column: one more than any form holds


def to_columns(problem: Problem, causal: bool | None) -> ColumnIntervals:
    """The vectors of a problem's mask.

    Args:
        problem: the mask at its lengths.
        causal: whether the vectors come with causal=True; None where that says all that they don't.

    Returns:
        Vectors (B, H, kv_len) with the problem's own B and H.

    Raises:
        UnsupportedMask: a column with too many hidden runs, the first of them.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    device, problem = problem.device, problem.on_host()
    start, stop, more = _hidden(problem)
    future = _future(problem)
    early = stop[0] < future
    if causal is None:
        causal = not bool(early.any())
    if causal and bool(early.any()):
        column = int(early.nonzero()[0])
        raise UnsupportedMask(
            f"to_flashmask: {_place(problem, column)} is visible at row {int(stop[0][column])}, which causal=True "
            "hides; pass causal=False, or leave it out"
        )
    if causal:
        start = torch.cat((torch.minimum(future, stop[0])[None], start[1:]))
    wrong = ((start < stop).sum(0) > 2) | more
    if bool(wrong.any()):
        raise UnsupportedMask(_too_many(problem, int(wrong.nonzero()[0]), causal))
    return ColumnIntervals(**_vectors(problem, start, stop, causal), causal=causal).to(device)


def _future(problem: Problem) -> Tensor:
    """For each column, how many rows causal hides anyway: its first ones."""
    batch, heads = problem.shape[:2]
    first = (torch.arange(problem.kv_len) - (problem.kv_len - problem.q_len)).clamp(0, max(problem.q_len, 0))
    return first.expand(batch * heads, problem.kv_len).reshape(-1)


def _vectors(problem: Problem, start: Tensor, stop: Tensor, causal: bool) -> dict[str, Tensor]:
    """The vectors of columns that hide at most two runs of rows (beside causal's), as few of them as say it.

    no run       lower and upper are empty
    one run      it is the lower; without causal the upper, if it ends before the last row and starts at the first
    two runs     the first is the upper, the last the lower
    """
    q_len, held = problem.q_len, start < stop
    count = held.sum(0)
    first, last = held.long().argmax(0)[None], held.long().cumsum(0).argmax(0)[None]
    lower, upper = ([x.gather(0, place)[0] for x in (start, stop)] for place in (last, first))
    alone = torch.zeros_like(held[0]) if causal else (count == 1) & (lower[0] == 0) & (lower[1] < q_len)
    has_lower, has_upper = (count > 0) & ~alone, (count == 2) | alone
    lts, lte = (torch.where(has_lower, x, q_len) for x in lower)
    uts, ute = (torch.where(has_upper, x, 0) for x in upper)
    vectors = {"lts": lts, "lte": lte, "uts": uts, "ute": ute}
    if not bool((uts > 0).any()):
        del vectors["uts"]
    if causal and not bool(has_upper.any()):
        del vectors["ute"]
    if bool((lte == q_len).all()) and "uts" not in vectors and not (causal and "ute" in vectors):
        del vectors["lte"]
    return {name: x.int().view(*problem.shape[:2], problem.kv_len) for name, x in vectors.items()}


def _hidden(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The first _RUNS hidden runs of each column: starts and stops (_RUNS, columns), and where there may be more.

    The first run begins at row 0 and may be empty; after the last, start and stop are q_len.
    """
    changes = find_changes(problem)
    columns = changes.shape[0] * changes.shape[1] * problem.kv_len
    count = torch.bincount(changes.column, minlength=columns)
    rank = torch.arange(len(changes.column)) - (count.cumsum(0) - count)[changes.column]
    rows = torch.full((2 * _RUNS, columns), problem.q_len)
    rows[0] = 0
    kept = rank < 2 * _RUNS - 1
    rows[1 + rank[kept], changes.column[kept]] = changes.row[kept]
    return rows[::2], rows[1::2], count > 2 * _RUNS - 1


def _place(problem: Problem, column: int) -> str:
    """A column by name; batch row and head only where there are several."""
    unit, kv = divmod(column, problem.kv_len)
    b, h = divmod(unit, problem.shape[1])
    of = [f"batch row {b}"] * (problem.shape[0] > 1) + [f"head {h}"] * (problem.shape[1] > 1)
    return f"column {kv}" + (f" of {', '.join(of)}" if of else "")


def _too_many(problem: Problem, column: int, causal: bool) -> str:
    start, stop, more = (x[..., column].tolist() for x in _hidden(problem))
    runs = [f"{a} to {z - 1}" if z - a > 1 else f"{a}" for a, z in zip(start, stop, strict=True) if a < z]
    limit = "two runs besides what causal hides" if causal else "two runs"
    return (
        f"to_flashmask: {_place(problem, column)} hides the rows {', '.join(runs)}{', ...' if more else ''}; column "
        f"intervals hold {limit}. Use the mask itself: compile(mask) needs no vectors"
    )
