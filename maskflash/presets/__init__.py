"""Masks ready to use: predicates by name, and the FlashMask paper's twelve (`paper`)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from maskflash.presets.blocks import block_diffusion, chunked, image_blocks
from maskflash.presets.grids import neighborhood, sliding_tiles
from maskflash.presets.packed import causal_blockwise, causal_document, prefix_lm_document, share_question
from maskflash.presets.sparse import qk_sparse, random_eviction
from maskflash.presets.trees import tree

if TYPE_CHECKING:
    from maskflash.flashmask.paper import PAPER, PaperMask, paper

__all__ = [
    "PAPER",
    "PaperMask",
    "block_diffusion",
    "causal",
    "causal_blockwise",
    "causal_document",
    "chunked",
    "dilated_window",
    "document",
    "full",
    "global_tokens",
    "image_blocks",
    "natten",
    "neighborhood",
    "padding",
    "paper",
    "prefix_lm",
    "prefix_lm_document",
    "qk_sparse",
    "random_eviction",
    "share_question",
    "sliding_tiles",
    "sliding_window",
    "tree",
]


def __getattr__(name: str) -> Any:
    """What few need, imported when it is first asked for."""
    if name in ("PAPER", "PaperMask", "paper"):
        return getattr(import_module("maskflash.flashmask.paper"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)
