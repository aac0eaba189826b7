"""maskflash: a compiler from which pairs may attend to a fast, differentiable attention op.

Say which query may see which key, in plain Python or by presets. Get attention that skips what
is hidden, forward and backward, on a CPU as on a GPU:

    import torch
    import maskflash as mf

    # batch, heads, tokens, head dim
    q, k, v = torch.randn(3, 1, 4, 1024, 64, requires_grad=True).unbind()
    attn = mf.compile(mf.causal() & mf.document(lengths=[300, 724]))
    out = attn(q, k, v)
    out.sum().backward()

What you may want, and what does it:

    attend under a mask           mf.compile; mf.attention for one call; mf.varlen_attention
    make a mask                   mf.mask of a function f(b, h, q, kv); presets, such as
                                  mf.causal and mf.sliding_window, more in mf.presets
    join masks                    & | ^ ~
    change scores as well         score= of mf.compile: mf.score of a function, or mf.scores
    see what a mask shows, why    mf.Mask: its dense, row, block_map, why; mf.visualize
    tell two masks apart          mf.equivalent, mf.implies, mf.compare
    know what a call will do      mf.Attention: its explain and source
    come from another library     mf.from_arguments, mf.from_flex, mf.flashmask_attention
    go to another's kernel        mf.Mask: its to_flashmask, to_block_mask, to_slices, ...
    decode over pages of keys     mf.PageTable, and paged of mf.Attention
    train on shared beginnings    mf.prefix_tree
    share a sequence among ranks  mf.parallel
    test a mask of your own       mf.testing

Every error raised on purpose is an mf.MaskflashError: it says what was expected, and the fix.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from maskflash import presets, scores
from maskflash.api import attention, compile, invalidate, varlen_attention
from maskflash.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    DenseMaskWarning,
    MaskflashError,
    MaskIndexError,
    MaskTraceError,
    UnsupportedMask,
)
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask
from maskflash.op.attention import Attention
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
from maskflash.presets.packed import causal_document
from maskflash.scores.score import Score, score

if TYPE_CHECKING:
    from maskflash import parallel, testing, visualize
    from maskflash.analysis.block_map import BlockMap
    from maskflash.backends.merge import merge
    from maskflash.flashmask.call import flashmask_attention
    from maskflash.forms.arguments import from_arguments
    from maskflash.forms.block_rows import BlockRows, from_block_rows
    from maskflash.forms.block_sparse import BlockSparse, from_block_sparse
    from maskflash.forms.cute import CuteMask
    from maskflash.forms.flex import from_flex
    from maskflash.forms.packed_mask import PackedMask, from_packed_mask
    from maskflash.forms.prefix_ranges import PrefixRanges, from_prefix_ranges
    from maskflash.forms.row_intervals import RowIntervals
    from maskflash.forms.row_mask import from_row_intervals
    from maskflash.forms.slices import Slices, from_slices
    from maskflash.masks.compare import Comparison, Relation, compare, equivalent, implies
    from maskflash.masks.sight import Sight
    from maskflash.masks.why import Why
    from maskflash.op.decomposed import dense_decompositions
    from maskflash.op.explain import Explanation
    from maskflash.op.page_table import PageTable
    from maskflash.presets.prefix_trees import PrefixTree, prefix_tree

__version__ = "0.2.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Attention",
    "BackendError",
    "BlockMap",
    "BlockRows",
    "BlockSparse",
    "ColumnIntervals",
    "Comparison",
    "CuteMask",
    "DenseMaskWarning",
    "Explanation",
    "Mask",
    "MaskIndexError",
    "MaskTraceError",
    "MaskflashError",
    "PackedMask",
    "PageTable",
    "PrefixRanges",
    "PrefixTree",
    "Relation",
    "RowIntervals",
    "Score",
    "Sight",
    "Slices",
    "UnsupportedMask",
    "Why",
    "attention",
    "causal",
    "causal_document",
    "compare",
    "compile",
    "dense_decompositions",
    "dilated_window",
    "document",
    "equivalent",
    "flashmask_attention",
    "from_arguments",
    "from_block_rows",
    "from_block_sparse",
    "from_flex",
    "from_packed_mask",
    "from_prefix_ranges",
    "from_row_intervals",
    "from_slices",
    "full",
    "global_tokens",
    "implies",
    "invalidate",
    "mask",
    "merge",
    "natten",
    "padding",
    "parallel",
    "prefix_lm",
    "prefix_tree",
    "presets",
    "score",
    "scores",
    "sliding_window",
    "testing",
    "varlen_attention",
    "visualize",
]

# Imported when first asked for: `import maskflash` should cost next to nothing beside torch.
_LATER: Final = {
    "BlockMap": "maskflash.analysis.block_map",
    "BlockRows": "maskflash.forms.block_rows",
    "BlockSparse": "maskflash.forms.block_sparse",
    "Comparison": "maskflash.masks.compare",
    "CuteMask": "maskflash.forms.cute",
    "Explanation": "maskflash.op.explain",
    "PackedMask": "maskflash.forms.packed_mask",
    "PageTable": "maskflash.op.page_table",
    "PrefixRanges": "maskflash.forms.prefix_ranges",
    "PrefixTree": "maskflash.presets.prefix_trees",
    "Relation": "maskflash.masks.compare",
    "RowIntervals": "maskflash.forms.row_intervals",
    "Sight": "maskflash.masks.sight",
    "Slices": "maskflash.forms.slices",
    "Why": "maskflash.masks.why",
    "compare": "maskflash.masks.compare",
    "dense_decompositions": "maskflash.op.decomposed",
    "equivalent": "maskflash.masks.compare",
    "flashmask_attention": "maskflash.flashmask.call",
    "from_arguments": "maskflash.forms.arguments",
    "from_block_rows": "maskflash.forms.block_rows",
    "from_block_sparse": "maskflash.forms.block_sparse",
    "from_flex": "maskflash.forms.flex",
    "from_packed_mask": "maskflash.forms.packed_mask",
    "from_prefix_ranges": "maskflash.forms.prefix_ranges",
    "from_row_intervals": "maskflash.forms.row_mask",
    "from_slices": "maskflash.forms.slices",
    "implies": "maskflash.masks.compare",
    "merge": "maskflash.backends.merge",
    "prefix_tree": "maskflash.presets.prefix_trees",
}


if not TYPE_CHECKING:  # else a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in ("parallel", "testing", "visualize"):
            return import_module(f"maskflash.{name}")
        if name in _LATER:
            return getattr(import_module(_LATER[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What users may use."""
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"})
