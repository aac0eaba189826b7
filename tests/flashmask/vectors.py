"""The FlashMask paper's twelve masks by hand: a preset's arguments and a length -> the vectors of the paper's table.

An oracle beside the presets of the same arguments, and beside `to_flashmask`. Below, j is a column, S the length, s and
e the start and the end of what the column belongs to. docs/flashmask.md shows each.
Source: Wang et al., FlashMask: Efficient and Rich Mask Extension of FlashAttention, 2024 (arXiv 2410.01359).
"""

from itertools import accumulate

import torch

from maskflash import ColumnIntervals
from maskflash.presets import documents as packing


def full(seq_len):
    """lts = S, ute = 0."""
    return made(lts=repeated(seq_len, seq_len), ute=repeated(0, seq_len))


def causal(seq_len):
    """lts = S, causal."""
    return made(lts=repeated(seq_len, seq_len), causal=True)


def sliding_window(left, seq_len):
    """lts = min(j + left + 1, S), causal."""
    return made(lts=(torch.arange(seq_len) + left + 1).clamp(max=seq_len), causal=True)


def causal_document(lengths, seq_len):
    """lts = e, causal; 0 in columns after the total."""
    return made(lts=ends(lengths, seq_len), causal=True)


def document(lengths, seq_len):
    """lts = e, ute = s; 0 in columns after the total."""
    return made(lts=ends(lengths, seq_len), ute=starts(lengths, seq_len))


def share_question(documents, seq_len):
    """lts = end of the document for a question, of the answer for an answer."""
    parts = packing.parts("share_question", documents)
    last = [part.document_stop if part.is_question else part.stop for part in parts]
    return made(lts=packing.by_token(last, [part.stop - part.start for part in parts], seq_len, 0), causal=True)


def global_sliding_window(n, window, seq_len):
    """lts = min(j + window + 1, S), lte = S; uts = n, ute = max(j - window, n). The first n columns hide nothing."""
    columns, n = torch.arange(seq_len), min(n, seq_len)
    return made(
        lts=torch.where(columns < n, seq_len, (columns + window + 1).clamp(max=seq_len)),
        lte=repeated(seq_len, seq_len),
        uts=repeated(n, seq_len),
        ute=(columns - window).clamp(min=n),
    )


def causal_blockwise(lengths, seq_len):
    """lts = e, lte = start of the last block (empty inside it), causal.

    Where the lengths fall short of S, a second interval hides the rows after the total.
    """
    total = sum(lengths)
    last = total - lengths[-1] if lengths else 0
    lts, lte = ends(lengths, seq_len), torch.where(torch.arange(seq_len) < total, last, seq_len)
    if total >= seq_len:
        return made(lts=lts, lte=lte, causal=True)
    return made(lts=lts, lte=lte, uts=repeated(total, seq_len), ute=repeated(seq_len, seq_len), causal=True)


def prefix_lm_document(lengths, prefixes, seq_len):
    """lts = e, ute = s for columns of a prefix, else j."""
    columns, start = torch.arange(seq_len), starts(lengths, seq_len)
    inside = columns < start + packing.by_token(prefixes, lengths, seq_len, 0)
    return made(lts=ends(lengths, seq_len), ute=torch.where(inside, start, columns))


def prefix_lm_causal(n, seq_len):
    """lts = S, ute = 0 for the first n columns, else j."""
    columns = torch.arange(seq_len)
    return made(lts=repeated(seq_len, seq_len), ute=torch.where(columns < n, 0, columns))


def qk_sparse(segments, seq_len):
    """lts = j, lte = e inside a dropped segment, empty outside, causal."""
    lts, lte = repeated(seq_len, seq_len), repeated(seq_len, seq_len)
    for start, length in segments:
        lts[start : start + length] = torch.arange(seq_len)[start : start + length]
        lte[start : start + length] = min(start + length, seq_len)
    return made(lts=lts, lte=lte, causal=True)


def random_eviction(evicted_at, seq_len):
    """lts = evicted_at, causal; 0 in columns after the last that is given."""
    table = torch.as_tensor(evicted_at, dtype=torch.int64)
    table = torch.nn.functional.pad(table, (0, max(seq_len - table.shape[-1], 0)))
    return made(lts=table[..., :seq_len].clamp(0, seq_len), causal=True)


def repeated(number, seq_len):
    return torch.full((seq_len,), number)


def ends(lengths, seq_len):
    return packing.by_token(list(accumulate(lengths)), lengths, seq_len, 0)


def starts(lengths, seq_len):
    return packing.by_token(list(accumulate(lengths, initial=0))[:-1], lengths, seq_len, 0)


def made(causal=False, **vectors):
    return ColumnIntervals(**{name: x.int() for name, x in vectors.items()}, causal=causal)
