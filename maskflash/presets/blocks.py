"""Masks of blocks of tokens: chunks, images in text, the noisy and the clean half of block diffusion.

Pictures show queries downwards and keys to the right; ■ is visible.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.functions.sizes import Fits
from maskflash.ground import arguments, modes
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate
from maskflash.presets import documents as packing
from maskflash.presets.documents import Ints, Stretches

__all__ = ["block_diffusion", "chunked", "image_blocks"]

_TEXT = -1  # the last token of no image


def chunked(size: int) -> Mask:
    """Causal inside chunks of `size` tokens, which are counted from token 0; no chunk sees another.

        visible = q >= kv and q // size == kv // size

        ■ · · · · ·    size=4
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        · · · · ■ ·
        · · · · ■ ■

    It is no window: the first token of a chunk sees only itself, the last one sees `size` tokens.

    Args:
        size: tokens of a chunk, at least 1.

    Source: Llama 4's local layers, whose `attention_chunk_size` is 8,192.
    """
    size = arguments.distance("chunked", "size", size, low=1)
    return Predicate(lambda b, h, q, kv: kv <= q and q // size == kv // size, f"chunked({size})")


def image_blocks(images: Stretches | None = None, /, *, ids: Ints | None = None) -> Mask:
    """Text is causal; the tokens of an image also see all of their image.

        visible = q >= kv or q and kv in the same image

        ■ · · · · ·    images=[(1, 3)]
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■ ■

    Give one of images and ids. A window cuts images too in Gemma 3's local layers, as Transformers has them: they are
    `image_blocks(images) & sliding_window(window - 1, None)`. In vLLM an image is seen whole, however far the window
    reaches: that is `from_prefix_ranges(ranges, window)`.

    Args:
        images: (start, length) of each in tokens, disjoint, in any order; read now, and the same for all batch rows.
        ids: (S,) or (B, S) integers, the image of each token, negative for text; kept by reference. B of 1 serves all.

    Raises:
        ArgumentError: none or both of them, or images that overlap.

    Source: Gemma 3, as Transformers 5.23 has it (`blockwise_overlay` in masking_utils, whose ids these are).
    """
    if ids is not None and images is None:
        return _images_by_ids(arguments.int_table("image_blocks", "ids", ids, (1, 2)))
    if images is None or ids is not None:
        got = "none" if images is None else "images and ids"
        raise ArgumentError(f"image_blocks: got {got}, expected exactly one of images and ids")
    found = packing.segments("image_blocks", "images", images)
    n = found[-1][1] if found else 0
    lasts, lengths, after = [], [], 0
    for start, stop in found:
        lasts += [_TEXT, stop - 1]
        lengths += [start - after, stop - start]
        after = stop
    last = packing.by_token(lasts, lengths, max(n, 1), _TEXT)

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= (max(q, last[q]) if 0 <= q < n else q)

    return Predicate(visible, f"image_blocks({len(found)} images)")


def block_diffusion(n: int, block: int) -> Mask:
    """Training a block diffusion model on n noisy tokens, then the same n clean: a noisy block sees the clean past.

        visible = block of q == block of kv and q and kv in the same half, or
                  kv clean and block of q > block of kv

        ■ ■ · · · · · ·    n=4, block=2
        ■ ■ · · · · · ·
        · · ■ ■ ■ ■ · ·
        · · ■ ■ ■ ■ · ·
        · · · · ■ ■ · ·
        · · · · ■ ■ · ·
        · · · · ■ ■ ■ ■
        · · · · ■ ■ ■ ■

    A noisy block sees itself and the clean blocks before it; a clean block sees itself and the clean blocks before it.
    Tokens after the 2 n see nothing, and nobody sees them.

    Args:
        n: tokens of either half; the last block may be shorter.
        block: tokens of a block, at least 1.

    Source: Arriola et al., Block Diffusion (BD3-LM), 2025 (arXiv 2503.09573): its masks M_BD, M_OBC and M_BC together.
    """
    n = arguments.integer("block_diffusion", "n", n, high=arguments.MOST_TOKENS // 2)
    block = arguments.distance("block_diffusion", "block", block, low=1)

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        if not (0 <= q < 2 * n and kv < 2 * n):
            return False
        q_block, kv_block = (q if q < n else q - n) // block, (kv if kv < n else kv - n) // block
        if kv < n:
            return q < n and q_block == kv_block
        return kv_block < q_block or (q >= n and kv_block == q_block)

    return Predicate(visible, f"block_diffusion({n}, {block})", Fits(q_total=2 * n))


def _images_by_ids(ids: Tensor) -> Mask:
    if ids.ndim == 2 and len(ids) == 1:
        with modes.off():
            ids = ids[0]  # serves all
    if ids.ndim == 1:
        return Predicate(
            lambda b, h, q, kv: kv <= q or (ids[q] >= 0 and ids[q] == ids[kv]),
            "image_blocks(ids)",
        )
    return Predicate(
        lambda b, h, q, kv: kv <= q or (ids[b, q] >= 0 and ids[b, q] == ids[b, kv]),
        "image_blocks(ids per row)",
        Fits(batch=len(ids)),
    )
