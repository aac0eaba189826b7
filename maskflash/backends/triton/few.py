"""Few rows over many keys -> attention by programs that share the rows, each over a piece of what they see.

    split       a program for each piece, key head and row tile: rows of all query heads of a group lie in one tile
    combine     a program for each row, which joins what its pieces found; where rows have one piece there is none

How many pieces there are is decided by the device's processors, or by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton.launch import NO_MASK, Launcher, kernel
from maskflash.backends.triton.layout import UNIT, addressed, padded
from maskflash.backends.triton.pieces import cut
from maskflash.backends.triton.plan import DevicePlan
from maskflash.backends.triton.signature import PassName
from maskflash.backends.triton.tiles import COMBINE, PARTS, Tile
from maskflash.scores.strength import Strength

_STEP: Final = 32  # keys, where it isn't known yet


def serves(plan: DevicePlan, strength: Strength) -> bool:
    """Whether forward of a call is computed here: its rows are few, and nothing is dropped."""
    return plan.has_few_rows and strength.dropout is None


def narrowed(tile: Tile, packed: int) -> Tile:
    """A tile with no more rows than hold those of a call."""
    return replace(tile, block_m=min(tile.block_m, max(16, 1 << (packed - 1).bit_length())))


def told(plan: DevicePlan, problem: Problem, splits: int | None) -> dict[str, int | str]:
    """What a call's programs load and how it is cut, as far as that is known without q and k.

    Each head counts as one with keys of its own, and steps are of 32 keys.
    """
    assert plan.on_host is not None, "rows are few"
    batch, heads, *_ = problem.shape
    columns = problem.block_size[1]
    lines = plan.rows.counts.shape[2]
    tokens = math.gcd(columns, _STEP)
    copies = problem.batch * problem.heads // (batch * heads)
    sizes = (lines, 1, tokens, columns // tokens)
    found = cut(plan.on_host, (batch, heads), *sizes, splits, gpu.programs(plan.device), copies)
    visited = int(plan.rows.counts.sum()) * columns
    return {"keys loaded for each key head": visited, "pieces of a row at most": found.most}


@dataclass(slots=True, eq=False)
class SplitLauncher(Launcher):
    """Launches the two kernels, for a tile that may be tried.

    Attributes:
        splits: pieces of each row; None for as many as the device has work for.
    """

    splits: int | None = None

    def launch(self, pass_name: PassName, tile: Tile, own: dict[str, Any]) -> None:
        """Launch `split`, and `combine` where rows have several pieces.

        Args:
            pass_name: "split".
            tile: how it cuts its work.
            own: out and lse to be written, as `run.forward` makes them; sinks or None; and the factor of products.
        """
        (batch, heads, q_len, dim), (_, kv_heads, kv_len, v_dim) = self.q.shape, self.v.shape
        own_batch, own_heads, *_ = self.problem.shape
        rows, columns = self.problem.block_size
        group = heads // kv_heads
        pack = group if own_heads == 1 else 1
        tile = narrowed(tile, q_len * pack)
        groups = heads // pack if own_heads == 1 else 1
        copies = groups * (batch if own_batch == 1 else 1)
        per_line = rows * pack // tile.block_m
        tiles = -(-q_len * pack // tile.block_m)
        sizes = (tiles, per_line, tile.block_n, columns // tile.block_n)
        pieces, starts, count = self.plan.pieces(
            (own_batch, own_heads),
            (batch, heads, q_len),
            rows,
            sizes,
            self.splits,
            gpu.programs(self.q.device),
            copies,
        )
        own = dict(own)
        out, lse, sinks = (own.pop(name) for name in ("out", "lse", "sinks"))
        maps = {"map_b": own_heads if own_batch > 1 else 0, "map_h": 1 if own_heads > 1 else 0}
        several = pieces.most > 1
        parts, parts_lse = out, lse
        if several:
            parts = torch.empty((count, v_dim), dtype=torch.float32, device=out.device)
            parts_lse = torch.empty((count,), dtype=torch.float32, device=out.device)
        with gpu.current(self.q.device):
            kernel(self.special, "split").launch(
                len(pieces.table) * copies,
                tile,
                **own,
                **addressed(q=self.q, k=self.k, v=self.v),
                **self.plan.mask(self.problem),
                **self._of_strength,
                **self.plan.runs,
                **maps,
                out_ptr=parts,
                lse_ptr=parts_lse,
                sinks_ptr=lse if sinks is None else sinks,
                HAS_SINKS=sinks is not None and not several,
                pieces=pieces.table,
                starts=starts,
                items=len(pieces.table),
                groups=groups,
                pack=pack,
                batch=batch,
                heads=heads,
                group=group,
                q_len=q_len,
                kv_len=kv_len,
                UNIT=UNIT,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                SUB=columns // tile.block_n,
                D=dim,
                DV=v_dim,
                BLOCK_D=padded(dim),
                BLOCK_DV=padded(v_dim),
                PRECISION=gpu.precision(self.q.dtype),
            )
            if several:
                kernel(replace(NO_MASK, padded_dv=v_dim != padded(v_dim)), "combine").launch(
                    batch * heads * q_len,
                    COMBINE,
                    out_ptr=out,
                    lse_ptr=lse,
                    parts_ptr=parts,
                    parts_lse_ptr=parts_lse,
                    sinks_ptr=lse if sinks is None else sinks,
                    HAS_SINKS=sinks is not None,
                    starts=starts,
                    heads=heads,
                    q_len=q_len,
                    PARTS=PARTS,
                    DV=v_dim,
                    BLOCK_DV=padded(v_dim),
                )
