"""A call -> whether Hopper's own backward computes it, or why not.

The kernels are `templates/hopper_dkdv.py.jinja` and `templates/hopper_dq.py.jinja`; docs/kernels.md draws them. They
have been compiled and emulated, and not run on a GPU, so nothing chooses them by itself.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import hopper
from maskflash.backends.triton.tiles import HOPPER_BACKWARD_DIM

_OWN: Final = 128  # queries that a program of dQ holds, and keys that one of dK and dV holds: two warpgroups' products


def why_not(problem: Problem, q: Tensor, v: Tensor) -> str | None:
    """What keeps a call from Hopper's own backward, in words; None where nothing does.

    Masks, scores, sinks and dropout never do.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        q: (B, Hq, Sq, D).
        v: (B, Hkv, Skv, Dv).
    """
    if reason := why_not_at(problem):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    dim = max(q.shape[3], v.shape[3])
    return None if dim <= HOPPER_BACKWARD_DIM else f"it serves head dims to {HOPPER_BACKWARD_DIM}, got {dim}"


def why_not_at(problem: Problem) -> str | None:
    """The same of all calls with such a mask at these lengths, on its device."""
    if reason := hopper.why_not_at(problem):
        return reason
    if any(side % _OWN for side in problem.block_size):
        return f"it needs tiles of multiples of {_OWN} x {_OWN} tokens, got block_size={problem.block_size}"
    return None
