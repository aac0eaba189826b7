"""Masks of sequences that several texts share, other than plain documents: each a few lines over tables by token.

Pictures show queries downwards and keys to the right; ■ is visible. Tokens after the total see nothing, and nobody
sees them. Lengths are read when the mask is made.
"""

from __future__ import annotations

from maskflash.errors import ArgumentError
from maskflash.functions.sizes import Fits
from maskflash.ground import arguments, modes
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate
from maskflash.presets import documents as packing
from maskflash.presets.documents import Align, Ints, Lengths, Questions

__all__ = ["causal_blockwise", "causal_document", "prefix_lm_document", "share_question"]

_NONE = -1  # instead of a document or a block


def causal_document(
    documents: Lengths | None = None,
    /,
    *,
    lengths: Lengths | None = None,
    cu_seqlens: Ints | None = None,
    kv_lengths: Lengths | None = None,
    kv_cu_seqlens: Ints | None = None,
    align: Align = "bottom_right",
    left: int | None = None,
    right: int | None = 0,
) -> Mask:
    """Documents packed end to end, causal or windowed inside each, whose queries and keys may differ in number.

        visible = document of q == document of kv and at - left <= kv <= at + right
        at      = end of kv's document - (end of q's document - q), the key that q is aligned with

        ■ ■ ■ ■ · · · · ·    lengths=[2, 3], kv_lengths=[5, 4]
        ■ ■ ■ ■ ■ · · · ·
        · · · · · ■ ■ · ·
        · · · · · ■ ■ ■ ·
        · · · · · ■ ■ ■ ■

    What `flash_attn_varlen_func(..., causal=True)` computes. Without kv_lengths it is `causal() & document(lengths)`.
    Where a document has more queries than keys, its first queries come before all its keys and see nothing. Rows are
    those of the packed queries: a q_offset takes the call for a part of them.

    Args:
        documents: lengths, by position. What may as well be ids or cu_seqlens is an error there: say it by name.
        lengths: queries in each document, one list or (n,) tensor, or one for each batch row; 0 is an empty document.
        cu_seqlens: (n + 1,) where the queries of each document start, and their total, instead of lengths.
        kv_lengths: keys in each document; None for as many as queries.
        kv_cu_seqlens: where the keys of each document start, and their total, instead of kv_lengths.
        align: "bottom_right" where the last query of a document is at its last key, as flash-attention has it from 2.1
            on; "top_left" where the first query is at its first key: at = start of kv's document + (q - start of q's).
        left: tokens before `at`, at least 0; None for all of the document that comes before.
        right: tokens after it, at least 0; None for all of the document that comes after.

    Raises:
        ArgumentError: no lengths or several, negative ones, or documents of queries and keys that don't pair up.

    Source: Dao, flash-attention, `flash_attn_varlen_func` and its window_size=(left, right), where -1 stands for None.
    """
    sizes = packing.sizes(
        "causal_document",
        documents,
        {"lengths": lengths, "cu_seqlens": cu_seqlens},
        {"kv_lengths": kv_lengths, "kv_cu_seqlens": kv_cu_seqlens},
    )
    if align not in ("bottom_right", "top_left"):
        raise ArgumentError(f'causal_document: align is {align!r}, expected "bottom_right" or "top_left"')
    left, right = (arguments.side("causal_document", *given) for given in (("left", left), ("right", right)))
    start, stop = packing.diagonals(sizes, align, left, right)
    name = f"causal_document({sizes.documents} documents)"
    n = max(map(sum, sizes.rows))
    if len(start) > 1:
        return Predicate(lambda b, h, q, kv: 0 <= q < n and start[b, q] <= kv < stop[b, q], name, sizes.fits)
    with modes.off():
        start, stop = start[0], stop[0]
    return Predicate(lambda b, h, q, kv: 0 <= q < n and start[q] <= kv < stop[q], name, sizes.fits)


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
        Fits(q_total=n),
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
        Fits(q_total=n),
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
    with modes.off():
        in_prefix = packing.by_token([1, 0] * len(sizes), halves, max(n, 1), 0).bool()
    return Predicate(
        lambda b, h, q, kv: 0 <= q < n and kv < n and doc[q] == doc[kv] and (kv <= q or in_prefix[kv]),
        f"prefix_lm_document({len(sizes)} documents)",
        Fits(q_total=n),
    )
