"""A length and a seed -> the masks and tensors that the scripts measure: B1 H8 D64, documents of 100-2,000 tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import maskflash as mf

HEADS: Final = 8
HEAD_DIM: Final = 64
SHORTEST: Final = 100  # tokens of a document
LONGEST: Final = 2000
SHORT: Final = (20, 200)  # tokens of a short one
TILE: Final = 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one training step of attention is given: all (1, 8, S, 64); q, k and v require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def inputs(tokens: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Normally distributed tensors."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v, dout = torch.randn(4, 1, HEADS, tokens, HEAD_DIM, generator=draw).to(dtype).unbind()
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def document_lengths(tokens: int, seed: int, longest: int = LONGEST, shortest: int = SHORTEST) -> list[int]:
    """Lengths drawn evenly from `shortest` to `longest`; the last document is cut to fit."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(draw.randint(shortest, longest), tokens - sum(lengths)))
    return lengths


def document_ids(tokens: int, seed: int) -> Tensor:
    """The document of each token: (S,) int32."""
    lengths = torch.tensor(document_lengths(tokens, seed))
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)


def document_predicate(ids: Tensor) -> Callable[..., Any]:
    """Causal documents as one writes them for FlexAttention: the same function serves both."""

    def causal_document(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (ids[q] == ids[kv])

    return causal_document


def masks(tokens: int, seed: int) -> dict[str, mf.Mask]:
    """The masks that efficiency is measured on."""
    return {
        "causal": mf.causal(),
        "causal documents": mf.causal() & mf.document(document_lengths(tokens, seed)),
        "causal window S/16": mf.sliding_window(tokens // 16),
    }


def short_documents(tokens: int, seed: int) -> mf.Mask:
    """Causal documents of 20 to 200 tokens, as conversations are packed."""
    shortest, longest = SHORT
    return mf.causal() & mf.document(document_lengths(tokens, seed, longest, shortest))


def visited(mask: mf.Mask, tokens: int) -> float:
    """Fraction of 128 x 128 tiles that are full or partial."""
    return 1 - mask.block_map(tokens, tokens, block_size=TILE).sparsity


CELLS: Final = 3072  # of a mesh; each sees 20, wherever they are
KINDS: Final = 7


def table_predicate(case: str, tokens: int, seed: int) -> Callable[..., Any]:
    """Masks of tables: of kinds or cells of tokens, of places in a plane, of flags."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, KINDS, (tokens,), generator=draw)
    kind = kind.sort().values if case == "kinds, in order" else kind
    sees = torch.rand(KINDS, KINDS, generator=draw) < 0.5
    cells = min(CELLS, tokens // 8)
    cell = torch.arange(tokens) * cells // tokens
    near = torch.rand(cells, cells, generator=draw) < 20 / cells
    x, y = torch.arange(tokens) % 128, torch.arange(tokens) // 128
    flag = torch.rand(tokens, generator=draw) < 0.9
    kinds = lambda b, h, q, kv: sees[kind[q], kind[kv]]  # noqa: E731
    return {
        "kinds, in order": kinds,
        "kinds, mixed": kinds,
        "cells": lambda b, h, q, kv: near[cell[q], cell[kv]],
        "cells, causal": lambda b, h, q, kv: near[cell[q], cell[kv]] and q >= kv,
        "a circle": lambda b, h, q, kv: (x[q] - x[kv]) ** 2 + (y[q] - y[kv]) ** 2 < 81,
        "flags of queries": lambda b, h, q, kv: flag[q],
        "flags of keys": lambda b, h, q, kv: flag[kv],
        "flags of queries, causal": lambda b, h, q, kv: flag[q] and q >= kv,
        "flags of keys, causal": lambda b, h, q, kv: flag[kv] and q >= kv,
    }[case]
