"""The FlashMask paper's twelve masks, from a preset's arguments and a length -> column intervals, built directly.

They equal the presets of the same arguments at seq_len x seq_len, where documents must find room. Below, j is a
column, S the length, s and e the start and the end of what the column belongs to. docs/flashmask.md shows each.
Source: Wang et al., FlashMask: Efficient and Rich Mask Extension of FlashAttention, 2024 (arXiv 2410.01359).
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments, modes
from maskflash.masks.columns import ColumnIntervals
from maskflash.presets import documents as packing
from maskflash.presets.documents import Ints, Questions, Stretches

__all__ = [
    "causal",
    "causal_blockwise",
    "causal_document",
    "document",
    "full",
    "global_sliding_window",
    "prefix_lm_causal",
    "prefix_lm_document",
    "qk_sparse",
    "random_eviction",
    "share_question",
    "sliding_window",
]


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)


@modes.off()
def full(seq_len: int) -> ColumnIntervals:
    """`presets.full()`: lts = S, ute = 0."""
    columns = _columns("full", seq_len)
    return _intervals(lts=torch.full_like(columns, seq_len), ute=torch.zeros_like(columns))


@modes.off()
def causal(seq_len: int) -> ColumnIntervals:
    """`presets.causal()`: lts = S, causal."""
    columns = _columns("causal", seq_len)
    return _intervals(lts=torch.full_like(columns, seq_len), causal=True)


@modes.off()
def sliding_window(left: int, seq_len: int) -> ColumnIntervals:
    """`presets.sliding_window(left)`: lts = min(j + left + 1, S), causal."""
    left = arguments.distance("sliding_window", "left", left)
    columns = _columns("sliding_window", seq_len)
    return _intervals(lts=(columns + left + 1).clamp(max=seq_len), causal=True)


@modes.off()
def causal_document(lengths: Ints, seq_len: int) -> ColumnIntervals:
    """`presets.causal() & presets.document(lengths)`: lts = e, causal; 0 in columns after the total."""
    sizes = packing.single("causal_document", "lengths", lengths)
    columns = _columns("causal_document", seq_len, sum(sizes))
    return _intervals(lts=packing.by_token(list(accumulate(sizes)), sizes, len(columns), 0), causal=True)


@modes.off()
def document(lengths: Ints, seq_len: int) -> ColumnIntervals:
    """`presets.document(lengths)`: lts = e, ute = s; 0 in columns after the total."""
    sizes = packing.single("document", "lengths", lengths)
    columns = _columns("document", seq_len, sum(sizes))
    starts = list(accumulate(sizes, initial=0))[:-1]
    return _intervals(
        lts=packing.by_token(list(accumulate(sizes)), sizes, len(columns), 0),
        ute=packing.by_token(starts, sizes, len(columns), 0),
    )


@modes.off()
def share_question(documents: Questions, seq_len: int) -> ColumnIntervals:
    """`presets.share_question(documents)`: lts = end of the document for a question, of the answer for an answer."""
    parts = packing.parts("share_question", documents)
    columns = _columns("share_question", seq_len, parts[-1].stop if parts else 0)
    ends = [part.document_stop if part.is_question else part.stop for part in parts]
    lengths = [part.stop - part.start for part in parts]
    return _intervals(lts=packing.by_token(ends, lengths, len(columns), 0), causal=True)


@modes.off()
def global_sliding_window(n: int, window: int, seq_len: int) -> ColumnIntervals:
    """`presets.global_tokens(n) | presets.sliding_window(window, window)`, in four vectors.

    lts = min(j + window + 1, S), lte = S; uts = n, ute = max(j - window, n). The first n columns hide nothing.
    """
    n = arguments.distance("global_sliding_window", "n", n)
    window = arguments.distance("global_sliding_window", "window", window)
    columns = _columns("global_sliding_window", seq_len)
    n = min(n, seq_len)
    every = torch.full_like(columns, seq_len)
    return _intervals(
        lts=torch.where(columns < n, every, (columns + window + 1).clamp(max=seq_len)),
        lte=every,
        uts=torch.full_like(columns, n),
        ute=(columns - window).clamp(min=n),
    )


@modes.off()
def causal_blockwise(lengths: Ints, seq_len: int) -> ColumnIntervals:
    """`presets.causal_blockwise(lengths)`: lts = e, lte = start of the last block (empty inside it), causal.

    Where the lengths fall short of S, a second interval hides the rows after the total.
    """
    sizes = packing.single("causal_blockwise", "lengths", lengths)
    columns = _columns("causal_blockwise", seq_len, sum(sizes))
    total = sum(sizes)
    last = total - sizes[-1] if sizes else 0
    lts = packing.by_token(list(accumulate(sizes)), sizes, len(columns), 0)
    lte = torch.where(columns < total, min(last, seq_len), seq_len)
    if total >= seq_len:
        return _intervals(lts=lts, lte=lte, causal=True)
    uts, ute = torch.full_like(columns, total), torch.full_like(columns, seq_len)
    return _intervals(lts=lts, lte=lte, uts=uts, ute=ute, causal=True)


@modes.off()
def prefix_lm_document(lengths: Ints, prefixes: Ints, seq_len: int) -> ColumnIntervals:
    """`presets.prefix_lm_document(lengths, prefixes)`: lts = e, ute = s for columns of a prefix, else j."""
    sizes, heads = packing.prefixes("prefix_lm_document", lengths, prefixes)
    columns = _columns("prefix_lm_document", seq_len, sum(sizes))
    starts = list(accumulate(sizes, initial=0))[:-1]
    ends_of_prefixes = [start + head for start, head in zip(starts, heads, strict=True)]
    start, prefix_end = (packing.by_token(x, sizes, len(columns), 0) for x in (starts, ends_of_prefixes))
    return _intervals(
        lts=packing.by_token(list(accumulate(sizes)), sizes, len(columns), 0),
        ute=torch.where(columns < prefix_end, start, columns),
    )


@modes.off()
def prefix_lm_causal(n: int, seq_len: int) -> ColumnIntervals:
    """`presets.prefix_lm(n)`: lts = S, ute = 0 for the first n columns, else j."""
    n = arguments.distance("prefix_lm_causal", "n", n)
    columns = _columns("prefix_lm_causal", seq_len)
    return _intervals(lts=torch.full_like(columns, seq_len), ute=torch.where(columns < n, 0, columns))


@modes.off()
def qk_sparse(segments: Stretches, seq_len: int) -> ColumnIntervals:
    """`presets.qk_sparse(segments)`: lts = j, lte = e inside a dropped segment, empty outside, causal."""
    dropped = packing.segments("qk_sparse", segments)
    columns = _columns("qk_sparse", seq_len)
    lts, lte = torch.full_like(columns, seq_len), torch.full_like(columns, seq_len)
    for start, stop in dropped:
        lts[start:stop] = columns[start:stop]
        lte[start:stop] = min(stop, seq_len)
    return _intervals(lts=lts, lte=lte, causal=True)


@modes.off()
def random_eviction(evicted_at: Ints, seq_len: int) -> ColumnIntervals:
    """`presets.random_eviction(evicted_at)`: lts = evicted_at, causal; by reference if int32 and (..., S)."""
    table = packing.evictions("random_eviction", evicted_at)
    missing = len(_columns("random_eviction", seq_len)) - table.shape[2]
    if table.dtype != torch.int32:  # numbers beyond 32 bits mean the same as the ends of the rows
        table = table.clamp(0, seq_len)
    if missing > 0:
        table = torch.cat((table, table.new_zeros(*table.shape[:2], missing)), dim=2)
    return ColumnIntervals(table[:, :, :seq_len], causal=True)


def _columns(operation: str, seq_len: int, total: int = 0) -> Tensor:
    """(S,) int64, the columns' numbers; `total` tokens of documents must find room."""
    seq_len = arguments.length(operation, "seq_len", seq_len)
    if total > seq_len:
        raise ArgumentError(f"{operation}: the documents add up to {total} tokens, expected at most seq_len, {seq_len}")
    return torch.arange(seq_len)


def _intervals(
    lts: Tensor, lte: Tensor | None = None, uts: Tensor | None = None, ute: Tensor | None = None, causal: bool = False
) -> ColumnIntervals:
    """Vectors of any integer dtype, all within 32 bits."""
    given = {"lte": lte, "uts": uts, "ute": ute}
    others = {name: x.int() for name, x in given.items() if x is not None}
    return ColumnIntervals(lts.int(), **others, causal=causal)
