"""Masks of sequences that several texts share, other than plain documents: each a few lines over tables by token.

Pictures show queries downwards and keys to the right; ■ is visible. Tokens after the total see nothing, and nobody
sees them. Lengths are read when the mask is made.
"""

from __future__ import annotations

from maskflash.masks.mask import Mask, Predicate
from maskflash.presets import documents as packing
from maskflash.presets.documents import Ints, Questions

__all__ = ["causal_blockwise", "prefix_lm_document", "share_question"]

_NONE = -1  # instead of a document or a block


def share_question(documents: Questions) -> Mask:
    """Several answers to one question, packed behind it: an answer sees its question and itself, no other answer.

        visible = q >= kv and document of q == document of kv and (kv in a question or answer of q == answer of kv)

        ■ · · · · ·    documents=[(2, [1, 1]), (1, [1])]
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ · ■ · ·
        · · · · ■ ·
        · · · · ■ ■

    Args:
        documents: (length of the question, [lengths of its answers]) of each, in tokens.

    Source: Wang et al., FlashMask, 2024 (arXiv 2410.01359): the shared question of DPO and reward models.
    """
    parts = packing.parts("share_question", documents)
    n = parts[-1].stop if parts else 0
    # Rows from kv on that see it are those up to the end of what it is part of.
    ends = [part.document_stop if part.is_question else part.stop for part in parts]
    end = packing.by_token(ends, [part.stop - part.start for part in parts], max(n, 1), 0)
    return Predicate(
        lambda b, h, q, kv: kv < n and kv <= q < end[kv],
        f"share_question({len(documents)} documents)",
    )


def causal_blockwise(lengths: Ints) -> Mask:
    """Blocks that don't see one another, and a last one that sees them all; causal.

        visible = q >= kv and (block of q == block of kv or q in the last block)

        ■ · · · · ·    lengths=[2, 2, 2]
        ■ ■ · · · ·
        · · ■ · · ·
        · · ■ ■ · ·
        ■ ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■ ■

    Args:
        lengths: (n,) tokens in each block; the last is that of the test example in in-context learning.

    Source: Wang et al., FlashMask, 2024 (arXiv 2410.01359): independent demonstrations in context.
    """
    blocks = packing.single("causal_blockwise", "lengths", lengths)
    n = sum(blocks)
    last = n - blocks[-1] if blocks else 0
    block = packing.by_token(range(len(blocks)), blocks, max(n, 1), _NONE)
    return Predicate(
        lambda b, h, q, kv: kv <= q < n and (block[q] == block[kv] or q >= last),
        f"causal_blockwise({len(blocks)} blocks)",
    )


def prefix_lm_document(lengths: Ints, prefixes: Ints) -> Mask:
    """Documents packed end to end; all of a document sees its prefix, after which it is causal.

        visible = document of q == document of kv and (q >= kv or kv in a prefix)

        ■ ■ · · · ·    lengths=[4, 2], prefixes=[2, 1]
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        · · · · ■ ·
        · · · · ■ ■

    Args:
        lengths: (n,) tokens in each document.
        prefixes: (n,) tokens in the prefix of each, from 0 to the document's length.

    Source: Raffel et al., Exploring the Limits of Transfer Learning (T5), 2020, section 3.2.1, for each document.
    """
    sizes, heads = packing.prefixes("prefix_lm_document", lengths, prefixes)
    n = sum(sizes)
    doc = packing.by_token(range(len(sizes)), sizes, max(n, 1), _NONE)
    halves = [size for length, head in zip(sizes, heads, strict=True) for size in (head, length - head)]
    in_prefix = packing.by_token([1, 0] * len(sizes), halves, max(n, 1), 0).bool()
    return Predicate(
        lambda b, h, q, kv: 0 <= q < n and kv < n and doc[q] == doc[kv] and (kv <= q or in_prefix[kv]),
        f"prefix_lm_document({len(sizes)} documents)",
    )
