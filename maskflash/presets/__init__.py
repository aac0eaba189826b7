"""Masks ready to use: predicates by name, column intervals (`vectors`), and the FlashMask paper's twelve (`paper`)."""

from maskflash.presets import vectors
from maskflash.presets.basic import (
    causal,
    dilated_window,
    document,
    full,
    global_tokens,
    natten,
    padding,
    prefix_lm,
    sliding_window,
)
from maskflash.presets.flashmask import PAPER, PaperMask, paper
from maskflash.presets.packed import causal_blockwise, prefix_lm_document, share_question
from maskflash.presets.sparse import qk_sparse, random_eviction

__all__ = [
    "PAPER",
    "PaperMask",
    "causal",
    "causal_blockwise",
    "dilated_window",
    "document",
    "full",
    "global_tokens",
    "natten",
    "padding",
    "paper",
    "prefix_lm",
    "prefix_lm_document",
    "qk_sparse",
    "random_eviction",
    "share_question",
    "sliding_window",
    "vectors",
]
