"""What a mask's rows see -> the walks of Triton's kernels on the device, for any call, stream and CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.analysis.seen import Seen
from maskflash.backends.triton.intervals import intervals
from maskflash.backends.triton.layout import mask_values
from maskflash.backends.triton.walks import Walk, Walks, seen, split_runs
from maskflash.expr.bounds import Reach
from maskflash.ground.transfer import Upload, capturing
from maskflash.scores.strength import Strength

# What CUDA graphs read, by the identity of all parts. A graph holds addresses alone, and nobody tells when the last one
# is gone, so a plan that one has recorded lives as long as the process; it is here once, however often it is recorded.
_captured: dict[tuple[int, ...], tuple[DevicePlan | None, tuple[Tensor, ...]]] = {}


@dataclass(slots=True, eq=False)
class DevicePlan:
    """What the kernels need of a mask at given lengths; reusable across calls, dtypes and head dims.

    Attributes:
        device: where the kernels run.
        narrow: the mask's integers fit 32 bits.
        intervals: what each row sees, see `intervals.py`; None where kernels compute the mask's expression.
        rows: the map's rows, for forward and dQ.
        columns: the map's columns, for dK and dV.
        extents: for `b`, `h`, `q`, `kv` the first and the last index, offsets included.
    """

    device: torch.device
    narrow: bool
    intervals: Tensor | None
    rows: Walks
    columns: Walks
    extents: dict[str, Reach]
    _seen: dict[bool, Tensor | None]
    _made: Upload
    _orders: dict[tuple[bool, int, int], tuple[Upload, dict[str, Tensor]]] = field(default_factory=dict)

    def walked(self, transposed: bool, tiles: int, per_line: int) -> dict[str, Tensor]:
        """What a pass walks, as arguments of its kernel.

        Args:
            transposed: columns, else rows.
            tiles: how many row tiles (or column tiles) the kernel has.
            per_line: how many of them are in a line of the map.

        Returns:
            The order of the kernel's tiles, those with most work first; the full walk; the partial one.

        Raises:
            BackendError: the order isn't known yet, and a CUDA graph is being captured.
        """
        key = transposed, tiles, per_line
        if key not in self._orders:
            walks = self.columns if transposed else self.rows
            order = Upload([walks.order(tiles, per_line)], self.device)
            self._orders[key] = order, {"order": order.tensors[0], **walks.named}
        order, arguments = self._orders[key]
        for upload in (order, self._made):
            upload.lend()
        return arguments

    def mask(self, problem: Problem) -> dict[str, Any]:
        """The mask as arguments of a kernel: its rows' intervals, or what its expression reads."""
        return mask_values(problem) if self.intervals is None else {"intervals": self.intervals}

    def seen(self, *, rows: bool) -> Tensor | None:
        """Which rows see something, or which columns are seen; None where all are. See `walks.seen`."""
        self._made.lend()
        return self._seen[rows]

    def used(self, problem: Problem, *, rows: bool) -> Tensor | None:
        """The same as (B, H, tokens) with the map's own B and H, False also where no visited tile is."""
        seen = self.seen(rows=rows)  # first: it lends the current stream what the walks are part of
        walks, side, tokens = (
            (self.rows, problem.block_size[0], problem.q_len)
            if rows
            else (self.columns, problem.block_size[1], problem.kv_len)
        )
        if bool((walks.counts.sum(0) > 0).all()):
            return seen
        visited = walks.full.tiles + walks.partial.tiles > 0
        found = visited.view(*problem.shape[:2], -1).repeat_interleave(side, 2)[:, :, :tokens]
        return found if seen is None else found & seen

    @property
    def nbytes(self) -> int:
        """Bytes held, nearly all on the device."""
        counts = self.rows.counts.nbytes + self.columns.counts.nbytes
        further = (upload for upload, _ in self._orders.values())
        return counts + sum(upload.nbytes for upload in (self._made, *further))


def keep(plan: DevicePlan | None, problem: Problem, strength: Strength) -> None:
    """Keep a plan, where there is one, and tables for good where the current stream records a CUDA graph."""
    if capturing(problem.device):
        tables = problem.inputs.tables + (() if strength.score is None else strength.score.inputs.tables)
        _captured[id(plan), *map(id, tables)] = plan, tables


def plan(found: Seen, device: torch.device) -> DevicePlan:
    """Prepare a block map for the kernels.

    Args:
        found: what the mask's rows see, and its block map.
        device: where the kernels run.

    Raises:
        BackendError: a CUDA graph is being captured there.
    """
    block_map = found.block_map
    _, _, n_q, n_kv = block_map.shape
    (bq, bkv), (q_len, kv_len) = block_map.block_size, (block_map.q_len, block_map.kv_len)
    directions = (
        split_runs(block_map.rows, n_q, n_kv, kv_len % bkv != 0),
        split_runs(block_map.columns, n_kv, n_q, q_len % bq != 0),
    )
    walked = [tensor for one in directions for tensor in one.tensors]
    further = [seen(found, rows=True), seen(found, rows=False), intervals(found)]
    made = Upload([*walked, *(x for x in further if x is not None)], device)
    arrived = iter(made.tensors)
    rows, columns = (
        replace(one, full=Walk(*islice(arrived, 4)), partial=Walk(*islice(arrived, 4))) for one in directions
    )
    of_rows, of_columns, interval = (None if x is None else next(arrived) for x in further)
    known = {True: of_rows, False: of_columns}
    extents = found.problem.extents
    return DevicePlan(device, found.largest < 2**31, interval, rows, columns, extents, known, made)
