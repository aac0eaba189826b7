"""The fa4 engine -> FlashAttention 4, with block-sparse tensors and the mask's own expression in CuTe's dialect.

Which blocks it takes depends on the GPU, on the head dims and on the pass: see `blocks`. Source: `flash_attn_func` in
flash_attn/cute/interface.py, and block_sparsity.py, of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.engines.engine import Asked, Engine, Formed, Made, Prepared, by_tokens, capability, dotted
from maskflash.forms.block_sparse import BlockLists, to_block_sparse
from maskflash.forms.cute import aux_tensors, to_cute
from maskflash.scores.strength import Strength

Blocks = tuple[int, int]


class FlashAttention4(Engine):
    """See the module."""

    name = "fa4"
    package = "flash_attn.cute"
    install = "pip install --pre flash-attn-4"
    form = "block-sparse tensors, and CuTe text"
    by_batch = False
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {"cuda": (torch.bfloat16, torch.float16)}
    deterministic = False

    def unfit(self, device: torch.device) -> str | None:
        """Hopper and Blackwell, whose kernels take block-sparse tensors."""
        found = capability(device)
        return None if found[0] in (9, 10, 11) else f"it needs compute capability 9, 10 or 11, got {dotted(found)}"

    def misfit(self, call: Asked) -> str | None:
        """Which head dims it has kernels for, by GPU."""
        dims = call.head_dim, call.v_head_dim
        most = 256 if capability(call.device)[0] == 9 else 128
        if most == 128 and dims == (256, 256) and call.gradients:
            return "has no block-sparse backward for a head dim of 256 on Blackwell"
        if all(8 <= dim <= most and dim % 8 == 0 for dim in dims) or (most == 128 and dims in ((192, 128), (256, 256))):
            return None
        also = "" if most == 256 else ", 192 with 128, or 256 with 256"
        return f"takes multiples of 8 up to {most} as head dims{also}, got {dims[0]} with {dims[1]}"

    def formed(self, block_map: BlockMap, problem: Problem) -> Formed:
        """The function's text; which blocks it needs depends on the head dims of a call."""
        to_cute(problem)
        return Formed(None, dict(block_map.counts), 0)

    def attend(
        self, form: Any, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """What `flash_attn_func` gives, of (B, tokens, heads, n)."""
        library = import_module("flash_attn.cute")
        mask_mod, scalars = prepared.made("function", lambda: _function(problem))
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        packed = q.shape[2] * q.shape[1] // k.shape[1]
        forward, backward = blocks(capability(q.device)[0], packed, q.shape[3], v.shape[3])
        out, lse = library.flash_attn_func(
            *map(by_tokens, (q, k, v)),
            softmax_scale=strength.scale,
            mask_mod=mask_mod,
            aux_tensors=list(aux_tensors(problem)) or None,
            aux_scalars=scalars,
            block_sparse_tensors=_lists(prepared, problem, forward, "forward"),
            block_sparse_tensors_bwd=_lists(prepared, problem, backward, "backward") if learning else None,
            return_lse=True,
        )
        return by_tokens(out), lse


def blocks(generation: int, packed: int, head_dim: int, v_head_dim: int) -> tuple[Blocks, Blocks]:
    """(q_tokens, kv_tokens) of a block in forward and in backward.

    Args:
        generation: the major compute capability.
        packed: rows in tokens, times the query heads that share a key's head: by their product it chooses its tiles.
        head_dim: of q and k.
        v_head_dim: of v.
    """
    if generation == 9:
        return (128, 128 if head_dim <= 128 else 64), (128, 128 if head_dim <= 128 else 96 if head_dim <= 192 else 64)
    rows = 128 if packed <= 128 or v_head_dim == 256 else 256
    return (rows, 128), (128, 256 if head_dim >= 128 else 128)


def _function(problem: Problem) -> Made:
    """The mask's function, and its numbers: an analysis is of one state of the tables, and of one set of numbers."""
    cute = to_cute(problem)
    return Made((cute.function(), cute.aux_scalars()), 0)


def _lists(prepared: Prepared, problem: Problem, size: Blocks, side: str) -> Any:
    """The blocks of one pass as FlashAttention 4's own tuple, made once for each size."""

    def listed() -> Made:
        library = import_module("flash_attn.cute.block_sparsity")
        form = to_block_sparse(replace(problem, block_size=size))
        chosen: BlockLists = form.forward if side == "forward" else form.backward
        tensors = (x for x in chosen if isinstance(x, Tensor))
        return Made(library.BlockSparseTensorsTorch(**chosen._asdict()), sum(x.nbytes for x in tensors))

    return prepared.made((side, size), listed)
