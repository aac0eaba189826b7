"""A problem -> what the rows of each of its sequences see, for forms that have no heads and one entry a sequence."""

from __future__ import annotations

import torch

from maskflash.analysis.problem import Problem
from maskflash.errors import UnsupportedMask
from maskflash.forms.row_intervals import RowIntervals, find_row_intervals


def sequence_intervals(operation: str, problem: Problem) -> RowIntervals:
    """What the rows of all heads alike see: of shape (batch of the call, 1).

    Raises:
        UnsupportedMask: heads differ; the first row in which one does.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    found = find_row_intervals(problem)
    found = _of_first_head(operation, found) if found.shape[1] > 1 else found
    times = problem.batch if found.shape[0] == 1 else 1
    count = found.count.repeat(times)
    offsets = torch.cat((found.offsets[:1], count.cumsum(0)))
    shape = (found.shape[0] * times, 1)
    return RowIntervals(
        found.q_len, found.kv_len, shape, offsets, start=found.start.repeat(times), stop=found.stop.repeat(times)
    )


def _of_first_head(operation: str, found: RowIntervals) -> RowIntervals:
    """The intervals of head 0, which must be those of every head."""
    (batch, heads), q_len = found.shape, found.q_len
    rows = torch.arange(batch * heads * q_len)
    first = rows // (heads * q_len) * (heads * q_len) + rows % q_len  # the same row of head 0
    count = found.count
    differs = count != count[first]
    row = found.rows
    twin = found.offsets[first[row]] + torch.arange(len(row)) - found.offsets[row]
    twin = twin.where(~differs[row], torch.arange(len(row)))
    apart = (found.start != found.start[twin]) | (found.stop != found.stop[twin])
    differs[row[apart]] = True
    if bool(differs.any()):
        unit, q = divmod(int(differs.nonzero()[0]), q_len)
        b, h = divmod(unit, heads)
        raise UnsupportedMask(
            f"{operation}: row {q} of batch row {b} sees other keys in head {h} than in head 0, and the form has no "
            "heads; export the heads one by one"
        )
    kept = (row // q_len) % heads == 0
    count = count.view(batch, heads, q_len)[:, 0].flatten()
    offsets = torch.cat((found.offsets[:1], count.cumsum(0)))
    return RowIntervals(q_len, found.kv_len, (batch, 1), offsets, found.start[kept], found.stop[kept])
