"""A mask of the FlashMask paper -> the same as one writes it for FlexAttention: tensors, and look-ups by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskflash.presets import PaperMask, documents

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(mask: PaperMask) -> MaskMod:
    """The function for `create_block_mask`; its tables are as long as the sequence, which documents fill."""
    tokens, given = mask.seq_len, mask.arguments
    match mask.name:
        case "full":
            return lambda b, h, q, kv: q >= 0
        case "causal":
            return lambda b, h, q, kv: q >= kv
        case "sliding_window":
            left = given["left"]
            return lambda b, h, q, kv: (q >= kv) & (q - kv <= left)
        case "global_sliding_window":
            n, window = given["n"], given["window"]
            return lambda b, h, q, kv: ((q - kv).abs() <= window) | (q < n) | (kv < n)
        case "prefix_lm_causal":
            n = given["n"]
            return lambda b, h, q, kv: (q >= kv) | (kv < n)
        case "random_eviction":
            rows = given["evicted_at"]
            return lambda b, h, q, kv: (q >= kv) & (q < rows[b, h, kv])
        case "qk_sparse":
            end = _segments(given["segments"], tokens)
            return lambda b, h, q, kv: (q >= kv) & (q >= end[kv])
        case "share_question":
            end = _answers(given["documents"], tokens)
            return lambda b, h, q, kv: (q >= kv) & (q < end[kv])
    return _of_documents(mask.name, given, tokens)


def _of_documents(name: str, given: dict[str, Any], tokens: int) -> MaskMod:
    lengths = given["lengths"]
    doc = documents.by_token(range(len(lengths)), lengths, tokens, -1)
    match name:
        case "causal_document":
            return lambda b, h, q, kv: (q >= kv) & (doc[q] == doc[kv])
        case "document":
            return lambda b, h, q, kv: doc[q] == doc[kv]
        case "causal_blockwise":
            last = tokens - lengths[-1]
            return lambda b, h, q, kv: (q >= kv) & ((doc[q] == doc[kv]) | (q >= last))
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    prefix_end = documents.by_token((starts + torch.tensor(given["prefixes"])).tolist(), lengths, tokens, 0)
    return lambda b, h, q, kv: (doc[q] == doc[kv]) & ((q >= kv) | (kv < prefix_end[kv]))


def _segments(segments: list[tuple[int, int]], tokens: int) -> Tensor:
    """The end of the dropped segment that each token is in, 0 outside."""
    table = torch.zeros(tokens, dtype=torch.int32)
    for start, length in segments:
        table[start : start + length] = start + length
    return table


def _answers(given: documents.Questions, tokens: int) -> Tensor:
    """The end of each token's document in a question, of its answer in an answer."""
    parts = documents.parts("share_question", given)
    ends = [part.document_stop if part.is_question else part.stop for part in parts]
    return documents.by_token(ends, [part.stop - part.start for part in parts], tokens, 0)
