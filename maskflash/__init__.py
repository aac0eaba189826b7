"""maskflash: a compiler from which pairs may attend to a fast, differentiable attention op.

`compile(mask)` is the front door; `mask`, the presets and `& | ^ ~` make masks. README.md has an example.
"""

from maskflash import presets, testing
from maskflash.api import Attention, attention, compile
from maskflash.blocks.block_map import BlockMap
from maskflash.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    MaskflashError,
    MaskIndexError,
    MaskTraceError,
    UnsupportedMask,
)
from maskflash.explain import Explanation
from maskflash.flashmask import flashmask_attention
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.compare import Comparison, equivalent, implies
from maskflash.masks.mask import Mask, mask
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

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Attention",
    "BackendError",
    "BlockMap",
    "ColumnIntervals",
    "Comparison",
    "Explanation",
    "Mask",
    "MaskIndexError",
    "MaskTraceError",
    "MaskflashError",
    "UnsupportedMask",
    "attention",
    "causal",
    "compile",
    "dilated_window",
    "document",
    "equivalent",
    "flashmask_attention",
    "full",
    "global_tokens",
    "implies",
    "mask",
    "natten",
    "padding",
    "prefix_lm",
    "presets",
    "sliding_window",
    "testing",
]
