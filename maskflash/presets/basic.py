"""The masks everybody uses, each a few lines of predicate: also examples of how to write one.

Pictures show queries downwards and keys to the right; ■ is visible.
"""

from __future__ import annotations

from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.functions.sizes import Fits
from maskflash.ground import arguments, modes
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate
from maskflash.presets import documents as packing
from maskflash.presets.documents import Ints, Lengths
from maskflash.presets.grids import kernels_of

__all__ = [
    "causal",
    "dilated_window",
    "document",
    "full",
    "global_tokens",
    "natten",
    "padding",
    "prefix_lm",
    "sliding_window",
]


def full() -> Mask:
    """Every query sees every key.

        visible = True

        ■ ■ ■ ■
        ■ ■ ■ ■
        ■ ■ ■ ■
        ■ ■ ■ ■

    The neutral element of `&`, and what attention without a mask is.
    """
    return Predicate(lambda b, h, q, kv: True, "full()")


def causal() -> Mask:
    """Every query sees itself and what comes before it.

        visible = q >= kv

        ■ · · · · ·
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■ ■

    With fewer queries than keys (decoding), `q_offset=kv_len - q_len` aligns the last query with the last key.
    """
    return Predicate(lambda b, h, q, kv: q >= kv, "causal()")


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """Every query sees the keys near it: `left` tokens back and `right` ahead, both ends included.

        visible = q - left <= kv <= q + right

        ■ ■ · · · ·    left=2, right=1
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        · ■ ■ ■ ■ ·
        · · ■ ■ ■ ■
        · · · ■ ■ ■

    Args:
        left: tokens, at least 0; None for all that come before.
        right: tokens, at least 0; None for all that come after.

    Source: counted as flash-attention counts `window_size=(left, right)`, where -1 stands for None.
    """
    left, right = (arguments.side("sliding_window", *given) for given in (("left", left), ("right", right)))
    name = f"sliding_window({left})" if right == 0 else f"sliding_window({left}, {right})"
    if left is None and right is None:
        return Predicate(lambda b, h, q, kv: True, name)
    if left is None:
        return Predicate(lambda b, h, q, kv: kv <= q + right, name)
    if right is None:
        return Predicate(lambda b, h, q, kv: q - left <= kv, name)
    return Predicate(lambda b, h, q, kv: q - left <= kv <= q + right, name)


