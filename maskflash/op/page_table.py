"""Requests whose keys lie in pages of a shared pool -> where each of their tokens is.

    page_size 4        block_table      lengths      the pool, P pages of 4 slots
    request 0          7  2  -1         6            its tokens 0 to 3 are page 7, tokens 4 and 5 begin page 2
    request 1          7  0   5         9            page 7 is shared: both begin with the same four tokens

Token t of request r is in slot t % page_size of page block_table[r, t // page_size]. What a table holds past a
request's last page, and what slots hold past its last token, is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments, modes
from maskflash.ground.overlaps import check_apart
from maskflash.ground.stretch import BoolArray, Numbers
from maskflash.op import page_scales
from maskflash.op.page_scales import Scale

Layout = Literal["NHD", "HND"]

LAYOUTS: Final = ("NHD", "HND")
_NONE: Final = -1  # in place of pages that there are not


@dataclass(slots=True, eq=False)
class PageTable:
    """Which pages hold the keys of each request, and how many keys it has.

    It holds the tensors that it is given: `pages.lengths += 1`, and what else is written to them, counts from the next
    call on. Keys count with the new ones among them: raise `lengths` first, then `append` the new tokens' keys and
    values, then attend.

    Attributes:
        block_table: (R, max_pages) int32 or int64, the pages of each request in the order of its tokens. Requests may
            share pages. Entries past a request's last page may be anything.
        lengths: (R,) integers, the keys of each request.
        page_size: tokens of a page.

    Raises:
        ArgumentTypeError: tables that hold no integers.
        ArgumentError: shapes or devices that don't fit.

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023.

    Example:
        >>> pages = PageTable(torch.tensor([[7, 2, -1], [7, 0, 5]]), torch.tensor([6, 9]), page_size=4)
        >>> [x.tolist() for x in pages.to_csr()]
        [[0, 2, 5], [7, 2, 7, 0, 5], [2, 1]]
    """

    block_table: Tensor
    lengths: Tensor
    page_size: int

    def __post_init__(self) -> None:
        self.block_table = arguments.int_table("PageTable", "block_table", self.block_table, (2,))
        self.lengths = arguments.int_table("PageTable", "lengths", self.lengths, (1,))
        self.page_size = arguments.length("PageTable", "page_size", self.page_size, low=1)
        self.check_shapes("PageTable")

    def __dir__(self) -> list[str]:
        """What users may use."""
        return ["append", "block_table", "from_csr", "lengths", "page_size", "to_csr"]

    def check_shapes(self, operation: str) -> None:
        """Check all but numbers, which may change; attributes may have been assigned to."""
        for name, x, dims in (("block_table", self.block_table, 2), ("lengths", self.lengths, 1)):
            arguments.instance(operation, name, x, Tensor, "as mf.PageTable takes it")
            arguments.held(operation, name, arguments.int_table(operation, name, x, (dims,)))
        if self.block_table.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError(
                f"{operation}: block_table has dtype {self.block_table.dtype}, expected int32 or int64"
            )
        requests, rows, device = self.lengths.shape[0], self.block_table.shape[0], self.block_table.device
        if requests != rows:
            raise ArgumentError(
                f"{operation}: lengths has {requests} requests and block_table {rows}; expected the same"
            )
        if self.lengths.device != device:
            raise ArgumentError(f"{operation}: lengths is on {self.lengths.device}, expected block_table's {device}")

    @staticmethod
    def from_csr(indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int) -> PageTable:
        """The table of FlashInfer's form: all requests' pages end to end. It is copied: writes to it are not seen.

        Args:
            indptr: (R + 1,) integers, where each request's pages begin in `indices`, and their number.
            indices: (n,) integers, the pages.
            last_page_len: (R,) integers, tokens in each request's last page, 1 to page_size; of a request without
                pages 0 or page_size.
            page_size: tokens of a page.

        Raises:
            ArgumentTypeError: what holds no integers.
            ArgumentError: indptr doesn't go from 0 to n without falling, or last_page_len doesn't fit.

        Example:
            >>> pages = PageTable.from_csr([0, 2, 2, 3], [7, 2, 5], [2, 0, 4], page_size=4)
            >>> pages.block_table.tolist(), pages.lengths.tolist()
            ([[7, 2], [-1, -1], [5, -1]], [6, 0, 4])
        """
        operation = "PageTable.from_csr"
        size = arguments.length(operation, "page_size", page_size, low=1)
        given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        tables = {name: arguments.int_table(operation, name, x, (1,)) for name, x in given.items()}
        starts, pages, last = (
            np.array(arguments.int_list(operation, *item, (1,)), np.int64) for item in tables.items()
        )
        if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] != len(pages):
            raise ArgumentError(
                f"{operation}: indptr is {_shown(starts)}, expected numbers that begin with 0, don't fall, and end "
                f"with the {len(pages)} of indices"
            )
        counts = np.diff(starts)
        if len(last) != len(counts):
            raise ArgumentError(
                f"{operation}: last_page_len has {len(last)} requests and indptr {len(counts)}; expected the same"
            )
        wrong = np.flatnonzero((last > size) | (last < (counts > 0)) | ((counts == 0) & (last != 0) & (last != size)))
        if len(wrong):
            r = int(wrong[0])
            expected = f"1 to {size}" if counts[r] else f"0 or {size}, having no pages"
            raise ArgumentError(f"{operation}: last_page_len is {last[r]} for request {r}, expected {expected}")
        lengths = np.where(counts > 0, (counts - 1) * size + last, 0)
        table = np.full((len(counts), int(counts.max(initial=0))), _NONE, np.int64)
        table[np.arange(table.shape[1]) < counts[:, None]] = pages
        with modes.off():
            device, dtype = tables["indices"].device, tables["indices"].dtype
            wide = torch.from_numpy(table).to(device, dtype if dtype == torch.int64 else torch.int32)
            return PageTable(wide, torch.from_numpy(lengths).to(device, torch.int32), size)

    def to_csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """FlashInfer's form: (indptr, indices, last_page_len), int32, on the table's device; see `from_csr`.

        Raises:
            ArgumentError: a length that its row of the table can't hold.
        """
        counts, last = self.counts("PageTable.to_csr"), self.read_lengths("PageTable.to_csr")
        last = np.where(last > 0, (last - 1) % self.page_size + 1, 0)
        starts = np.concatenate([[0], counts.cumsum()])
        with modes.off():
            device = self.block_table.device
            held = torch.arange(self.block_table.shape[1], device=device) < torch.from_numpy(counts).to(device)[:, None]
            numbers = (torch.from_numpy(x).to(device, torch.int32) for x in (starts, last))
            indptr, last_page_len = numbers
            return indptr, self.block_table[held].to(torch.int32), last_page_len

    def append(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        layout: Layout = "NHD",
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
    ) -> None:
        """Write the keys and values of each request's last tokens to their slots, in place.

        Pools of float8_e4m3fn get x / scale, rounded to the nearest of their numbers, and at most 448. Scales of tokens
        are found and written here: the largest magnitude of a token's vector over 448. What is not finite becomes NaN;
        so do numbers of float64 that are beyond float32's.

        Args:
            k_pages: the pool, (P, page_size, Hkv, D); with layout "HND" (P, Hkv, page_size, D). In k's dtype, or in
                float8_e4m3fn.
            v_pages: likewise, (P, page_size, Hkv, Dv).
            k: (R, Hkv, n, D), the last n tokens of each request; with cu_seqlens (T, Hkv, D), all requests end to end.
            v: (R, Hkv, n, Dv) or (T, Hkv, Dv).
            cu_seqlens: (R + 1,) integers: 0, where each next request's tokens begin in k, and T.
            layout: of the pool, and of scales of tokens.
            k_scale: with a pool of float8_e4m3fn what its numbers are to be multiplied by: a number, float32 (Hkv,), or
                float32 (P, page_size, Hkv) to be filled.
            v_scale: likewise.

        Raises:
            ArgumentError: shapes or scales that don't fit; pools and scales of tokens that share memory with one
                another, or within themselves; more tokens than a request has; a page that the pool doesn't have.
                Nothing is written then.
            ArgumentTypeError: types or dtypes that don't fit.

        Example:
            >>> pages = PageTable(torch.tensor([[3, 1]]), torch.tensor([5]), page_size=4)
            >>> k_pages, v_pages = torch.zeros(2, 4, 4, 1, 8).unbind()
            >>> pages.append(k_pages, v_pages, torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
            >>> k_pages[:, :, 0, 0].tolist()
            [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
        """
        operation = "PageTable.append"
        views = [self.pool(operation, *item, layout) for item in (("k_pages", k_pages), ("v_pages", v_pages))]
        scales = k_scale, v_scale
        pools = page_scales.pools_of(operation, views, scales, layout)
        for item in zip("kv", scales, strict=True):
            page_scales.check_shared(operation, *item)
        lengths = self.read_lengths(operation)
        self.check_tokens(operation, "k", k, cu_seqlens)
        counts = self.counts_of(operation, "k", k, cu_seqlens, lengths)
        tokens = [_packed(operation, *item, cu_seqlens) for item in (("k", k), ("v", v))]
        written = {f"{name}_pages": pool.pages for name, pool in zip("kv", pools, strict=True)}
        written |= {
            f"{name}_scale": pool.scales
            for name, pool, scale in zip("kv", pools, scales, strict=True)
            if pool.scales is not None and page_scales.of_tokens(scale)
        }
        check_apart(operation, written)
        total = int(counts.sum())
        for name, x, pool in zip(("k", "v"), tokens, pools, strict=True):
            wanted = total, *pool.pages.shape[2:]
            fits = x.dtype == pool.pages.dtype if pool.scales is None else x.dtype in arguments.DTYPES
            if tuple(x.shape) != wanted or not fits or x.device != pool.pages.device:
                dtype = pool.pages.dtype if pool.scales is None else "16, 32 or 64 bits, which are scaled here"
                raise ArgumentError(
                    f"{operation}: {name} holds {tuple(x.shape)} (tokens, heads, head_dim) of {x.dtype} on {x.device}, "
                    f"expected {wanted} of {dtype} on {pool.pages.device}, as {name}_pages"
                )
        requests = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(total) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(lengths - counts, counts)
        ids = self.ids(operation, requests, places // self.page_size, len(views[0]))
        with torch.no_grad():
            at = tuple(torch.from_numpy(x).to(views[0].device) for x in (ids, places % self.page_size))
            for x, pool, scale in zip(tokens, pools, scales, strict=True):
                pool.write(x, at, of_tokens=page_scales.of_tokens(scale))

    # What calls ask

    def read_lengths(self, operation: str) -> Numbers:
        """The lengths as they are now, on the host, with `check_shapes`.

        Raises:
            ArgumentError: one that is negative, or that the table has no room for.
        """
        self.check_shapes(operation)
        return self.lengths_now(operation)

    def lengths_now(self, operation: str) -> Numbers:
        """The same of a table whose shapes have been checked in this call."""
        lengths = _on_host(self.lengths)
        room = self.block_table.shape[1] * self.page_size
        wrong = (lengths < 0) | (lengths > room)
        if wrong.any():
            r = int(wrong.argmax())
            raise ArgumentError(
                f"{operation}: lengths is {lengths[r]} for request {r}, expected 0 to {room}, which "
                f"{self.block_table.shape[1]} pages of {self.page_size} tokens hold"
            )
        return lengths

    def counts(self, operation: str) -> Numbers:
        """How many pages each request has."""
        return -(-self.read_lengths(operation) // self.page_size)

    def check_tokens(self, operation: str, name: str, x: Any, starts: Any) -> None:
        """Check that x is (R, H, n, D), or (T, H, D) with starts.

        Raises:
            ArgumentTypeError: no tensor.
            ArgumentError: a shape that isn't one of these.
        """
        requests = self.block_table.shape[0]
        dims, form = (4, "(requests, heads, tokens, head_dim)") if starts is None else (3, "(tokens, heads, head_dim)")
        arguments.instance(operation, name, x, Tensor, f"{form}")
        arguments.held(operation, name, x)
        if x.ndim != dims or (starts is None and x.shape[0] != requests):
            fix = "; without cu_seqlens, " if starts is None else "; with cu_seqlens, "
            raise ArgumentError(
                f"{operation}: {name} has shape {tuple(x.shape)}{fix}expected {form} of {requests} requests"
            )

    def counts_of(self, operation: str, name: str, x: Any, starts: Any, lengths: Numbers) -> Numbers:
        """How many tokens of x, as `check_tokens` wants it, belong to each request: its last ones.

        Raises:
            ArgumentError: starts that don't fit; more tokens than a request has.
        """
        requests = len(lengths)
        if starts is None:
            counts = np.full(requests, x.shape[2], np.int64)
        else:
            ends = _on_host(arguments.int_table(operation, "cu_seqlens", starts, (1,)))
            if len(ends) != requests + 1 or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != x.shape[0]:
                raise ArgumentError(
                    f"{operation}: cu_seqlens is {_shown(ends)}, expected {requests + 1} numbers that begin with 0, "
                    f"don't fall, and end with the {x.shape[0]} tokens of {name}"
                )
            counts = np.diff(ends)
        wrong = counts > lengths
        if wrong.any():
            r = int(wrong.argmax())
            raise ArgumentError(
                f"{operation}: {name} has {counts[r]} tokens for request {r}, whose length is {lengths[r]}; expected "
                "at most its length, which counts the new tokens too: raise pages.lengths first"
            )
        return counts

    def pool(self, operation: str, name: str, x: Any, layout: Any) -> Tensor:
        """A pool of pages as (P, page_size, H, D), a view.

        Raises:
            ArgumentTypeError: no dense tensor.
            ArgumentError: pages of another size, or on another device than the table.
        """
        arguments.choice(operation, "layout", layout, LAYOUTS)
        arguments.instance(operation, name, x, Tensor, "the pool of pages")
        arguments.held(operation, name, x)
        axis, form = 1, "(pages, page_size, heads, head_dim)"
        if layout == "HND":
            axis, form = 2, "(pages, heads, page_size, head_dim)"
        if x.ndim != 4 or x.shape[axis] != self.page_size:
            raise ArgumentError(
                f"{operation}: {name} has shape {tuple(x.shape)}, expected {form} with pages of {self.page_size} "
                'tokens; layout="NHD" or "HND" says which way heads and tokens stand'
            )
        if x.device != self.block_table.device:
            raise ArgumentError(f"{operation}: {name} is on {x.device}, expected the table's {self.block_table.device}")
        pool: Tensor = x if layout == "NHD" else x.transpose(1, 2)
        return pool

    def ids(
        self, operation: str, requests: Numbers, logical: Numbers, pages: int, used: BoolArray | None = None
    ) -> Numbers:
        """The pages in the pool of requests' logical pages, arrays that broadcast; those that are not used, unchecked.

        Raises:
            ArgumentError: an entry that is used and that the pool doesn't have.
        """
        found: Numbers = _as_array(self.block_table)[requests, logical].astype(np.int64)
        wrong = (found < 0) | (found >= pages)
        if used is not None:
            wrong &= used
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            request, page = (np.broadcast_to(x, found.shape)[at] for x in (requests, logical))
            raise ArgumentError(
                f"{operation}: block_table is {found[at]} for page {page} of request {request}, which is used; "
                f"expected 0 to {pages - 1}, a page of the pool"
            )
        return found


def _packed(operation: str, name: str, x: Any, starts: Any) -> Tensor:
    """Tokens (T, H, D) of a tensor that has been checked, or is as the checked one."""
    arguments.instance(operation, name, x, Tensor, "as k is")
    arguments.held(operation, name, x)
    dims = 4 if starts is None else 3
    if x.ndim != dims:
        raise ArgumentError(f"{operation}: {name} has shape {tuple(x.shape)}, expected {dims} dimensions as k has")
    packed: Tensor = x.transpose(1, 2).flatten(0, 1) if starts is None else x
    return packed


def _on_host(x: Tensor) -> Numbers:
    return _as_array(x).astype(np.int64)


def _as_array(x: Tensor) -> Numbers:
    """The integers of a tensor, in its own dtype; on a CPU no copy."""
    if x.device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0:
        return x.detach().numpy()
    with modes.off():
        return x.detach().cpu().numpy()


def _shown(numbers: Numbers) -> str:
    few = ", ".join(map(str, numbers[:8]))
    return f"[{few}, ...]" if len(numbers) > 8 else f"[{few}]"
