"""The flashinfer engine -> FlashInfer's block-sparse attention, with rows of blocks and bits of the partial ones.

Batch rows lie one after the other, each on whole blocks. Forward alone; lse comes in base 2. Source:
BlockSparseAttentionWrapper in flashinfer/sparse.py of flashinfer 0.7.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.engines.engine import Asked, Engine, Formed, Made, Prepared, by_tokens, capability, dotted
from maskflash.forms.block_rows import BlockRows, find_block_rows
from maskflash.scores.strength import Strength

_WORKSPACE: Final = 128 << 20  # bytes, as FlashInfer recommends


class FlashInfer(Engine):
    """See the module."""

    name = "flashinfer"
    package = "flashinfer"
    install = "pip install flashinfer-python"
    form = "block rows with bits"
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {"cuda": (torch.bfloat16, torch.float16)}
    with_gradients: ClassVar[tuple[str, ...]] = ()

    def unfit(self, device: torch.device) -> str | None:
        """Turing or later."""
        found = capability(device)
        return None if found >= (7, 5) else f"it needs compute capability 7.5 or later, got {dotted(found)}"

    def misfit(self, call: Asked) -> str | None:
        """Kernels of three head dims, one for q, k and v."""
        dims = call.head_dim, call.v_head_dim
        if dims[0] == dims[1] and dims[0] in (64, 128, 256):
            return None
        return f"takes a head dim of 64, 128 or 256, got {dims[0]} with {dims[1]}"

    def formed(self, block_map: BlockMap, problem: Problem) -> Formed:
        """Blocks, which are the tiles of the problem, on the device."""
        rows = find_block_rows(problem)
        tensors = rows.indptr, rows.indices, rows.packed_mask, rows.mask_indptr
        return Formed(rows, {"blocks": len(rows.indices)}, sum(x.nbytes for x in tensors if x is not None))

    def attend(
        self, form: Any, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """What its wrapper's `run` gives, of (tokens, heads, n)."""
        batch, heads, q_len, dim = q.shape
        wrapper = prepared.made(
            (batch, q.dtype, heads, k.shape[1], dim, strength.scale), lambda: _planned(form, q, k, strength.scale)
        )
        rows, keys, values = (_on_blocks(x, n)[:most] for x, n, most in _sizes(form, q, k, v))
        out, lse = wrapper.run(rows, keys, values, return_lse=True)
        each = -(-q_len // form.R) * form.R
        out = pad(out, (0, 0, 0, 0, 0, batch * each - form.M)).unflatten(0, (batch, each))[:, :q_len]
        lse = pad(lse, (0, 0, 0, batch * each - form.M)).unflatten(0, (batch, each))[:, :q_len]
        return by_tokens(out), lse.transpose(1, 2) * math.log(2)


def _planned(form: BlockRows, q: Tensor, k: Tensor, scale: float) -> Made:
    """A wrapper that has its plan, and the bytes of its workspace."""
    wrapper = import_module("flashinfer").BlockSparseAttentionWrapper(
        torch.empty(_WORKSPACE, dtype=torch.uint8, device=q.device), backend="fa2"
    )
    wrapper.plan(
        *(form.indptr, form.indices, form.M, form.N, form.R, form.C, q.shape[1], k.shape[1], q.shape[3]),
        mask=form.unpacked(),
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        o_data_type=q.dtype,
    )
    return Made(wrapper, _WORKSPACE)


def _sizes(form: BlockRows, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, int, int]]:
    """Each tensor, how many tokens its blocks have, and how many tokens the form has of it."""
    return [(q, form.R, form.M), (k, form.C, form.N), (v, form.C, form.N)]


def _on_blocks(x: Tensor, block: int) -> Tensor:
    """(B, heads, tokens, n) as (tokens of all batch rows, heads, n), each batch row padded to whole blocks."""
    return pad(by_tokens(x), (0, 0, 0, 0, 0, -x.shape[2] % block)).flatten(0, 1)
