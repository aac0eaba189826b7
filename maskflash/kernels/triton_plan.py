"""A classified mask -> the Plan that Triton's kernels walk: on the device, for any call, stream and CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.classify import Classified
from maskflash.blocks.problem import Problem
from maskflash.codegen.render import PassName
from maskflash.codegen.tuning import Tile
from maskflash.errors import BackendError
from maskflash.kernels import triton_device
from maskflash.kernels.triton_work import Work, seen, work

# What CUDA graphs read: they hold addresses alone, and may run for as long as the process.
_captured: list[tuple[Plan, tuple[Tensor, ...]]] = []


@dataclass(slots=True, eq=False)
class Plan:
    """What the kernels need of a mask at given lengths; reusable across calls, dtypes and head dims.

    Attributes:
        block_map: the tiles.
        narrow: the mask's integers fit 32 bits.
        rows: the map's rows, for forward and dQ.
        columns: the map's columns, for dK and dV.
        tiles: the tile that each pass took for a dtype and head dim, once one has fitted.
    """

    block_map: BlockMap
    narrow: bool
    rows: Work
    columns: Work
    tiles: dict[tuple[PassName, torch.dtype, int], Tile] = field(default_factory=dict)
    _orders: dict[tuple[bool, int, int], Tensor] = field(default_factory=dict)
    _seen: dict[bool, Tensor | None] = field(default_factory=dict)
    _readers: set[torch.Stream] = field(default_factory=set)

    def order(self, transposed: bool, tiles: int, per_line: int) -> Tensor:
        """The kernel's row tiles (or column tiles), those with most work first."""
        key = transposed, tiles, per_line
        if key not in self._orders:
            self._refuse_capture()
            self._orders[key] = (self.columns if transposed else self.rows).order(tiles, per_line)
            self._finish()
        return self._orders[key]

    def seen(self, problem: Problem, *, rows: bool) -> Tensor | None:
        """Which rows see something, or which columns are seen; None where all are. See `triton_work.seen`."""
        if rows not in self._seen:
            self._refuse_capture()
            self._seen[rows] = seen(problem, self.block_map, rows=rows)
            self._finish()
        return self._seen[rows]

    def lend(self, problem: Problem) -> None:
        """Let the current stream read the plan's tensors, now and, where it records a CUDA graph, for good."""
        device = self.block_map.device
        if triton_device.capturing(device):
            _captured.append((self, problem.inputs.tables))
        reader = triton_device.stream(device)
        if reader is not None and reader not in self._readers:
            for tensor in self._tensors():
                tensor.record_stream(reader)  # its memory is not given away before the reader is done
            self._readers.add(reader)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        known = (tensor for tensor in self._seen.values() if tensor is not None)
        return [*self.rows.tensors, *self.columns.tensors, *self._orders.values(), *known]

    def _finish(self) -> None:
        """Wait for what was just computed: later calls read it on other streams without waiting for this one."""
        made = triton_device.stream(self.block_map.device)
        if made is not None:
            made.synchronize()
        self._readers.clear()  # they have not been lent the new tensor

    def _refuse_capture(self) -> None:
        if triton_device.capturing(self.block_map.device):
            raise BackendError(
                "attention: a CUDA graph is being captured, and this mask has not yet run at these lengths; run the "
                "same call once before the capture, with backward if the graph has it"
            )


def plan(classified: Classified) -> Plan:
    """Prepare a block map for the kernels."""
    block_map = classified.block_map
    _, _, n_q, n_kv = block_map.shape
    (bq, bkv), (q_len, kv_len) = block_map.block_size, (block_map.q_len, block_map.kv_len)
    made = Plan(
        block_map,
        classified.largest < 2**31,
        work(block_map.rows, n_q, n_kv, kv_len % bkv != 0),
        work(block_map.columns, n_kv, n_q, q_len % bq != 0),
    )
    made._finish()
    return made
