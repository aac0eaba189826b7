"""A call -> whether Hopper's own forward computes it, or why not; tensors as the copy engine there takes them.

The kernel is `templates/hopper.py.jinja`; docs/kernels.md draws it. It has been compiled and emulated, and not run on a
GPU, so nothing chooses it by itself.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton.tiles import HOPPER_DIM

_ROWS: Final = 128  # of a program: two warpgroups' products
_COLUMNS: Final = 64  # that a map's tile has a multiple of


def why_not(problem: Problem, q: Tensor, v: Tensor) -> str | None:
    """What keeps a call from Hopper's own forward, in words; None where nothing does.

    Masks, scores, sinks and dropout never do.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        q: (B, Hq, Sq, D).
        v: (B, Hkv, Skv, Dv).
    """
    return why_not_at(problem) or why_not_text(problem, q, v)


def why_not_text(problem: Problem, q: Tensor, v: Tensor) -> str | None:
    """The same of a kernel's text, which needs no device."""
    if reason := _of_tiles(problem):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    dim = max(q.shape[3], v.shape[3])
    return None if dim <= HOPPER_DIM else f"it serves head dims to {HOPPER_DIM}, got {dim}"


def why_not_at(problem: Problem) -> str | None:
    """The same of all calls with such a mask at these lengths, on its device."""
    arch = gpu.arch(problem.device)
    if arch != 90:
        return f"it is for compute capability 9.0, got {arch / 10 if isinstance(arch, int) else arch}"
    if gpu.interprets():
        return "Triton's interpreter doesn't run it"
    if reason := gpu.without_gluon():
        return reason
    return _of_tiles(problem)


def _of_tiles(problem: Problem) -> str | None:
    rows, columns = problem.block_size
    if rows % _ROWS or columns % _COLUMNS:
        return f"it needs tiles of multiples of {_ROWS} x {_COLUMNS} tokens, got block_size=({rows}, {columns})"
    return None


def mapped(**tensors: Tensor) -> dict[str, Tensor]:
    """Tensors as `laid_out` makes them -> arguments of the kernel, before a tile says how they are copied.

    Tensor maps have no steps of 0, and none shorter than a token: what is expanded, or overlaps, is copied.
    """
    return {f"{name}_desc": x.contiguous() if _overlaps(x) else x for name, x in tensors.items()}


def _overlaps(x: Tensor) -> bool:
    return any(n > 1 and step < x.shape[3] for n, step in zip(x.shape[:3], x.stride()[:3], strict=True))
