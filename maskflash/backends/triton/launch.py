"""One call's shape and mask -> launches of its passes: the kernel, the tile that fits or is fastest, the arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import modules, tiles_measured
from maskflash.backends.triton.layout import UNIT, mask_arguments, padded
from maskflash.backends.triton.plan import Plan
from maskflash.backends.triton.render import PassName, Specialisation, render, table_kind
from maskflash.backends.triton.tiles import Tile, choose, shrunk
from maskflash.errors import BackendError
from maskflash.expr.nodes import parse

NO_MASK: Final = Specialisation(parse("const=True:bool~()"))  # of delta, which looks at no pair


def specialisation(problem: Problem, narrow: bool, dim: int, v_dim: int) -> Specialisation:
    """What the text of a call's kernels depends on, given head dims that are whole vectors."""
    per_row = isinstance(problem.q_offset, Tensor)
    return Specialisation(
        problem.expr,
        tuple(table_kind(table) for table in problem.inputs.tables),
        narrow,
        map_batch=per_row or "b" in problem.expr.reads,
        map_heads="h" in problem.expr.reads,
        per_row_offset=per_row,
        padded_d=dim != padded(dim),
        padded_dv=v_dim != padded(v_dim),
    )


@lru_cache(maxsize=1024)
def kernel(special: Specialisation, pass_name: PassName) -> Any:
    """The compiled-when-launched function of one pass."""
    return getattr(modules.load(render(special, pass_name)), pass_name)


@dataclass(slots=True, eq=False)
class Call:
    """What the launches of one call share.

    Attributes:
        plan: of the mask.
        problem: the mask.
        q: (B, Hq, Sq, D) as laid out, for its dtype, head dim and device.
        v_dim: head dim of v as laid out.
    """

    plan: Plan
    problem: Problem
    q: Tensor
    v_dim: int

    def fitted(self, pass_name: PassName, launch: Callable[[Tile], None]) -> None:
        """Launch with the tile measured or listed for this device, or the next smaller one that fits it."""
        tile = self.plan.tiles.get(self._place(pass_name))
        if tile is None:
            tile = tiles_measured.find(self.key(pass_name)) or self._listed(pass_name)
        while True:
            try:
                launch(tile)
            except gpu.library().runtime.errors.OutOfResources as error:
                smaller = shrunk(tile)
                if smaller is None:
                    raise BackendError(
                        f"the triton backend: no tile of {pass_name} fits this device: {error}"
                    ) from error
                tile = smaller
            else:
                self.plan.tiles[self._place(pass_name)] = tile
                return

    def tune(self, pass_name: PassName, launch: Callable[[Tile], None]) -> None:
        """Time the listed tile and its neighbours on this call, and keep the fastest for this device."""
        errors = gpu.library().runtime.errors
        rows, columns = self.problem.block_size
        seconds: dict[Tile, float] = {}
        for tile in tiles_measured.candidates(self._listed(pass_name)):
            if rows % tile.block_m == 0 and columns % tile.block_n == 0:
                with contextlib.suppress(errors.OutOfResources, errors.PTXASError):
                    seconds[tile] = gpu.seconds(partial(launch, tile), self.q.device)
        if seconds:
            best = min(seconds, key=lambda tile: seconds[tile])
            tiles_measured.keep(self.key(pass_name), best)
            self.plan.tiles[self._place(pass_name)] = best

    def key(self, pass_name: PassName) -> tuple[str, ...]:
        """What a measured tile holds for: see `tuned`."""
        return (
            gpu.name(self.q.device),
            gpu.library().__version__,
            pass_name,
            str(self.q.dtype),
            str((self.q.shape[3], self.v_dim)),
            str(self.problem.block_size),
            self.problem.expr.text,
        )

    def walks(self, pass_name: PassName, tile: Tile, tiles: int) -> list[Tensor]:
        """The order of the kernel's tiles, then the full and the partial walk."""
        transposed = pass_name == "dkdv"
        own, size = (
            (tile.block_n, self.problem.block_size[1]) if transposed else (tile.block_m, self.problem.block_size[0])
        )
        return self.plan.walks(transposed, tiles, size // own)

    def launch(self, pass_name: PassName, tile: Tile, programs: int, tensors: list[Any], rest: list[Any]) -> None:
        """Run one pass: its own tensors and strides, what follows them in its signature, then the mask's."""
        problem, dim = self.problem, self.q.shape[3]
        function = kernel(specialisation(problem, self.plan.narrow, dim, self.v_dim), pass_name)
        offset = problem.q_offset.contiguous() if isinstance(problem.q_offset, Tensor) else problem.q_offset
        own, step = (tile.block_n, tile.block_m) if pass_name == "dkdv" else (tile.block_m, tile.block_n)
        own_size, step_size = problem.block_size[::-1] if pass_name == "dkdv" else problem.block_size
        with gpu.current(self.q.device):
            function[(programs,)](
                *tensors,
                *rest,
                offset,
                *mask_arguments(problem),
                UNIT=UNIT,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                ROWS=own_size // own,
                SUB=step_size // step,
                D=dim,
                DV=self.v_dim,
                BLOCK_D=padded(dim),
                BLOCK_DV=padded(self.v_dim),
                PRECISION=gpu.precision(self.q.dtype),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

    def _listed(self, pass_name: PassName) -> Tile:
        device, sizes = self.q.device, self.problem.block_size
        return choose(gpu.arch(device), pass_name, self.q.dtype, self._dims(), sizes, gpu.shared_limit(device))

    def _dims(self) -> int:
        return max(self.q.shape[3], self.v_dim)

    def _place(self, pass_name: PassName) -> tuple[PassName, torch.dtype, int]:
        return pass_name, self.q.dtype, self._dims()
