"""Few rows of requests over their pages -> attention: a page is read where it lies, or copied to stay in the cache.

    request 0    7   8   9   10  11  12   3   1   20       adjacent in the pool: read in place, a call for each run, or
                                                           one for all where they lie like one contiguous cache
    request 1    6   24  2   13  40  5    0                all others: copied, some pages of all requests at a time
    request 2    6   24  2   13  31  4                     shared with request 1: once, for the rows of both

Pages that lie one after the other in the pool are one tensor already. Of all others so many are copied at once as the
processor's cache holds, where they are attended next. The parts are merged by lse. Pages of which no row sees a column
are not read; of the others, what no row sees is not attended.

Source: Juravsky et al., Hydragen, 2024, for shared prefixes: rows of several requests are rows of one product.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskflash.backends.cpu import few
from maskflash.backends.cpu.scored import ScoredPairs
from maskflash.backends.cpu.softmax import merge_some
from maskflash.backends.sinks import add_sinks
from maskflash.ground import modes
from maskflash.ground.pool import Pool
from maskflash.ground.stretch import BoolArray, Numbers, span

_IN_PLACE: Final = 1 << 20  # bytes of keys that lie one after the other, from which on they are read where they are
_COPIED: Final = 1 << 21  # bytes of keys, about, that are copied at once
_SHORT: Final = 256  # tokens of a request, about, for which a part of their own costs more than it gains
_SHARED: Final = 1 << 20  # bytes of keys that sharing has to save
_ALONE: Final = 4096  # tokens of a request that are copied at once where its bits shall not depend on others
_KEPT: Final = 8 << 20  # bytes of a thread's memory for copies, at most, that are kept for the next call

_room = threading.local()


class PagesOut(NamedTuple):
    """Attention of some requests to some of their pages."""

    requests: slice | Numbers
    out: Tensor
    lse: Tensor


class SharedPages(NamedTuple):
    """Pages first to stop of some requests, which are the same in the pool for all of them."""

    requests: Numbers
    first: int
    stop: int


class PagedRows(NamedTuple):
    """Equally few rows of several requests.

    Attributes:
        bits: (requests, heads or 1, q_len, pages * page_size), what they see.
        seen: (requests, pages), of which pages some row sees a column.
        ids: (requests, pages), where these are in the pool; of pages that no row sees, anything.
        q: (requests, Hq, q_len, D).
        k_pages: the pool of keys.
        v_pages: that of values; both hold numbers of q's dtype, or of 8 bits.
        scale: factor of the scores.
        scored: the score function on all pairs, those of the bits; or None.
    """

    bits: BoolArray
    seen: BoolArray
    ids: Numbers
    q: Tensor
    k_pages: Pool
    v_pages: Pool
    scale: float
    scored: ScoredPairs | None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k_pages.page_size

    @property
    def adjacent(self) -> bool:
        """Whether pages that follow one another in the pool are one tensor of tokens."""
        return self.k_pages.adjacent and self.v_pages.adjacent

    @property
    def in_8_bits(self) -> bool:
        """Whether pages are in 8 bits; then copies of them have q's dtype."""
        return self.k_pages.scales is not None

    @property
    def page_bytes(self) -> int:
        """Of the keys of a page, as they are attended."""
        dtype = self.k_pages.held_in(self.q.dtype)
        return self.page_size * math.prod(self.k_pages.pages.shape[2:]) * dtype.itemsize

    def cut(self) -> PagedRows:
        """The same with large pages cut into parts that are pages of their own."""
        k_pages = self.k_pages.cut()
        parts, size = k_pages.parts, k_pages.page_size
        if parts == 1:
            return self
        count = self.ids.shape[1]
        ids = (self.ids[:, :, None] * parts + np.arange(parts)).reshape(len(self.ids), -1)
        slots = k_pages.starts[:, None] + np.arange(size)
        columns = (np.arange(count)[:, None, None] * self.page_size + slots).reshape(-1)
        bits: BoolArray = self.bits[..., columns]
        by_part = bits.reshape(*bits.shape[:3], count, parts, size)
        by_part[..., -1, : parts * size - self.page_size] = False  # which are the part's before
        seen: BoolArray = np.logical_or.reduce(by_part, axis=(1, 2, 5)).reshape(len(ids), -1)
        scored = None if self.scored is None else self.scored.columns(columns)
        return self._replace(bits=bits, seen=seen, ids=ids, k_pages=k_pages, v_pages=self.v_pages.cut(), scored=scored)


