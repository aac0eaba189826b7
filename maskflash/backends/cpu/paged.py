"""Few rows of requests over their pages -> attention: a page is read where it lies, or copied to stay in the cache.

    request 0    7   8   9   10  11  12   3   1   20       adjacent in the pool: read in place, a call for each run
    request 1    6   24  2   13  40  5    0                all others: copied, some pages of all requests at a time

Pages that lie one after the other in the pool are one tensor already. Of all others so many are copied at once as the
processor's cache holds, where they are attended next. The parts are merged by lse. Pages of which no row sees a column
are not read; of the others, what no row sees is not attended.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.runs import BoolArray
from maskflash.backends.cpu import few
from maskflash.backends.merge import merge
from maskflash.backends.sinks import add_sinks
from maskflash.ground.stretch import Numbers, are_adjacent

Part = tuple[slice | Numbers, Tensor, Tensor]
"""Requests, and out and lse of some of their pages."""

_IN_PLACE: Final = 256  # tokens that lie one after the other, from which on they are read where they are
_COPIED: Final = 1 << 20  # bytes of keys, about, that are copied at once


def forward(
    bits: BoolArray,
    seen: BoolArray,
    ids: Numbers,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of equally few rows of several requests.

    Args:
        bits: (requests, heads or 1, q_len, pages * page_size), what they see.
        seen: (requests, pages), of which pages some row sees a column.
        ids: (requests, pages), where these are in the pool; of pages that no row sees, anything.
        q: (requests, Hq, q_len, D).
        k_pages: (P, page_size, Hkv, D), any strides.
        v_pages: (P, page_size, Hkv, Dv).
        scale: factor of the scores.
        sinks: (Hq,), or None.

    Returns:
        out (requests, Hq, q_len, Dv) in q's dtype, and lse (requests, Hq, q_len).
    """
    parts: list[Part] = []
    if all(are_adjacent(x) for x in (k_pages, v_pages)):
        seen = seen.copy()
        for request, first, stop in _runs(seen, ids, k_pages.shape[1], whole=q.dtype.itemsize == 2):
            parts.append(_in_place(bits, ids, request, first, stop, q, k_pages, v_pages, scale))
            seen[request, first:stop] = False
    parts += _copied(bits, seen, ids, q, k_pages, v_pages, scale)
    if len(parts) == 1 and len(parts[0][1]) == len(q):
        _, out, lse = parts[0]
    else:
        total = torch.float64 if q.dtype == torch.float64 else torch.float32
        outs = q.new_zeros(max(1, len(parts)), *q.shape[:3], v_pages.shape[3])
        lses = q.new_full(outs.shape[:-1], -torch.inf, dtype=total)
        for place, (requests, part_out, part_lse) in enumerate(parts):
            outs[place, requests], lses[place, requests] = part_out, part_lse
        out, lse = merge(outs, lses)
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out, lse


def _runs(seen: BoolArray, ids: Numbers, page_size: int, *, whole: bool) -> list[tuple[int, int, int]]:
    """Long runs of pages that are seen and lie one after the other: request, first, stop; `whole`: all that is seen."""
    follows = np.zeros((len(seen), seen.shape[1] + 1), bool)
    follows[:, 1:-1] = seen[:, 1:] & seen[:, :-1] & (np.diff(ids) == 1)
    request, first = np.nonzero(seen & ~follows[:, :-1])
    ends = np.nonzero(seen & ~follows[:, 1:])[1] + 1
    long = (ends - first) * page_size >= _IN_PLACE
    if whole:  # a kernel of 16 bits rounds what it returns: once, not once for each part
        long &= ends - first == seen.sum(1)[request]
    found = zip(request[long].tolist(), first[long].tolist(), ends[long].tolist(), strict=True)
    return list(found)


def _in_place(
    bits: BoolArray,
    ids: Numbers,
    request: int,
    first: int,
    stop: int,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
) -> Part:
    """A request's attention to adjacent pages."""
    page_size, start = k_pages.shape[1], int(ids[request, first])
    columns = slice(first * page_size, stop * page_size)
    units = few.units_of(bits[request : request + 1, :, :, columns], 1, q.shape[1], k_pages.shape[2])
    k, v = (x[start : start + stop - first].flatten(0, 1).transpose(0, 1)[None] for x in (k_pages, v_pages))
    return slice(request, request + 1), *few.forward(units, q[request : request + 1], k, v, scale, None)


def _copied(
    bits: BoolArray, seen: BoolArray, ids: Numbers, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float
) -> list[Part]:
    """Attention to these pages, some at a time."""
    counts = seen.sum(1)
    most = int(counts.max(initial=0))
    if not most:
        return []
    (group, heads, q_len), page_size = bits.shape[:3], k_pages.shape[1]
    order = np.argsort(~seen, axis=1, kind="stable")[:, :most]  # those that are seen, ascending; then any
    used = np.arange(most) < counts[:, None]
    chosen = np.where(used, np.take_along_axis(ids, order, 1), 0)
    by_page = bits.reshape(group, heads, q_len, -1, page_size)
    by_page = np.take_along_axis(by_page, order[:, None, None, :, None], 3) & used[:, None, None, :, None]
    size = max(1, group * k_pages[0].numel() * k_pages.element_size())
    at_once = most if q.dtype.itemsize == 2 else min(most, max(1, _COPIED // size))
    room = [x.new_empty(group * at_once, *x.shape[1:]) for x in (k_pages, v_pages)]
    parts: list[Part] = []
    for first in range(0, most, at_once):
        some, rows = slice(first, min(first + at_once, most)), np.flatnonzero(counts > first)
        pages = torch.from_numpy(chosen[rows, some].reshape(-1))
        k, v = (
            torch.index_select(x, 0, pages, out=into[: len(pages)]).view(len(rows), -1, *x.shape[2:]).transpose(1, 2)
            for x, into in zip((k_pages, v_pages), room, strict=True)
        )
        visible = by_page[rows, :, :, some].reshape(len(rows), heads, q_len, -1)
        units = few.units_of(visible, len(rows), q.shape[1], k.shape[1])
        queries = q if len(rows) == group else q[torch.from_numpy(rows)]
        parts.append((rows, *few.forward(units, queries, k, v, scale, None)))
    return parts
