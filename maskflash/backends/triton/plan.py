"""What a mask's rows see -> the Plan that Triton's kernels walk: on the device, for any call, stream and CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.analysis.seen import Seen
from maskflash.backends.triton.render import PassName
from maskflash.backends.triton.tiles import Tile
from maskflash.backends.triton.walks import Walk, Work, seen, work
from maskflash.ground.transfer import Upload, capturing

# What CUDA graphs read: they hold addresses alone, and may run for as long as the process.
_captured: list[tuple[Plan, tuple[Tensor, ...]]] = []


@dataclass(slots=True, eq=False)
class Plan:
    """What the kernels need of a mask at given lengths; reusable across calls, dtypes and head dims.

    Attributes:
        device: where the kernels run.
        narrow: the mask's integers fit 32 bits.
        rows: the map's rows, for forward and dQ.
        columns: the map's columns, for dK and dV.
        tiles: the tile that each pass took for a dtype and head dim, once one has fitted.
    """

    device: torch.device
    narrow: bool
    rows: Work
    columns: Work
    _seen: dict[bool, Tensor | None]
    _made: Upload
    tiles: dict[tuple[PassName, torch.dtype, int], Tile] = field(default_factory=dict)
    _orders: dict[tuple[bool, int, int], Upload] = field(default_factory=dict)

    def walks(self, transposed: bool, tiles: int, per_line: int) -> list[Tensor]:
        """What a pass walks, as its signature has it.

        Args:
            transposed: columns, else rows.
            tiles: how many row tiles (or column tiles) the kernel has.
            per_line: how many of them are in a line of the map.

        Returns:
            The order of the kernel's tiles, those with most work first; the full walk; the partial one.

        Raises:
            BackendError: the order isn't known yet, and a CUDA graph is being captured.
        """
        work, key = self.columns if transposed else self.rows, (transposed, tiles, per_line)
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = Upload([work.order(tiles, per_line)], self.device)
        for upload in (order, self._made):
            upload.lend()
        return [*order.tensors, *work.tensors]

    def seen(self, *, rows: bool) -> Tensor | None:
        """Which rows see something, or which columns are seen; None where all are. See `triton_work.seen`."""
        self._made.lend()
        return self._seen[rows]

    def keep(self, problem: Problem) -> None:
        """Keep the plan and the tables for good where the current stream records a CUDA graph."""
        if capturing(self.device):
            _captured.append((self, problem.inputs.tables))

    @property
    def nbytes(self) -> int:
        """Bytes held, nearly all on the device."""
        counts = self.rows.counts.nbytes + self.columns.counts.nbytes
        return counts + sum(upload.nbytes for upload in (self._made, *self._orders.values()))


def plan(found: Seen, device: torch.device) -> Plan:
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
        work(block_map.rows, n_q, n_kv, kv_len % bkv != 0),
        work(block_map.columns, n_kv, n_q, q_len % bq != 0),
    )
    known = {rows: seen(found, rows=rows) for rows in (True, False)}
    walked = [tensor for one in directions for tensor in one.tensors]
    made = Upload([*walked, *(bits for bits in known.values() if bits is not None)], device)
    arrived = iter(made.tensors)
    rows, columns = (replace(one, full=_walk(arrived), partial=_walk(arrived)) for one in directions)
    known = {side: None if bits is None else next(arrived) for side, bits in known.items()}
    return Plan(device, found.largest < 2**31, rows, columns, known, made)


def _walk(tensors: Iterator[Tensor]) -> Walk:
    return Walk(*islice(tensors, 4))
