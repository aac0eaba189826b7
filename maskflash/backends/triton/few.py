"""Few rows over many keys -> attention by programs that share the rows, each over a piece of the keys, without a plan.

    split       a program for each piece, key head and row tile: rows of all query heads of a group lie in one tile. It
                finds on the device which tiles of keys its rows may see, and takes its share of them
    combine     a program for each row, which joins what its pieces found; where rows have one piece there is none

How many pieces there are is decided by the call's sizes and the device's processors, or by the caller: never by what
tensors hold, so that a CUDA graph replays with others. Keys are contiguous, or lie in pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton.launch import NO_MASK, Launches, kernel, specialisation
from maskflash.backends.triton.layout import (
    UNIT,
    addressed,
    cut,
    fits,
    laid_out,
    mask_values,
    padded,
    score_values,
    whole,
)
from maskflash.backends.triton.plan import keep
from maskflash.backends.triton.score_kind import score_kind
from maskflash.backends.triton.signature import PassName, Specialisation
from maskflash.backends.triton.tiles import COMBINE, PARTS, Tile
from maskflash.expr.bounds import Reach, cannot_fault, largest
from maskflash.expr.ranges import Unread
from maskflash.scores.strength import BoundScore, Strength

_ROWS: Final = 64  # at most: with more, rows alone are work for all processors
_WIDE: Final = 16  # keys for each row, at least: else there is little to cut
_SHORTEST: Final = 256  # keys of a piece, at least: joining pieces costs time too
_REQUESTS: Final = 128  # that a program looks at together
_ANYWHERE: Final = (-(1 << 62), 1 << 62)  # what an offset that the host doesn't look at may move an index to
_LOG2E: Final = 1.4426950408889634


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Where the keys of each batch row lie, all of it on the device.

    Attributes:
        block_table: (B, max_pages) int32 or int64.
        lengths: (B,) integers, keys of each.
        page_size: tokens of a page.
        starts: (B + 1,) integers, where the queries of each begin among all, which are one batch row then; None where
            each has equally many.
        k_scales: of keys in 8 bits, (P, Hkv, page_size) float32, any strides; None where they are in q's dtype.
        v_scales: likewise of values.
    """

    block_table: Tensor
    lengths: Tensor
    page_size: int
    starts: Tensor | None = None
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def room(self) -> int:
        """Tokens that the table holds of a batch row."""
        return self.block_table.shape[1] * self.page_size


def are_few(q_len: int, kv_len: int) -> bool:
    """Whether rows are so few that programs share them, by pieces of the keys."""
    return 0 < q_len <= _ROWS and _WIDE * q_len <= kv_len


def can_read(k: Tensor, v: Tensor) -> bool:
    """Whether pools of pages (P, H, page_size, D) have any, and lie in memory as kernels address it, without a copy."""
    return len(k) > 0 and fits(k) and fits(v) and k.shape[3] % UNIT == v.shape[3] % UNIT == 0


def is_shown(problem: Problem, score: BoundScore | None, *, paged: bool = False) -> bool:
    """Whether sizes alone show that the mask and the score look up only what is there: kernels can't say otherwise."""
    extents = extents_of(problem, paged=paged)
    masks = cannot_fault(problem.expr, problem.inputs, extents)
    return masks and (score is None or cannot_fault(score.expr, score.inputs, extents))


def extents_of(problem: Problem, *, paged: bool = False) -> dict[str, Reach]:
    """For `b`, `h`, `q`, `kv` the first and the last index; of what an offset on the device moves, anything.

    Queries over pages are some of the tokens that there is room for: else the kernel makes them NaN.
    """
    ends = {name: (0, size - 1) for name, size in (("b", problem.batch), ("h", problem.heads))}
    for name, offset, length in (("q", problem.q_offset, problem.q_len), ("kv", problem.kv_offset, problem.kv_len)):
        ends[name] = _ANYWHERE if isinstance(offset, Tensor) else (offset, offset + length - 1)
    if paged:
        ends["q"] = ends["kv"]
    return ends


