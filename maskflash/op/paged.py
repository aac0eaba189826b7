"""Queries of requests whose keys lie in pages -> attention of each request, under a mask in its own places.

    request    length    queries    their places            b is the request; q and kv count inside it: the queries are
    0          6         1          5                       its last tokens
    1          9         4          5 6 7 8

First the mask says which columns each request's queries see, and the pages that hold them are checked; then those
pages are read. On the CPU few rows evaluate their mask then and there, as in contiguous calls: `backends/cpu/paged.py`.
On a GPU their kernel follows the table itself, and the host reads nothing: `backends/triton/few.py`. All others are
calls of their own, with k and v gathered out of the pages that some row sees.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.cpu import few, paged
from maskflash.backends.cpu.scored import ScoredPairs
from maskflash.errors import ArgumentError, BackendError
from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import aside
from maskflash.ground import arguments, qkv
from maskflash.ground.pool import Pool
from maskflash.ground.stretch import BoolArray, Numbers, Stretch, span
from maskflash.ground.transfer import capturing
from maskflash.masks.requests import REQUESTS, OfRequests
from maskflash.op import page_scales
from maskflash.op.asking import Asking, asks_for_dropout
from maskflash.op.few_rows import shown
from maskflash.op.page_scales import Scale
from maskflash.op.page_table import Layout, PageTable
from maskflash.op.spec import Spec
from maskflash.scores.requests import ScoreOfRequests

_OPERATION: Final = "paged"
_DROPOUT: Final = (("dropout_p", 0), ("generator", None), ("seed", None))


class _Sequences(NamedTuple):
    """All requests of a call.

    Attributes:
        counts: (R,), queries of each.
        lengths: (R,), keys of each.
        page_size: tokens of a page.
    """

    counts: Numbers
    lengths: Numbers
    page_size: int

    @property
    def ends(self) -> Numbers:
        """Where the queries of each end, where they are packed."""
        return self.counts.cumsum()


class _Share(NamedTuple):
    """What is attended of one request by a call of its own.

    Attributes:
        request: which.
        rows: its queries among all, where they are packed.
        q_offset: the place of its first query.
        stretch: the columns that its queries see.
    """

    request: int
    rows: slice
    q_offset: int
    stretch: Stretch


class _FewOf(NamedTuple):
    """What is attended of requests that have equally few queries.

    Attributes:
        requests: (n,), which.
        rows: (n, q_len), their queries among all, where they are packed.
        bits: (n, heads or 1, q_len, pages * page_size), what each sees.
        seen: (n, pages), of which pages some of its queries see a column.
        scored: the score function on these pairs, or None.
    """

    requests: Numbers
    rows: Numbers
    bits: BoolArray
    seen: BoolArray
    scored: ScoredPairs | None


class Paged(Asking):
    """What an attention op does with caches in pages."""

    _of_requests: Any = None  # the same op, of some of the requests

    def paged(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        pages: PageTable,
        *,
        cu_seqlens_q: Tensor | None = None,
        layout: Layout = "NHD",
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        **mask_args: Any,
    ) -> Any:
        """Attend to keys and values that lie in pages: steps of decoding, chunks of prefill, and both in one call.

        The mask counts inside each request: b is the request, kv its token, and its queries are its last tokens,
        q = length - queries + i. Pages that no query sees are not read. Neither they, nor slots that no query sees,
        need hold anything; their entries in the table may be anything, too.

        On a GPU few rows are attended without the host's reading lengths, cu_seqlens_q or the table. What would be an
        error in their numbers makes the rows in question NaN, unless the op was compiled with check=True.

        Args:
            q: (R, Hq, Sq, D), Sq queries of each request; with cu_seqlens_q (T, Hq, D), those of all, end to end.
            k_pages: (P, page_size, Hkv, D), the pool of pages; with layout "HND" (P, Hkv, page_size, D). Any strides.
                In q's dtype, or in float8_e4m3fn.
            v_pages: (P, page_size, Hkv, Dv), or (P, Hkv, page_size, Dv); in 8 bits if k_pages is.
            pages: which pages each request has, and its length, which counts the new tokens among them.
            cu_seqlens_q: (R + 1,) integers: 0, where each next request's queries begin in q, and T.
            layout: of the pool, "NHD" or "HND", as FlashInfer calls them.
            k_scale: what the numbers of a pool in 8 bits are multiplied by: a number, or float32 (Hkv,), one for each
                head, or (P, page_size, Hkv), one for each token and head, in the pool's layout. Positive, and at most
                7.6e35; those of slots that no query sees may be anything.
            v_scale: likewise.
            sinks: as in a call.
            return_lse: also return the log-sum-exp.
            **mask_args: the mask's own arguments, and the score function's; tables by b have a row for each request.

        Returns:
            out: (R, Hq, Sq, Dv) or (T, Hq, Dv), in q's dtype.
            lse: if asked for, (R, Hq, Sq) or (Hq, T).

        Raises:
            ArgumentError: shapes, devices or numbers that don't fit: a length that the table can't hold, more queries
                than a request has tokens, a page that is used and that the pool doesn't have. Dropout, and tensors that
                ask for a gradient.
            ArgumentTypeError: types or dtypes that don't fit.
            BackendError: the GPU has no numbers of float8_e4m3fn, and the pools hold such.
            MaskIndexError: as in a call.

        Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023.

        Example:
            >>> import maskflash as mf
            >>> attn = mf.compile(mf.sliding_window(256))
            >>> pages = mf.PageTable(torch.tensor([[7, 2, -1], [7, 0, 5]]), torch.tensor([6, 9]), page_size=4)
            >>> k_pages, v_pages = torch.randn(2, 8, 4, 2, 64).unbind()
            >>> attn.paged(torch.randn(2, 8, 1, 64), k_pages, v_pages, pages).shape
            torch.Size([2, 8, 1, 64])
        """
        arguments.instance(_OPERATION, "pages", pages, PageTable, "mf.PageTable(block_table, lengths, page_size)")
        return_lse = arguments.flag(_OPERATION, "return_lse", return_lse)
        views = pages.pool(_OPERATION, "k_pages", k_pages, layout), pages.pool(_OPERATION, "v_pages", v_pages, layout)
        scales = k_scale, v_scale
        pools = page_scales.pools_of(_OPERATION, views, scales, layout)
        pages.check_shapes(_OPERATION)
        pages.check_tokens(_OPERATION, "q", q, cu_seqlens_q)
        as_batch = q if cu_seqlens_q is None else q.transpose(0, 1)[None]
        _check_fit(as_batch, *pools)
        _refuse_dropout(mask_args)
        if self.precision == "fp8":
            raise BackendError(
                f'{_OPERATION}: precision is "fp8": few rows over many keys gain nothing '
                "from products in 8 bits; compile another op without it"
            )
        if sinks is not None:
            qkv.check_sinks(sinks, as_batch, _OPERATION)
        _refuse_gradients([("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("sinks", sinks)])
        if pools[0].scales is not None:
            self._refuse_8_bits(q.device)
        watched = torch.is_grad_enabled()
        found = self._on_device(as_batch, pools, pages, cu_seqlens_q, sinks, mask_args)
        with torch.no_grad():
            if found is not None:
                return found if return_lse else found[0]
            for item in zip("kv", scales, strict=True):
                page_scales.check_shared(_OPERATION, *item)
            lengths = pages.lengths_now(_OPERATION)
            counts = pages.counts_of(_OPERATION, "q", q, cu_seqlens_q, lengths)
            offsets = torch.from_numpy(lengths - counts).to(q.device)
            longest = int(counts.max(initial=0)), int(lengths.max(initial=0))
            sizes = Sizes(*longest, len(lengths), as_batch.shape[1], q.device, offsets, operation=_OPERATION)
            spec = self._spec(sizes, as_batch, sinks, mask_args, check=self.check)
            if watched and any(table.requires_grad for table in spec.score_tables):
                _refuse_gradient("a table of the score function")
            problem = spec.problem(sizes)
            sequences = _Sequences(counts, lengths, pages.page_size)
            steps, others = _apart(spec, problem, sequences)
            of_few = [_evaluated(spec, problem, sequences, requests) for requests in steps]
            alone = [self._share(problem, sequences, request, mask_args) for request in others]
            ids = _ids(pages, views[0].shape[0], of_few, alone)
            _check_scales(pools, scales, of_few, alone, ids)
            out, lse = self._attend_pages(spec, q, pools, of_few, alone, ids, cu_seqlens_q is not None, mask_args)
        return (out, lse) if return_lse else out

    def _on_device(
        self,
        q: Tensor,
        pools: tuple[Pool, Pool],
        pages: PageTable,
        starts: Tensor | None,
        sinks: Tensor | None,
        mask_args: dict[str, Any],
    ) -> tuple[Tensor, Tensor] | None:
        """Out and lse by the kernel that reads lengths and tables itself; None where it does not serve the call."""
        requests, (_, heads, tokens, _) = pages.lengths.shape[0], q.shape
        if self.check or self._backend_for(q.device) != "triton" or not requests:
            return None
        from maskflash.backends.triton import run as triton

        k_pages, v_pages = (pool.pages.transpose(1, 2) for pool in pools)
        each, room = tokens if starts is None else -(-tokens // requests), pages.block_table.shape[1] * pages.page_size
        if not (triton.few.are_few(each, room) and triton.few.can_read(k_pages, v_pages)):
            return None
        if starts is None:
            counts: int | Tensor = tokens
        else:
            starts = arguments.int_table(_OPERATION, "cu_seqlens", starts, (1,))
            if len(starts) != requests + 1 or starts.device != q.device:
                return None  # which says what is wrong
            counts = starts.diff()
        scales = [pool.scales.transpose(1, 2) for pool in pools if pool.scales is not None]
        where = triton.few.Pages(pages.block_table, pages.lengths, pages.page_size, starts, *scales)
        offsets = pages.lengths.long() - counts
        sizes = Sizes(each, room, requests, heads, q.device, offsets, operation=_OPERATION)
        spec = self._spec(sizes, q, sinks, mask_args)
        if torch.is_grad_enabled() and any(table.requires_grad for table in spec.score_tables):
            _refuse_gradient("a table of the score function")
        problem = spec.problem(sizes)
        if not shown(spec, problem, paged=True):
            return None
        tuning, splits = self.tune and not capturing(q.device), spec.splits or None
        given = problem, q, k_pages, v_pages, spec.strength
        out, lse = triton.few.forward(*given, splits=splits, pages=where, tuning=tuning)
        lse = lse * math.log(2)
        return (out, lse) if starts is None else (out[0].transpose(0, 1).contiguous(), lse[0])

    def _share(self, problem: Problem, sequences: _Sequences, request: int, mask_args: dict[str, Any]) -> _Share:
        """A request and what its queries see."""
        from maskflash.forms.row_intervals import find_row_intervals

        count, length = int(sequences.counts[request]), int(sequences.lengths[request])
        attn, on = self._for_requests(), problem.device
        sizes = Sizes(count, length, 1, problem.heads, on, length - count, operation=_OPERATION)
        found = find_row_intervals(attn._problem(sizes, _of_request(mask_args, request, on)).on_host())
        starts, stops = (np.bincount(x.numpy(), minlength=length + 1) for x in (found.start, found.stop))
        seen = (starts - stops)[:length].cumsum() > 0
        end = int(sequences.ends[request])
        return _Share(request, slice(end - count, end), length - count, Stretch.of(seen, sequences.page_size))

    def _attend_pages(
        self,
        spec: Spec,
        q: Tensor,
        pools: tuple[Pool, Pool],
        of_few: list[_FewOf],
        alone: list[_Share],
        ids: list[Numbers],
        packed: bool,
        mask_args: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Out and lse in q's form; `ids` are the pages in the pool, of the few ones first."""
        k_pages, v_pages = pools

        def of(part: _FewOf, pages: Numbers, rows: Tensor) -> tuple[Tensor, Tensor]:
            step = paged.PagedRows(part.bits, part.seen, pages, rows, k_pages, v_pages, spec.scale, part.scored)
            return paged.forward(step, spec.sinks, apart=spec.splits > 0)

        if not packed and len(of_few) == 1 and len(of_few[0].requests) == q.shape[0]:
            return of(of_few[0], ids[0], q)
        total = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty(*q.shape[:-1], v_pages.pages.shape[3])
        lse = torch.empty(q.shape[1::-1] if packed else q.shape[:3], dtype=total, device=q.device)
        for part, pages in zip(of_few, ids, strict=False):
            at = part.rows if packed else span(part.requests)
            if packed:
                found = of(part, pages, q[at].transpose(1, 2))
                out[at], lse[:, at] = found[0].transpose(1, 2), found[1].transpose(0, 1)
            else:
                out[at], lse[at] = of(part, pages, q[at])
        for each, pages in zip(alone, ids[len(of_few) :], strict=True):
            rows = q[each.rows].transpose(0, 1)[None] if packed else q[each.request][None]
            k, v = (pool.stretch(each.stretch, pages, q.dtype) for pool in pools)
            offsets = {"q_offset": each.q_offset, "kv_offset": each.stretch.start}
            given = _of_request(mask_args, each.request, q.device)
            found = self._for_requests()(rows, k, v, **offsets, sinks=spec.sinks, return_lse=True, **given)
            if packed:
                out[each.rows], lse[:, each.rows] = found[0][0].transpose(0, 1), found[1][0]
            else:
                out[each.request], lse[each.request] = found[0][0], found[1][0]
        return out, lse

    def _refuse_8_bits(self, device: torch.device) -> None:
        """An error where kernels can't read float8_e4m3fn."""
        if self._backend_for(device) == "triton":
            from maskflash.backends.triton import run as triton

            problem = triton.without_8_bits(device)
            if problem is not None:
                raise BackendError(f"{_OPERATION}: the triton backend can't read pools in 8 bits here: {problem}")

    @aside
    def _for_requests(self) -> Any:
        """The op of some of the requests; its mask's traces are kept with the mask."""
        if self._of_requests is None:
            mask = self.given.twin(OfRequests)
            score = None if self.score is None else self.score.twin(ScoreOfRequests)
            self._of_requests = self._as_asked(mask, score)  # type: ignore[arg-type]
        return self._of_requests


