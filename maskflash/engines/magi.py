"""The magi engine -> MagiAttention's flexible flash attention, with the mask's slices.

Batch rows lie one after the other along queries and along keys. Source: flex_flash_attn_func in
magi_attention/functional/flex_flash_attn.py of MagiAttention 1.1, whose backward gives lse no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.engines.engine import Asked, Engine, Formed, Prepared, by_tokens, capability, dotted
from maskflash.forms.slices import find_slices
from maskflash.scores.strength import Strength


class Magi(Engine):
    """See the module."""

    name = "magi"
    package = "magi_attention"
    install = "pip install git+https://github.com/SandAI-org/MagiAttention"
    form = "slices"
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {"cuda": (torch.bfloat16, torch.float16)}
    learns_from_lse = False

    def unfit(self, device: torch.device) -> str | None:
        """Hopper alone."""
        found = capability(device)
        return None if found == (9, 0) else f"it needs compute capability 9.0, got {dotted(found)}"

    def misfit(self, call: Asked) -> str | None:
        """Kernels of two head dims, one for q, k and v."""
        dims = call.head_dim, call.v_head_dim
        if dims in ((64, 64), (128, 128)):
            return None
        return f"takes a head dim of 64 or 128, got {dims[0]} with {dims[1]}"

    def formed(self, block_map: BlockMap, problem: Problem) -> Formed:
        """Ranges and types, on the device."""
        slices = find_slices(problem.on_host())
        tensors = tuple(x.to(problem.device) for x in (slices.q_ranges, slices.k_ranges, slices.types))
        return Formed(tensors, {"slices": len(slices.types)}, sum(x.nbytes for x in tensors))

    def attend(
        self, form: Any, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """What `flex_flash_attn_func` gives, of (tokens, heads, n)."""
        library = import_module("magi_attention.functional.flex_flash_attn")
        batch = q.shape[0]
        q, k, v = (by_tokens(x).flatten(0, 1) for x in (q, k, v))
        q_ranges, k_ranges, types = form
        out, meta = library.flex_flash_attn_func(
            *(q, k, v, q_ranges, k_ranges, types), softmax_scale=strength.scale, deterministic=True
        )
        out, lse = (x.unflatten(0, (batch, -1)) for x in (out, meta.lse))
        return by_tokens(out), lse.transpose(1, 2)
