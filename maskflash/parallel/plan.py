"""A mask, a sequence length and a number of ranks -> which tokens each rank holds, what it computes, what travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskflash.masks.predicate import mask as as_mask
from maskflash.parallel.links import Links
from maskflash.parallel.needs import find_needs
from maskflash.parallel.routes import Shards, find_routes


@dataclass(frozen=True)
class ShardPlan:
    """Which tokens each rank holds, and what follows from it for a mask: plain data, the same on every rank.

    Attributes:
        seq_len: tokens.
        tile: tokens; shards begin and end at multiples of it, or with the sequence.
        shards: for each rank its tokens, as (start, stop) that ascend and don't touch.
        work: visible pairs of each rank's queries, summed over batch rows, query heads and layers.
        received: keys that each rank needs and doesn't hold, summed over layers.
        sent: keys that each rank holds and others need, counted once for each of them, summed over layers.
        head_ranks: how many ranks, one after the other, exchange heads for tokens.
    """

    seq_len: int
    tile: int
    shards: Shards
    work: tuple[int, ...]
    received: tuple[int, ...]
    sent: tuple[int, ...]
    head_ranks: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.shards)

    def tokens(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return sum(stop - start for start, stop in self.shards[rank])

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """What a rank holds of a tensor whose dimension `dim` is the sequence: a copy."""
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.shards[rank]], dim)

    def unshard(self, parts: list[Tensor], dim: int = 2) -> Tensor:
        """The whole tensor, of what all ranks hold."""
        at = [torch.arange(start, stop) for ranges in self.shards for start, stop in ranges]
        place = torch.cat(at).argsort().to(parts[0].device)
        return torch.cat(parts, dim).index_select(dim, place)


def plan(
    mask: Any,
    seq_len: int,
    world_size: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int | None = None,
    links: Links | str | None = None,
    **args: Any,
) -> ShardPlan:
    """Plan which tokens each of several ranks holds, so that attention under a mask is soon done."""
    tile = 128 if chunk is None or chunk % 128 == 0 else chunk
    needs = find_needs(as_mask(mask).at(seq_len, seq_len, batch=batch, heads=heads, **args).problem, tile)
    most = -(-seq_len // world_size // tile) * tile
    ranges = [(min(rank * most, seq_len), min((rank + 1) * most, seq_len)) for rank in range(world_size)]
    shards = tuple((one,) if one[0] < one[1] else () for one in ranges)
    routes = find_routes(needs, shards)
    tokens = routes.tokens()
    np.fill_diagonal(tokens, 0)
    received, sent = tuple(tokens.sum(0).tolist()), tuple(tokens.sum(1).tolist())
    return ShardPlan(seq_len, tile, shards, tuple(routes.work.tolist()), received, sent)
