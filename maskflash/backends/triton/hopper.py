"""A call -> whether Hopper's own kernels compute it, or why not; tensors as the copy engine there takes them.

The kernels are `templates/hopper*.py.jinja`; docs/kernels.md draws them. They have been compiled and emulated, and not
run on a GPU, so nothing chooses them by itself.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton.tiles import HOPPER_BACKWARD_DIM, HOPPER_DIM


class Served(NamedTuple):
    """What a pass of Hopper's own serves. Masks, scores, sinks and dropout are never against it.

    Attributes:
        block_size: (rows, columns) that a map's tile has a multiple of. A program holds 128 tokens: two warpgroups'
            products.
        dim: the largest head dim.
    """

    block_size: tuple[int, int]
    dim: int


FORWARD: Final = Served((128, 64), HOPPER_DIM)
BACKWARD: Final = Served((128, 128), HOPPER_BACKWARD_DIM)


def why_not(problem: Problem, q: Tensor, v: Tensor, served: Served) -> str | None:
    """What keeps a call from a pass of Hopper's own, in words; None where nothing does.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        q: (B, Hq, Sq, D).
        v: (B, Hkv, Skv, Dv).
        served: what the pass serves.
    """
    return why_not_at(problem, served) or why_not_text(problem, q, v, served)


def why_not_text(problem: Problem, q: Tensor, v: Tensor, served: Served) -> str | None:
    """The same of a kernel's text, which needs no device."""
    if reason := _of_tiles(problem, served):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    dim = max(q.shape[3], v.shape[3])
    return None if dim <= served.dim else f"it serves head dims to {served.dim}, got {dim}"


def why_not_at(problem: Problem, served: Served) -> str | None:
    """The same of all calls with such a mask at these lengths, on its device."""
    arch = gpu.arch(problem.device)
    if arch != 90:
        return f"it is for compute capability 9.0, got {arch / 10 if isinstance(arch, int) else arch}"
    if gpu.interprets():
        return "Triton's interpreter doesn't run it"
    if reason := gpu.without_gluon():
        return reason
    return _of_tiles(problem, served)


def _of_tiles(problem: Problem, served: Served) -> str | None:
    if all(side % unit == 0 for side, unit in zip(problem.block_size, served.block_size, strict=True)):
        return None
    rows, columns = served.block_size
    return f"it needs tiles of multiples of {rows} x {columns} tokens, got block_size={problem.block_size}"


def mapped(**tensors: Tensor) -> dict[str, Tensor]:
    """Tensors as `laid_out` makes them -> arguments of the kernel, before a tile says how they are copied.

    Tensor maps have no steps of 0, and none shorter than a token: what is expanded, or overlaps, is copied.
    """
    return {f"{name}_desc": x.contiguous() if _overlaps(x) else x for name, x in tensors.items()}


def _overlaps(x: Tensor) -> bool:
    return any(n > 1 and step < x.shape[3] for n, step in zip(x.shape[:3], x.stride()[:3], strict=True))
