"""The cudnn engine -> cuDNN's flexible attention, with what each row sees as its `mask_func`.

Its plan is made for a mask, dtype, heads and head dims, and kept. Source: cudnn/flex_attention/api.py and
plan/validation.py of nvidia-cudnn-frontend 1.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.engines.engine import Asked, Engine, Formed, Made, Prepared, by_tokens, capability, dotted
from maskflash.forms.row_intervals import find_row_intervals
from maskflash.scores.strength import Strength

_SERVED: Final = ((9, 0), (10, 0), (10, 3))


class Cudnn(Engine):
    """See the module."""

    name = "cudnn"
    package = "cudnn.flex_attention"
    install = 'pip install "nvidia-cudnn-frontend[cutedsl]"'
    form = "row intervals"
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {"cuda": (torch.bfloat16, torch.float16)}

    def unfit(self, device: torch.device) -> str | None:
        """Hopper and Blackwell."""
        found = capability(device)
        return None if found in _SERVED else f"it needs compute capability 9.0, 10.0 or 10.3, got {dotted(found)}"

    def misfit(self, call: Asked) -> str | None:
        """Which head dims cuDNN has kernels for."""
        dims = call.head_dim, call.v_head_dim
        if dims in ((192, 128), (256, 256)) or all(8 <= dim <= 128 and dim % 8 == 0 for dim in dims):
            return None
        return (
            f"takes multiples of 8 up to 128 as head dims, 192 with 128, or 256 with 256, got {dims[0]} with {dims[1]}"
        )

    def formed(self, block_map: BlockMap, problem: Problem) -> Formed:
        """Endpoints of intervals, on the device."""
        intervals = find_row_intervals(problem.on_host())
        endpoints = intervals.to_cudnn().to(problem.device)
        counts = {"intervals": len(intervals.start), "endpoints a row": endpoints.shape[1]}
        return Formed(endpoints, counts, endpoints.nbytes)

    def attend(
        self, form: Any, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """What `flex_attn_func` gives, of (B, tokens, heads, n)."""
        library = import_module("cudnn.flex_attention")
        q, k, v = map(by_tokens, (q, k, v))
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

        def planned() -> Made:
            return Made(library.create_mask_plan(form, q, k, v, build_backward=learning), 0)

        plan = prepared.made((q.dtype, q.shape, k.shape, v.shape, learning), planned)
        out, lse = library.flex_attn_func(
            *(q, k, v), mask_plan=plan, softmax_scale=strength.scale, deterministic=True, return_lse=True
        )
        return by_tokens(out), lse