def special_of(
    problem: Problem,
    dim: int,
    v_dim: int,
    score: BoundScore | None,
    *,
    paged: bool = False,
    pages_in_8_bits: bool = False,
) -> Specialisation:
    """What the text of the kernel depends on: nothing that is in tensors."""
    extents = extents_of(problem, paged=paged)
    sizes = [size for table in problem.inputs.tables for size in table.shape]
    found = largest(problem.expr, problem.inputs, extents, Unread())
    narrow = found is not None and max(found, *sizes, 0) < 2**31
    kind = None if score is None else score_kind(score, extents)
    return specialisation(problem, False, narrow, dim, v_dim, kind, paged=paged, pages_in_8_bits=pages_in_8_bits)


def narrowed(tile: Tile, packed: int) -> Tile:
    """A tile with no more rows than hold those of a call."""
    return replace(tile, block_m=min(tile.block_m, max(16, 1 << (packed - 1).bit_length())))


def pieces_of(splits: int | None, lanes: int, keys: int, step: int, device: torch.device) -> int:
    """How many pieces each row tile's keys are cut into.

    Args:
        splits: as the caller wants; None for as many as the device has work for.
        lanes: row tiles of all key heads and batch rows.
        keys: of a row at most.
        step: keys that a program looks at together.
        device: whose processors there are.
    """
    if splits is None:
        return max(1, min(gpu.programs(device) // lanes, keys // _SHORTEST))
    return max(1, min(splits, -(-keys // step)))


def told(problem: Problem, heads_of_keys: int, splits: int | None) -> dict[str, int | str]:
    """How a call with so many rows is cut, if each head has keys of its own and tiles are the largest."""
    lanes = problem.batch * heads_of_keys
    return {"pieces of a row": pieces_of(splits, lanes, problem.kv_len, _SHORTEST, problem.device)}


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Strength,
    *,
    splits: int | None = None,
    pages: Pages | None = None,
    tuning: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of few rows: see `run.forward`. The host looks at no tensor's contents.

    Args:
        problem: the mask; with starts its q_len is how many queries a batch row has on average, rounded up. Where keys
            lie in pages its kv_len is how many the table has room for.
        q: (B, Hq, Sq, D); with starts (1, Hq, T, D), those of all batch rows end to end.
        k: (B, Hkv, Skv, D), or pools of pages (P, Hkv, page_size, D).
        v: (B, Hkv, Skv, Dv), or likewise.
        strength: how strongly pairs attend, without dropout.
        splits: pieces of the keys of each row; None for as many as the device has work for.
        pages: where the keys lie, if in pages.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq) float32, in base 2; with starts of batch 1. Rows whose
        length can't be, or that see a page which the pool doesn't have, or a scale that is no finite positive number,
        are NaN.
    """
    v_dim = v.shape[3]
    if pages is None:
        q, k, v = laid_out(q, k, v)
    else:
        (q,) = laid_out(q)
    out = q.new_empty((*q.shape[:3], whole(v_dim)))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sinks = None if strength.sinks is None else strength.sinks.float().contiguous()
    if out.numel():
        factor = {"qk_scale": strength.scale * _LOG2E} if strength.score is None else {"scale": strength.scale}
        launcher = SplitLauncher(problem, q, k, v, strength, tuning, splits, pages)
        launcher.run("split", {"out": out, "lse": lse, "sinks": sinks, **factor})
    return cut(out, v_dim), lse


@dataclass(slots=True, eq=False)
class SplitLauncher(Launches):
    """Launches the two kernels, for a tile that may be tried.

    Attributes:
        splits: pieces of each row; None for as many as the device has work for.
        pages: where the keys lie, if in pages.
    """

    splits: int | None = None
    pages: Pages | None = None
    _where: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        score, pages = self.strength.score, self.pages
        dims = self.q.shape[3], self.v.shape[3]
        in_8_bits = pages is not None and pages.k_scales is not None
        self.special = special_of(self.problem, *dims, score, paged=pages is not None, pages_in_8_bits=in_8_bits)
        self._of_strength = {} if score is None else score_values(score)
        if pages is None:
            self._where = {"kv_len": self.k.shape[2]}
            return
        table = pages.block_table if pages.block_table.stride(1) == 1 else pages.block_table.contiguous()
        self._where = {
            "block_table": table,
            "lengths": pages.lengths.contiguous(),
            "starts": table if pages.starts is None else pages.starts.contiguous(),
            "table_step": table.stride(0),
            "pages": len(self.k),
            "page_size": pages.page_size,
            "room": pages.room,
            "RAGGED": pages.starts is not None,
            "REQUESTS": _REQUESTS,
        }
        for name, scales in (("k_scales", pages.k_scales), ("v_scales", pages.v_scales)):
            if scales is not None:
                steps = zip("bhs", scales.stride(), strict=True)
                self._where |= {name: scales, **{f"{name}_{dimension}": step for dimension, step in steps}}

    def launch(self, pass_name: PassName, tile: Tile, own: dict[str, Any]) -> None:
        """Launch `split`, and `combine` where rows have several pieces.

        Args:
            pass_name: "split".
            tile: how it cuts its work.
            own: out and lse to be written, as `forward` makes them; sinks or None; and the factor of products.
        """
        (_, heads, head_rows, dim), (_, kv_heads, _, v_dim) = self.q.shape, self.v.shape
        batch, q_len, group = self.problem.batch, self.problem.q_len, heads // kv_heads
        ragged = self.pages is not None and self.pages.starts is not None
        tile = narrowed(tile, q_len * group)
        tiles = -(-q_len * group // tile.block_m)
        lanes = (batch + head_rows * group // tile.block_m if ragged else tiles * batch) * kv_heads
        pieces = pieces_of(self.splits, lanes, self.problem.kv_len, tile.block_n, self.q.device)
        own = dict(own)
        out, lse, sinks = (own.pop(name) for name in ("out", "lse", "sinks"))
        parts, parts_lse = out, lse
        if pieces > 1:
            parts = torch.empty((lse.numel(), pieces, v_dim), dtype=torch.float32, device=out.device)
            parts_lse = torch.empty((lse.numel(), pieces), dtype=torch.float32, device=out.device)
        if ragged:
            parts_lse.fill_(math.nan)  # of rows that starts leave out nobody else says anything
            out.fill_(math.nan)
        with gpu.current(self.q.device):
            kernel(self.special, "split").launch(
                pieces * lanes,
                tile,
                **own,
                **addressed(q=self.q, k=self.k, v=self.v),
                **mask_values(self.problem),
                **self._of_strength,
                **self._where,
                out_ptr=parts,
                lse_ptr=parts_lse,
                sinks_ptr=lse if sinks is None else sinks,
                HAS_SINKS=sinks is not None and pieces == 1,
                pieces=pieces,
                tiles=tiles,
                batch=batch,
                heads=heads,
                group=group,
                q_len=q_len,
                head_rows=head_rows,
                UNIT=UNIT,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                D=dim,
                DV=v_dim,
                BLOCK_D=padded(dim),
                BLOCK_DV=padded(v_dim),
                PRECISION=gpu.precision(self.q.dtype, self.strength.precision),
            )
            if pieces > 1:
                kernel(replace(NO_MASK, padded_dv=v_dim != padded(v_dim)), "combine").launch(
                    lse.numel(),
                    COMBINE,
                    out_ptr=out,
                    lse_ptr=lse,
                    parts_ptr=parts,
                    parts_lse_ptr=parts_lse,
                    sinks_ptr=lse if sinks is None else sinks,
                    HAS_SINKS=sinks is not None,
                    heads=heads,
                    q_len=head_rows,
                    pieces=pieces,
                    PARTS=PARTS,
                    DV=v_dim,
                    BLOCK_DV=padded(v_dim),
                )

    def _keep(self) -> None:
        keep(None, self.problem, self.strength)