def _apart(spec: Spec, problem: Problem, sequences: _Sequences) -> tuple[list[Numbers], list[int]]:
    """Requests whose few queries are evaluated together, and those that are calls of their own."""
    lengths, heads = sequences.lengths.tolist(), problem.heads if spec.score else problem.shape[1]
    steps, alone = dict[int, list[list[int]]](), list[int]()
    if len(lengths) and spec.backend == "cpu" and (sequences.counts == sequences.counts[0]).all():
        count = int(sequences.counts[0])
        if few.are_few(len(lengths), heads, count, max(lengths)) and few.are_few(1, heads, count, min(lengths)):
            return [np.arange(len(lengths))], alone
    for request, count in enumerate(sequences.counts.tolist()):
        if spec.backend != "cpu" or not few.are_few(1, heads, count, lengths[request]):
            alone += [request] if count else []
            continue
        groups = steps.setdefault(count, [[]])
        longest = max(lengths[r] for r in (*groups[-1], request))
        if not few.are_few(len(groups[-1]) + 1, heads, count, longest):
            groups.append([])
        groups[-1].append(request)
    return [np.array(group) for groups in steps.values() for group in groups], alone


def _evaluated(spec: Spec, problem: Problem, sequences: _Sequences, requests: Numbers) -> _FewOf:
    """What some requests' queries see, of which each has equally many."""
    counts, lengths, heads = sequences.counts[requests], sequences.lengths[requests], problem.shape[1]
    count, page_size, score = int(counts[0]), sequences.page_size, spec.strength.score
    tokens = -(-int(lengths.max()) // page_size) * page_size
    b, last = (torch.from_numpy(x).view(-1, 1, 1, 1) for x in (requests, lengths - 1))
    h, q, kv = few.along(1, heads), few.along(2, count), few.along(3, tokens)
    # The mask is not asked beyond a request's length, where its tables may end: its last token stands for all there.
    inside = kv <= last
    visible = problem.visible(b, h, q, torch.minimum(kv, last)) & inside
    bits: BoolArray = visible.expand(len(requests), heads, count, tokens).numpy()
    by_page: BoolArray = bits.reshape(len(requests), heads * count, -1, page_size)
    seen: BoolArray = np.logical_or.reduce(by_page, axis=(1, 3))
    rows = (sequences.ends[requests] - count)[:, None] + np.arange(count)
    scored = None if score is None else ScoredPairs(score, b, few.along(1, problem.heads), q + last + (1 - count), kv)
    if scored is not None:
        scored.check(visible)
    return _FewOf(requests, rows, bits, seen, scored)


def _ids(pages: PageTable, count: int, of_few: list[_FewOf], alone: list[_Share]) -> list[Numbers]:
    """The pages in the pool of all that is attended, (n, pages) of the few ones and then (pages,) of the others.

    Raises:
        ArgumentError: an entry that is used, and that the pool of so many pages doesn't have.
    """
    ids = [
        pages.ids(_OPERATION, part.requests[:, None], np.arange(part.seen.shape[1]), count, part.seen)
        for part in of_few
    ]
    return ids + [pages.ids(_OPERATION, np.array(each.request), each.stretch.pages, count) for each in alone]


def _of_request(mask_args: dict[str, Any], request: int, device: torch.device) -> dict[str, Any]:
    """The arguments of a call with one of the requests."""
    return {**mask_args, str(REQUESTS): torch.tensor([request], device=device)}


def _check_scales(
    pools: tuple[Pool, Pool],
    scales: tuple[Scale | None, Scale | None],
    of_few: list[_FewOf],
    alone: list[_Share],
    ids: list[Numbers],
) -> None:
    """Check the scales of tokens that are attended."""
    if not any(map(page_scales.of_tokens, scales)):
        return
    page_size, attended = pools[0].page_size, list[tuple[Numbers, BoolArray]]()
    for part, at in zip(of_few, ids, strict=False):
        tokens: BoolArray = np.logical_or.reduce(part.bits, axis=(1, 2)).reshape(*at.shape, page_size)
        attended.append((at[part.seen], tokens[part.seen]))
    for each, at in zip(alone, ids[len(of_few) :], strict=True):
        seen = np.zeros((len(at), page_size), bool)
        columns = each.stretch.columns
        seen[np.searchsorted(each.stretch.pages, columns // page_size), columns % page_size] = True
        attended.append((at, seen))
    for name, pool, scale in zip("kv", pools, scales, strict=True):
        for at, seen in attended:
            page_scales.check_seen(_OPERATION, name, pool, scale, at, seen)


def _check_fit(q: Tensor, k_pages: Pool, v_pages: Pool) -> None:
    """Check q (B, Hq, tokens, D) and the pools."""
    counts = k_pages.pages.shape[0], v_pages.pages.shape[0]
    if counts[0] != counts[1]:
        raise ArgumentError(f"{_OPERATION}: k_pages has {counts[0]} pages and v_pages {counts[1]}; expected the same")
    k, v = (
        pool.pages.new_empty(len(q), pool.pages.shape[2], 0, pool.pages.shape[3], dtype=pool.held_in(q.dtype))
        for pool in (k_pages, v_pages)
    )
    qkv.check(q, k, v, _OPERATION)


def _refuse_dropout(mask_args: dict[str, Any]) -> None:
    """An error for dropout; what says that there is none is taken out."""
    if asks_for_dropout(*(mask_args.pop(name, none) for name, none in _DROPOUT)):
        raise ArgumentError(
            f"{_OPERATION}: dropout is asked for, expected none: pages serve trained models; leave dropout_p, "
            "generator and seed out"
        )


def _refuse_gradients(given: list[tuple[str, Tensor | None]]) -> None:
    """An error for what asks for a gradient."""
    for name, x in given:
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            _refuse_gradient(name)


def _refuse_gradient(name: str) -> NoReturn:
    raise ArgumentError(
        f"{_OPERATION}: {name} asks for a gradient, expected none: there is no backward through pages; call it under "
        "torch.no_grad(), or train with contiguous k and v"
    )
