"""Sizes of an attention call -> random q, k and v for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one attention call: q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv).

    Attributes:
        batch: B, at least 0.
        heads: Hq, query heads.
        kv_heads: Hkv, heads of k and v; it divides `heads`.
        q_len: Sq, rows in tokens.
        kv_len: Skv, columns in tokens.
        head_dim: D, of q and k.
        v_head_dim: Dv, of v.
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 64
    kv_len: int = 64
    head_dim: int = 16
    v_head_dim: int = 16

    def __post_init__(self) -> None:
        for name in ("batch", "q_len", "kv_len"):
            arguments.integer("Shape", name, getattr(self, name))
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
            arguments.integer("Shape", name, getattr(self, name), low=1)
        if self.heads % self.kv_heads:
            raise ArgumentError(f"Shape: heads is {self.heads}, expected a multiple of kv_heads, {self.kv_heads}")

    def tensors(self, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Normally distributed q, k and v that require gradients."""
        dtype, on = arguments.dtype("Shape.tensors", dtype), arguments.device("Shape.tensors", device)
        draw = torch.Generator().manual_seed(torch_seed("Shape.tensors", seed))
        sizes = (
            (self.batch, self.heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.v_head_dim),
        )
        q, k, v = (torch.randn(size, generator=draw).to(on, dtype).requires_grad_() for size in sizes)
        return q, k, v


def torch_seed(operation: str, value: Any) -> int:
    """A seed of torch's generators, checked."""
    seed = arguments.integer(operation, "seed", value, low=None)
    if not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"{operation}: seed is {seed:.3g}, expected a number of 64 bits")
    return seed
