"""Few rows of a request over its pages -> attention: a page is read where it lies, or copied to stay in the cache.

    pages of the request    7   8   9   10  11  12   3   1   20  5
    pieces                  read in place            copied

Pages that lie one after the other in the pool are one tensor already. Of others so many are copied at once as the
processor's cache holds, where they are attended next, and the pieces are merged by lse. Pages of which no row sees a
column are not read; of the others, what no row sees is not attended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.runs import BoolArray
from maskflash.backends.cpu import few
from maskflash.backends.merge import merge
from maskflash.backends.sinks import add_sinks
from maskflash.ground.stretch import Numbers, Stretch

_IN_PLACE: Final = 256  # tokens that lie one after the other, from which on they are a piece of their own
_COPIED: Final = 1 << 20  # bytes of keys, about, that are copied at once


def forward(
    bits: BoolArray,
    stretch: Stretch,
    ids: Numbers,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of the few rows of one request.

    Args:
        bits: (heads or 1, q_len, kv_len), what they see.
        stretch: the columns that some row sees.
        ids: the pages of the pool that have them.
        q: (1, Hq, q_len, D).
        k_pages: (P, page_size, Hkv, D), any strides.
        v_pages: (P, page_size, Hkv, Dv).
        scale: factor of the scores.
        sinks: (Hq,), or None.

    Returns:
        out (1, Hq, q_len, Dv) in q's dtype, and lse (1, Hq, q_len).
    """
    heads, kv_heads = q.shape[1], k_pages.shape[2]
    found: list[tuple[Tensor, Tensor]] = []
    for pages, columns in _pieces(stretch, ids, k_pages, whole=q.dtype.itemsize == 2):
        k, v = (stretch.tokens(x, ids, pages) for x in (k_pages, v_pages))
        units = few.units_of(bits[None, :, :, columns], 1, heads, kv_heads)
        found.append(few.forward(units, q, k, v, scale, None))
    if not found:
        total = torch.float64 if q.dtype == torch.float64 else torch.float32
        found.append((q.new_zeros(*q.shape[:3], v_pages.shape[3]), q.new_full(q.shape[:3], -torch.inf, dtype=total)))
    out, lse = found[0] if len(found) == 1 else merge(*zip(*found, strict=True))
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out, lse


def _pieces(stretch: Stretch, ids: Numbers, pool: Tensor, *, whole: bool) -> Iterator[tuple[slice, slice | Numbers]]:
    """Which of the stretch's pages are attended at once, and which columns they have."""
    if len(ids) and (stretch.columns is not None or whole):  # a kernel of 16 bits rounds what it returns: once
        yield slice(0, len(ids)), slice(stretch.start, stretch.stop) if stretch.columns is None else stretch.columns
        return
    at_once = max(1, _COPIED // max(1, pool[0].numel() * pool.element_size()))
    breaks = np.flatnonzero(np.diff(ids, prepend=-2, append=-2) != 1)
    long = np.flatnonzero(np.diff(breaks) * stretch.page_size >= _IN_PLACE)
    in_place = dict(zip(breaks[long].tolist(), breaks[long + 1].tolist(), strict=True))
    starts, at = sorted(in_place), 0
    while at < len(ids):
        stop = in_place.get(at)
        if stop is None:
            stop = min([at + at_once, len(ids), *(start for start in starts if start > at)])
        yield slice(at, stop), slice(*stretch.columns_of(slice(at, stop)))
        at = stop
