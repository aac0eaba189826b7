"""A name, a length and a seed -> one of the twelve masks of the FlashMask paper's benchmark, as predicate and vectors.

Source: Wang et al., FlashMask: Efficient and Rich Mask Extension of FlashAttention, 2024 (arXiv 2410.01359), and the
benchmark published with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments, modes
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.presets import basic, packed, sparse

__all__ = ["PAPER", "PaperMask", "paper"]

PAPER: Final = (
    "full",
    "causal",
    "sliding_window",
    "causal_document",
    "document",
    "share_question",
    "global_sliding_window",
    "causal_blockwise",
    "prefix_lm_document",
    "prefix_lm_causal",
    "qk_sparse",
    "random_eviction",
)

_WINDOW: Final = 16  # part of the sequence that a window reaches back, and ahead where it does
_GLOBAL: Final = 16  # tokens
_ANSWERS: Final = (2, 6)
_COUNTS: Final = ((1 << 14, 3, 7), (1 << 16, 10, 14), (None, 11, 15))  # below these tokens: fewest and most documents
_DROPPED: Final = ((1024, 538), (2358, 1700))  # segments of 8,192 tokens: start and length
_DROPPED_OF: Final = 8192


@dataclass(frozen=True, eq=False)
class PaperMask:
    """A mask of the paper.

    Attributes:
        name: one of `PAPER`.
        seq_len: queries, and keys, in tokens.
        arguments: what it was made from, by the names of the preset's arguments.
        predicate: as a preset.
    """

    name: str
    seq_len: int
    arguments: dict[str, Any]
    predicate: Mask

    @cached_property
    def vectors(self) -> ColumnIntervals:
        """The same as FlashMask's vectors: `predicate.to_flashmask`, found when first asked for."""
        batch, heads = self.arguments["evicted_at"].shape[:2] if self.name == "random_eviction" else (1, 1)
        with modes.off():
            return self.predicate.to_flashmask(self.seq_len, self.seq_len, batch=batch, heads=heads)


# Each takes a mask's `arguments` by name.
PREDICATES: Final[dict[str, Callable[..., Mask]]] = {
    "full": basic.full,
    "causal": basic.causal,
    "sliding_window": basic.sliding_window,
    "causal_document": lambda lengths: basic.causal() & basic.document(lengths=lengths),
    "document": lambda lengths: basic.document(lengths=lengths),
    "share_question": packed.share_question,
    "global_sliding_window": lambda n, window: basic.global_tokens(n) | basic.sliding_window(window, window),
    "causal_blockwise": packed.causal_blockwise,
    "prefix_lm_document": packed.prefix_lm_document,
    "prefix_lm_causal": basic.prefix_lm,
    "qk_sparse": sparse.qk_sparse,
    "random_eviction": sparse.random_eviction,
}


def paper(name: str, seq_len: int, seed: int = 0, *, batch: int = 1, heads: int = 1) -> PaperMask:
    """One of the twelve masks of the FlashMask paper's benchmark, at any length.

    Windows reach S/16 tokens, to both sides beside the 16 global ones; the causal prefix is S/2. A sample has 3 to 7
    documents at 8,192 tokens, 10 to 14 at 32,768 and 11 to 15 at 131,072: as many as the paper's. Other lengths take
    the counts of the nearest of these three by ratio, and never more documents than tokens. Documents fill the
    sequence. The paper gives no lengths: here the sequence is cut at places drawn evenly, and so is each document into
    a question and 2 to 6 answers; a prefix is drawn from 1 token to its whole document. The same seed gives the same
    documents to all masks. Dropped segments are the published (1024, 538) and (2358, 1700), scaled by S / 8,192. A half
    of the columns, drawn for each batch row and head, is evicted at rows drawn from S/2 on, but seen by their own rows.

    Args:
        name: one of `PAPER`.
        seq_len: queries, and keys, in tokens.
        seed: of the documents and evictions.
        batch: batch rows of random_eviction; the other masks serve any number with one.
        heads: query heads of random_eviction, likewise.

    Raises:
        ArgumentError: there is no such mask.

    Example:
        >>> paper("qk_sparse", 8192).arguments
        {'segments': [(1024, 538), (2358, 1700)]}
    """
    if name not in PREDICATES:
        raise ArgumentError(f"paper: name is {name!r}, expected one of {', '.join(PAPER)}")
    sizes = {"seq_len": seq_len, "batch": batch, "heads": heads}
    seq_len, batch, heads = (arguments.integer("paper", key, value) for key, value in sizes.items())
    seed = arguments.integer("paper", "seed", seed)
    given = _arguments(name, seq_len, seed, batch, heads)
    return PaperMask(name, seq_len, given, PREDICATES[name](**given))


def _arguments(name: str, tokens: int, seed: int, batch: int, heads: int) -> dict[str, Any]:
    draw = random.Random(seed)
    match name:
        case "full" | "causal":
            return {}
        case "sliding_window":
            return {"left": max(tokens // _WINDOW, 1) - 1}  # the query's own token is one of the window's
        case "global_sliding_window":
            return {"n": _GLOBAL, "window": tokens // _WINDOW}
        case "prefix_lm_causal":
            return {"n": tokens // 2}
        case "qk_sparse":
            return {"segments": [tuple(x * tokens // _DROPPED_OF for x in segment) for segment in _DROPPED]}
        case "random_eviction":
            return {"evicted_at": _evictions(tokens, seed, batch, heads)}
    lengths = _documents(draw, tokens)
    match name:
        case "share_question":
            parts = [_cut(draw, length, 1 + draw.randint(*_ANSWERS)) for length in lengths]
            return {"documents": [(question, answers) for question, *answers in parts]}
        case "prefix_lm_document":
            return {"lengths": lengths, "prefixes": [draw.randint(1, length) for length in lengths]}
    return {"lengths": lengths}


def _documents(draw: random.Random, tokens: int) -> list[int]:
    fewest, most = next((low, high) for below, low, high in _COUNTS if below is None or tokens < below)
    return _cut(draw, tokens, draw.randint(fewest, most))


def _cut(draw: random.Random, tokens: int, parts: int) -> list[int]:
    """Lengths of at least a token each, as many as asked for if there are as many tokens."""
    cuts = sorted(draw.sample(range(1, tokens), min(parts, tokens) - 1)) if tokens else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True)] if tokens else []


@modes.off()
def _evictions(tokens: int, seed: int, batch: int, heads: int) -> Tensor:
    """(batch, heads, tokens) int32, the row that each column is evicted at; tokens + 1 for never."""
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens)
    order = torch.rand(shape, generator=draw).argsort(dim=2)
    half = torch.zeros(shape, dtype=torch.bool).scatter_(2, order[:, :, : tokens // 2], True)
    rows = torch.randint(tokens // 2, max(tokens, 1), shape, generator=draw).maximum(torch.arange(1, tokens + 1))
    return torch.where(half, rows, tokens + 1).int()
