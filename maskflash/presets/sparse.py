"""Causal masks that leave out tokens: whole segments, or keys from some row on.

Pictures show queries downwards and keys to the right; ■ is visible.
"""

from __future__ import annotations

from torch import Tensor

from maskflash.functions.sizes import Fits
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate
from maskflash.presets import documents as packing
from maskflash.presets.documents import Ints, Stretches

__all__ = ["qk_sparse", "random_eviction"]


def qk_sparse(segments: Stretches) -> Mask:
    """Causal, but tokens of a dropped segment don't see that segment, themselves included.

        visible = q >= kv and not (q and kv in the same segment)

        ■ · · · · ·    segments=[(1, 2), (4, 2)]
        ■ · · · · ·
        ■ · · · · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ · ·

    Args:
        segments: (start, length) of each in tokens, disjoint, in any order.

    Source: Wang et al., FlashMask, 2024 (arXiv 2410.01359), after Pagliardini et al., Faster Causal Attention Over
    Large Sequences Through Sparse Flash Attention, 2023.
    """
    dropped = packing.segments("qk_sparse", "segments", segments)
    n = dropped[-1][1] if dropped else 0
    stops, lengths, after = [], [], 0
    for start, stop in dropped:
        stops += [0, stop]
        lengths += [start - after, stop - start]
        after = stop
    end = packing.by_token(stops, lengths, max(n, 1), 0)
    return Predicate(  # a row from kv on is in kv's segment if it comes before its end
        lambda b, h, q, kv: kv <= q and not (kv < n and q < end[kv]),
        f"qk_sparse({len(dropped)} segments)",
    )


def random_eviction(evicted_at: Ints) -> Mask:
    """Causal, and from some row on a key is forgotten, as a cache that evicts keys would.

        visible = kv <= q < evicted_at[kv]

        ■ · · · · ·    evicted_at=[4, 6, 3, 6, 6, 6]
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ · ■ · ·
        · ■ · ■ ■ ·
        · ■ · ■ ■ ■

    Args:
        evicted_at: (S,), (B, S) or (B, H, S) integers, the first row that no longer sees each key; the number of rows,
            or more, means never. B or H of 1 serves all. Kept by reference. Nobody sees keys after the table's S.

    Source: Wang et al., FlashMask, 2024 (arXiv 2410.01359), after Chen et al., NACL, 2024.
    """
    table: Tensor = packing.evictions("random_eviction", evicted_at)
    batch, heads, n = table.shape
    return Predicate(
        lambda b, h, q, kv: kv < n and kv <= q < table[b if batch > 1 else 0, h if heads > 1 else 0, kv],
        "random_eviction(evicted_at)",
        Fits(packing.unless_1(batch), packing.unless_1(heads)),
    )