def document(
    documents: Lengths | None = None,
    /,
    *,
    lengths: Lengths | None = None,
    ids: Ints | None = None,
    cu_seqlens: Ints | None = None,
    kv_lengths: Lengths | None = None,
    kv_cu_seqlens: Ints | None = None,
) -> Mask:
    """Documents packed end to end; every query sees all of its own document. `causal_document` is its causal form.

        visible = document of q == document of kv

        ■ ■ ■ · · ·    lengths=[3, 1, 2]
        ■ ■ ■ · · ·
        ■ ■ ■ · · ·
        · · · ■ · ·
        · · · · ■ ■
        · · · · ■ ■

    Give exactly one of lengths, ids and cu_seqlens. Lengths are read now; ids are kept by reference. With documents of
    one length for queries and keys, `causal() & document(...)` is causal too.

    Args:
        documents: lengths, by position. What may as well be ids or cu_seqlens is an error there: say it by name.
        lengths: tokens in each document, one list or (n,) tensor, or one for each batch row. They may fall short of
            the sequence: the rest is padding that sees nothing and that nobody sees. In a call without a q_offset, they
            may not go beyond both its queries and its keys.
        ids: (S,) or (B, S) integers, equal for tokens of one document, in any order.
        cu_seqlens: (n + 1,) where each document starts, and the total: as flash-attention's varlen functions take.
        kv_lengths: the keys' own lengths for cross-attention, document for document; with lengths or cu_seqlens.
        kv_cu_seqlens: where the keys' documents start, instead.

    Raises:
        ArgumentError: none or several of them, negative lengths, or documents of queries and keys that don't pair up.
    """
    given = {"lengths": lengths, "ids": ids, "cu_seqlens": cu_seqlens}
    names = ["lengths"] * (documents is not None) + [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        got = ", ".join(names) or "none"
        raise ArgumentError(f"document: got {got}, expected exactly one of lengths, ids and cu_seqlens")
    if ids is not None:
        if kv_lengths is not None or kv_cu_seqlens is not None:
            other = "kv_lengths" if kv_cu_seqlens is None else "kv_cu_seqlens"
            raise ArgumentError(f"document: {other} goes with lengths or cu_seqlens, got ids; drop one of them")
        return _document_by_ids(arguments.int_table("document", "ids", ids, (1, 2)))
    sizes = packing.sizes(
        "document",
        documents,
        {"lengths": lengths, "cu_seqlens": cu_seqlens},
        {"kv_lengths": kv_lengths, "kv_cu_seqlens": kv_cu_seqlens},
    )
    name = f"document({sizes.documents} documents)"
    doc, total = packing.numbers(sizes.rows)
    kv_doc, kv_total = packing.numbers(sizes.kv_rows) if sizes.unlike else (doc, total)
    if len(sizes.rows) > 1:
        return Predicate(
            lambda b, h, q, kv: 0 <= q < total[b] and kv < kv_total[b] and doc[b, q] == kv_doc[b, kv], name, sizes.fits
        )
    with modes.off():
        doc, kv_doc = doc[0], kv_doc[0]
    n, kv_n = sum(sizes.rows[0]), sum(sizes.kv_rows[0])
    return Predicate(lambda b, h, q, kv: 0 <= q < n and kv < kv_n and doc[q] == kv_doc[kv], name, sizes.fits)


def prefix_lm(n: int | Ints) -> Mask:
    """Everybody sees the first n tokens; after them attention is causal.

        visible = kv < n or q >= kv

        ■ ■ ■ · · ·    n=3
        ■ ■ ■ · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■ ■

    Args:
        n: tokens in the prefix, at least 0; an int, or (B,) integers, one for each batch row; a tensor is kept by
            reference, and one of size 1 serves all.

    Source: Raffel et al., Exploring the Limits of Transfer Learning (T5), 2020, section 3.2.1.
    """
    if arguments.is_table(n):
        table = packing.reaches("prefix_lm", "n", n)
        if len(table) == 1:
            return Predicate(lambda b, h, q, kv: kv < table[0] or q >= kv, "prefix_lm(n)")
        fits = Fits(batch=len(table))
        return Predicate(lambda b, h, q, kv: kv < table[b] or q >= kv, "prefix_lm(n per row)", fits)
    n = arguments.distance("prefix_lm", "n", n)
    return Predicate(lambda b, h, q, kv: kv < n or q >= kv, f"prefix_lm({n})")


def padding(lengths: int | Ints) -> Mask:
    """Nobody sees the keys after each sequence's length.

        visible = kv < lengths[b]

        ■ ■ ■ ■ · ·    lengths=[4]
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·

    Rows of padding still see the sequence's keys: where that work is to be saved too, use document(lengths).

    Args:
        lengths: (B,) integers, one for each batch row, or one int for all; a tensor is kept by reference, and one of
            size 1 serves all.
    """
    if arguments.is_table(lengths):
        table = packing.reaches("padding", "lengths", lengths)
        if len(table) == 1:
            return Predicate(lambda b, h, q, kv: kv < table[0], "padding(lengths)")
        return Predicate(lambda b, h, q, kv: kv < table[b], "padding(lengths)", Fits(batch=len(table)))
    length = arguments.distance("padding", "lengths", lengths)
    return Predicate(lambda b, h, q, kv: kv < length, f"padding({length})")


def global_tokens(n: int) -> Mask:
    """The first n tokens see everything and are seen by everybody. Combine with `| sliding_window(...)`.

        visible = q < n or kv < n

        ■ ■ ■ ■ ■ ■    n=1
        ■ · · · · ·
        ■ · · · · ·
        ■ · · · · ·
        ■ · · · · ·
        ■ · · · · ·

    Args:
        n: tokens, at least 0.

    Source: Beltagy et al., Longformer, 2020, section 3.1.
    """
    n = arguments.distance("global_tokens", "n", n)
    return Predicate(lambda b, h, q, kv: q < n or kv < n, f"global_tokens({n})")


def dilated_window(window: int, dilation: int) -> Mask:
    """Every query sees each dilation-th key up to `window` tokens away, to both sides. Combine with causal().

        visible = |q - kv| <= window and (q - kv) % dilation == 0

        ■ · ■ · · ·    window=2, dilation=2
        · ■ · ■ · ·
        ■ · ■ · ■ ·
        · ■ · ■ · ■
        · · ■ · ■ ·
        · · · ■ · ■

    Args:
        window: tokens, at least 0.
        dilation: tokens, at least 1.

    Source: Beltagy et al., Longformer, 2020, section 3.1.
    """
    window = arguments.distance("dilated_window", "window", window)
    dilation = arguments.distance("dilated_window", "dilation", dilation, low=1)
    return Predicate(
        lambda b, h, q, kv: abs(q - kv) <= window and (q - kv) % dilation == 0,
        f"dilated_window({window}, {dilation})",
    )


def natten(height: int, width: int, kernel_h: int, kernel_w: int) -> Mask:
    """Neighbourhood attention over an image in row-major order: a kernel around each pixel, shifted in at the edges.

        visible = top <= row of kv < top + kernel_h and left <= column of kv < left + kernel_w
        top     = clamp(row of q - kernel_h // 2, 0, height - kernel_h), left likewise

        ■ ■ · ■ ■ · · · ·    height=3, width=3, kernel_h=2, kernel_w=2
        ■ ■ · ■ ■ · · · ·
        · ■ ■ · ■ ■ · · ·
        ■ ■ · ■ ■ · · · ·
        ■ ■ · ■ ■ · · · ·
        · ■ ■ · ■ ■ · · ·
        · · · ■ ■ · ■ ■ ·
        · · · ■ ■ · ■ ■ ·
        · · · · ■ ■ · ■ ■

    Args:
        height: rows of the image.
        width: columns of the image.
        kernel_h: rows of the neighbourhood, at most height; odd to centre it.
        kernel_w: columns of the neighbourhood, at most width.

    Tokens after the image's height·width see nothing and nobody sees them; join others with `|`. Lines and videos,
    strides, dilations and causal axes are `presets.neighborhood`.

    Source: Hassani et al., Neighborhood Attention Transformer, 2023, section 3.1.
    """
    sizes = {"height": height, "width": width, "kernel_h": kernel_h, "kernel_w": kernel_w}
    height, width, kernel_h, kernel_w = (arguments.length("natten", name, size, low=1) for name, size in sizes.items())
    if kernel_h > height or kernel_w > width:
        raise ArgumentError(
            f"natten: the kernel is {kernel_h} x {kernel_w}, expected at most the image's {height} x {width}"
        )
    tokens, inside = height * width, kernels_of((height, width), (kernel_h, kernel_w))
    if tokens > arguments.MOST_TOKENS:
        raise ArgumentError(
            f"natten: the image is {height} x {width}, expected at most {arguments.MOST_TOKENS:,} pixels"
        )
    name = f"natten({height}, {width}, {kernel_h}, {kernel_w})"
    return Predicate(lambda b, h, q, kv: 0 <= q < tokens and inside(q, kv), name)


def _document_by_ids(ids: Tensor) -> Mask:
    if ids.ndim == 2 and len(ids) == 1:
        with modes.off():
            ids = ids[0]  # serves all
    if ids.ndim == 1:
        return Predicate(lambda b, h, q, kv: ids[q] == ids[kv], "document(ids)")
    return Predicate(lambda b, h, q, kv: ids[b, q] == ids[b, kv], "document(ids per row)", Fits(batch=len(ids)))