def forward(step: PagedRows, sinks: Tensor | None, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Attention of equally few rows of several requests.

    Args:
        step: the rows and their pages.
        sinks: (Hq,), or None.
        apart: compute each request as if it were alone, so that its bits don't depend on others.

    Returns:
        out (requests, Hq, q_len, Dv) in q's dtype, and lse (requests, Hq, q_len).
    """
    dtype = step.q.dtype
    if step.in_8_bits:  # each number of a copy is rounded once, and the result, as in float32
        step = step._replace(q=step.q.to(torch.promote_types(dtype, torch.float32))).cut()
    seen = step.seen.copy()
    shares = [] if apart else shared(seen, step.ids, max(1, _SHARED // step.page_bytes))
    if shares and step.q.dtype.itemsize == 2:  # parts are rounded once, after they are merged
        step = step._replace(q=step.q.float())
    for share in shares:
        seen[share.requests, share.first : share.stop] = False
    alike = None if apart or step.in_8_bits else _in_place(step, seen)
    least = -(-_IN_PLACE // step.page_bytes)
    if alike is None and seen.shape[1] >= least and step.adjacent:
        runs = _runs(seen, step.ids, least, whole=step.q.dtype.itemsize == 2)
        shares += [SharedPages(np.array([request]), first, stop) for request, first, stop in runs]
        for request, first, stop in runs:
            seen[request, first:stop] = False
    parts = [part for share in shares for part in _of_share(step, share)]
    parts += [alike] if alike is not None else _copied(step, seen, apart=apart)
    out, lse = _joined(step, parts)
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out.to(dtype), lse


def shared(seen: BoolArray, ids: Numbers, least: int) -> list[SharedPages]:
    """Pages that several requests begin with, where computing them once saves reading at least so many.

    Args:
        seen: (requests, pages), of which pages some row sees a column.
        ids: (requests, pages), where these are in the pool.
        least: pages.
    """
    found = list[SharedPages]()
    if len(set(ids[np.arange(len(seen)), seen.argmax(1)].tolist())) == len(seen):  # of the first that each sees
        return found
    alike = np.where(seen, ids, -1)
    groups = [(np.arange(len(seen)), 0)]
    while groups:
        requests, first = groups.pop()
        own = alike[requests]
        same = (own == own[0]).all(0)
        stop = first + int(np.argmin(np.append(same[first:], False)))
        if (len(requests) - 1) * int(seen[requests[0], first:stop].sum()) >= least:
            found.append(SharedPages(requests, first, stop))
        if stop < own.shape[1]:
            names, of = np.unique(own[:, stop], return_inverse=True)
            several = [n for n in range(len(names)) if np.count_nonzero(of == n) > 1] if len(names) < len(own) else []
            groups += [(requests[of == n], stop) for n in several]
    return found


def _runs(seen: BoolArray, ids: Numbers, least: int, *, whole: bool) -> list[tuple[int, int, int]]:
    """Runs of pages that are seen and lie one after the other: request, first, stop.

    Args:
        seen: (requests, pages), of which pages some row sees a column.
        ids: (requests, pages), where these are in the pool.
        least: pages of a run.
        whole: a run is all that its request sees.
    """
    follows = np.zeros((len(seen), seen.shape[1] + 1), bool)
    follows[:, 1:-1] = seen[:, 1:] & seen[:, :-1] & (np.diff(ids) == 1)
    request, first = np.nonzero(seen & ~follows[:, :-1])
    ends = np.nonzero(seen & ~follows[:, 1:])[1] + 1
    long = ends - first >= least
    if whole:  # a kernel of 16 bits rounds what it returns: once, not once for each part
        long &= ends - first == seen.sum(1)[request]
    found = zip(request[long].tolist(), first[long].tolist(), ends[long].tolist(), strict=True)
    return list(found)


def _of_share(step: PagedRows, share: SharedPages) -> Iterator[PagesOut]:
    """Attention to pages of one request, or to those that several share: their rows are rows of one request."""
    requests, (heads, q_len, _), page_size = span(share.requests), step.q.shape[1:], step.page_size
    rows, of_pages = len(share.requests) * q_len, step.ids[share.requests[0]]
    q = step.q[requests].transpose(0, 1).reshape(1, heads, rows, -1)
    for pages in _pieces(step, share):
        columns = span((pages[:, None] * page_size + np.arange(page_size)).reshape(-1))
        bits = step.bits[requests][..., columns]
        bits = bits.transpose(1, 0, 2, 3).reshape(1, bits.shape[1], rows, -1)
        k, v = _keys(step, of_pages[pages])
        units = few.units_of(bits, 1, heads, k.shape[1])
        scored = None if step.scored is None else _stacked(step.scored, requests).columns(columns)
        out, lse = few.forward(units, q, k, v, step.scale, None, scored)
        out, lse = (x.unflatten(2, (-1, q_len))[0].transpose(0, 1) for x in (out, lse))
        yield PagesOut(requests, out, lse)


def _pieces(step: PagedRows, share: SharedPages) -> list[Numbers]:
    """The seen pages of a share, as many at once as are read at once."""
    pages = share.first + np.flatnonzero(step.seen[share.requests[0], share.first : share.stop])
    if step.adjacent and (np.diff(step.ids[share.requests[0], pages]) == 1).all():
        return [pages]
    count = -(-len(pages) * step.page_bytes // _COPIED)
    return [x for x in np.array_split(pages, max(1, count)) if len(x)]


def _keys(step: PagedRows, ids: Numbers) -> tuple[Tensor, ...]:
    """K and V of pages, (1, Hkv, tokens, D): views where they are adjacent, else copies that hold until the next."""
    if step.adjacent and (np.diff(ids) == 1).all():
        found = [x.pages[int(ids[0]) : int(ids[-1]) + 1] for x in (step.k_pages, step.v_pages)]
    else:
        found = _Copies(step, len(ids)).of(ids)
    return tuple(x.flatten(0, 1).transpose(0, 1)[None] for x in found)


def _stacked(scored: ScoredPairs, requests: slice | Numbers) -> ScoredPairs:
    """The score of several requests' rows as those of one."""
    b, q = scored.b[requests], scored.q[requests]
    b = b.expand(-1, -1, q.shape[2], -1)
    b, q = (x.reshape(1, 1, -1, 1) for x in (b, q))
    return replace(scored, b=b, q=q)


def _copied(step: PagedRows, seen: BoolArray, *, apart: bool) -> list[PagesOut]:
    """Attention to these pages, some at a time."""
    counts = seen.sum(1)
    most = int(counts.max(initial=0))
    if not most:
        return []
    chosen, bits, columns = _compact(step, seen, counts)
    parts: list[PagesOut] = []
    at_once, together = _at_once(step, len(seen), most, apart=apart)
    copies = _Copies(step, min(at_once, most) * min(together, len(seen)))
    for first in range(0, most, at_once):
        rows = np.flatnonzero(counts > first)
        for some in np.split(rows, range(together, len(rows), together)) if together < len(rows) else [rows]:
            end, picked = min(first + at_once, int(counts[some].max())), span(some)
            k, v = (
                x.view(len(some), -1, *x.shape[2:]).transpose(1, 2)
                for x in copies.of(chosen[picked, first:end].reshape(-1))
            )
            tokens, scored = slice(first * step.page_size, end * step.page_size), step.scored
            if scored is not None:
                kv = scored.kv.flatten()[torch.from_numpy(columns[picked, tokens])][:, None, None]
                scored = replace(scored, b=scored.b[picked], q=scored.q[picked], kv=kv)
            visible = bits[picked, :, :, tokens]
            parts.append(PagesOut(picked, *_attend(visible, step.q[picked], k, v, step.scale, scored)))
    return parts


def _in_place(step: PagedRows, seen: BoolArray) -> PagesOut | None:
    """Attention to these pages, where all requests' lie in the pool as in one contiguous cache; else None."""
    pages = _alike(seen)
    if pages is None or not (step.adjacent or pages.stop - pages.start == 1):
        return None
    ids, size = step.ids[:, pages], step.page_size
    (group, count), starts = ids.shape, ids[:, 0]
    stride = int(starts[1] - starts[0]) if group > 1 else count
    if stride <= 0 or (ids != starts[0] + stride * np.arange(group)[:, None] + np.arange(count)).any():
        return None
    bits = step.bits[..., pages.start * size : pages.stop * size]
    some = _between(bits)
    bits = bits[..., some]
    if not bits.any((1, 2)).all():  # what no row of its request sees may hold anything
        return None
    of = slice(int(starts[0]), int(starts[-1]) + count)
    k, v = (_like_a_cache(x.pages[of], stride, count)[:, :, some] for x in (step.k_pages, step.v_pages))
    first = pages.start * size
    scored = None if step.scored is None else step.scored.columns(slice(first + some.start, first + some.stop))
    hidden = None if bits.all() else torch.from_numpy(~bits)
    return PagesOut(slice(0, group), *few.seen(step.q, k, v, hidden, step.scale, scored))


def _like_a_cache(pages: Tensor, stride: int, count: int) -> Tensor:
    """Pages (P, page_size, H, D) as (requests, H, count * page_size, D); a request begins a stride after the last."""
    by_request = pages.unfold(0, count, stride)  # (requests, page_size, H, D, count)
    return by_request.permute(0, 2, 4, 1, 3).flatten(2, 3)


def _alike(seen: BoolArray) -> slice | None:
    """The pages that are seen, where they are the same for all requests and have no gap; else None."""
    first, count = int(seen[0].argmax()), int(seen[0].sum())
    pages = slice(first, first + count)
    return pages if count and (seen.sum(1) == count).all() and seen[:, pages].all() else None


def _between(visible: BoolArray) -> slice:
    """From the first column that some row sees to the last."""
    columns: BoolArray = np.logical_or.reduce(visible, axis=(0, 1, 2))
    return slice(int(columns.argmax()), len(columns) - int(columns[::-1].argmax()))


def _compact(step: PagedRows, seen: BoolArray, counts: Numbers) -> tuple[Numbers, BoolArray, Numbers]:
    """The seen pages of each request, side by side: which, (requests, most), what is seen of them, their columns."""
    group, page_size, most, pages = len(seen), step.page_size, int(counts.max()), _alike(seen)
    if pages is not None:
        tokens = slice(pages.start * page_size, pages.stop * page_size)
        columns = np.tile(np.arange(tokens.start, tokens.stop), (group, 1))
        return step.ids[:, pages], step.bits[..., tokens], columns
    order = np.argsort(~seen, axis=1, kind="stable")[:, :most]  # those that are seen, ascending; then any
    columns = (order[:, :, None] * page_size + np.arange(page_size)).reshape(group, -1)
    used = np.arange(most) < counts[:, None]
    bits: BoolArray = np.take_along_axis(step.bits, columns[:, None, None], 3)
    bits &= used.repeat(page_size, 1)[:, None, None]
    return np.where(used, np.take_along_axis(step.ids, order, 1), 0), bits, columns


def _at_once(step: PagedRows, group: int, most: int, *, apart: bool) -> tuple[int, int]:
    """How many pages of each request are copied at once, and of how many requests."""
    if step.q.dtype.itemsize == 2:  # a kernel of 16 bits rounds what it returns: once, so all pages of fewer requests
        return most, 1 if apart else max(1, _COPIED // (most * step.page_bytes))
    if apart:
        return max(1, _ALONE // step.page_size), 1
    least = -(-_SHORT // step.page_size)
    parts = max(1, round(most / max(least, _COPIED / (group * step.page_bytes))))
    pages = -(-most // parts)
    return pages, max(1, round(_COPIED / (pages * step.page_bytes)))


def _attend(
    visible: BoolArray, q: Tensor, k: Tensor, v: Tensor, scale: float, scored: ScoredPairs | None
) -> tuple[Tensor, Tensor]:
    """Attention to copied keys; those that no row sees may hold anything: they are left out at the ends, or zeroed."""
    if visible.all():
        return few.seen(q, k, v, None, scale, scored)
    some = _between(visible)
    visible, k, v = visible[..., some], k[:, :, some], v[:, :, some]
    scored = None if scored is None else scored.columns(some)
    if visible.all():
        return few.seen(q, k, v, None, scale, scored)
    nobody = np.nonzero(~visible.any((1, 2)))
    if len(nobody[0]):
        at = [torch.from_numpy(x) for x in nobody]
        for x in (k, v):
            x.transpose(1, 2)[at[0], at[1]] = 0.0
    return few.seen(q, k, v, torch.from_numpy(~visible), scale, scored)


def _joined(step: PagedRows, parts: list[PagesOut]) -> tuple[Tensor, Tensor]:
    """The parts of each request merged, one after the other, whatever parts others have."""
    if len(parts) == 1 and len(parts[0].out) == len(step.q):
        return parts[0].out.contiguous(), parts[0].lse.contiguous()
    total = torch.float64 if step.q.dtype == torch.float64 else torch.float32
    out = step.q.new_zeros(*step.q.shape[:3], step.v_pages.pages.shape[3], dtype=total)
    lse = step.q.new_full(out.shape[:-1], -torch.inf, dtype=total)
    begun = np.zeros(len(step.q), bool)
    for requests, part, part_lse in parts:
        if not begun[requests].any():
            out[requests], lse[requests] = part.to(total), part_lse
            begun[requests] = True
            continue
        of_part, of_part_lse = out[requests], lse[requests]
        merge_some(of_part, of_part_lse, part.to(total), part_lse)
        if not isinstance(requests, slice):  # then these are copies
            out[requests], lse[requests] = of_part, of_part_lse
    return out, lse


class _Copies:
    """Memory for copies of so many pages of k and v at most, which this thread's next copies take again."""

    def __init__(self, step: PagedRows, pages: int) -> None:
        dtype, self.pools = step.k_pages.held_in(step.q.dtype), (step.k_pages, step.v_pages)
        shapes = [(pages, pool.page_size, *pool.pages.shape[2:]) for pool in self.pools]
        counts = [math.prod(shape) for shape in shapes]
        sizes = [*(n * dtype.itemsize for n in counts), 3 * max(counts) if step.in_8_bits else 0]
        *rooms, self.between = _memory(sum(sizes)).split(sizes)
        self.rooms = [room.view(dtype).view(shape) for room, shape in zip(rooms, shapes, strict=True)]

    def of(self, ids: Numbers) -> list[Tensor]:
        """These pages, (n, page_size, H, D) each of k and v."""
        n = len(ids)
        return [pool.copy(ids, room[:n], self.between) for pool, room in zip(self.pools, self.rooms, strict=True)]


def _memory(size: int) -> Tensor:
    """So many bytes: new memory costs several times what copying into it does."""
    held: Tensor | None = getattr(_room, "held", None)
    if held is None or held.numel() < size:
        with modes.off():
            held = torch.empty(size, dtype=torch.uint8)
        if size <= _KEPT:
            _room.held = held
    return held[:size]
