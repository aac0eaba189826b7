"""What the layers of a model need, and a number of ranks -> the shards whose step is soon done, with few bytes.

Ways of the field are priced by exact counts; swaps of chunks then improve the best of them, from large chunks to single
lines. All are tried in the end, and the choice is the same on every machine:

1. Ideal is the time of perfectly shared work whose transfers are all hidden. Within reach is what takes at most 2 % of
   it longer. Where nothing does, it is what takes at most as much longer than the fastest: only work is worth bytes, so
   that 2 % of an exchange of heads or of a transfer aren't given for them.
2. Of these, the least product of seconds and bytes is chosen: the most that a rank moves, plus the mean.

So nothing that was tried is both faster and moves fewer bytes, and work is balanced to 2 % wherever some way that
doesn't wait for its transfers reaches that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from maskflash.analysis.runs import IntArray
from maskflash.parallel import candidates
from maskflash.parallel.links import Links
from maskflash.parallel.price import Layers, Load, exchange_seconds, ideal_seconds, imbalance, moved, price, seconds
from maskflash.parallel.routes import Shards
from maskflash.parallel.swaps import Aim, Chunks, Swaps

_REACH: Final = 1.02
_AIM: Final = 1.019  # of swaps, which search counts less exactly than prices
_KEPT: Final = 3  # ways that swaps improve, at each size of chunks
_MANY: Final = 8  # the same where chunks are few
_FEW: Final = 128  # chunks
_COLUMNS: Final = 2048  # of a layer: above, columns are as wide as chunks
_CHUNKS: Final = 4096  # above, only the largest chunks are swapped
_STEPS: Final = 1.2e10  # multiplications of all swaps, about, and
_STEPS_OF_A_LINE: Final = 6e6  # where that is more: else only the largest chunks of a million tokens would be swapped


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to shard, priced.

    Attributes:
        name: what it is.
        head_ranks: ranks that share the heads of their tokens.
        seconds: how long the attention of a training step takes, all layers, forward and backward.
        imbalance: the largest work of a rank over the mean.
        bytes_max: the most that a rank receives or sends in such a step.
        bytes_sum: what all ranks receive in it.
    """

    name: str
    head_ranks: int
    seconds: float
    imbalance: float
    bytes_max: int
    bytes_sum: int


@dataclass(frozen=True, slots=True)
class ShardChoice:
    """The shards that were chosen, and what else was tried.

    Attributes:
        shards: the tokens of each rank; every `head_ranks` ranks in turn share the heads of theirs.
        head_ranks: 1 where each rank has all heads.
        name: of the chosen candidate.
        tried: all candidates.
    """

    shards: Shards
    head_ranks: int
    name: str
    tried: tuple[Candidate, ...]


def choose(
    layers: Layers,
    world_size: int,
    *,
    chunk: int | None,
    head_ranks: int | None = None,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    links: Links,
) -> ShardChoice:
    """Find the tokens of each rank.

    Args:
        layers: what the lines of each kind of layer need, all in the same tiles, and how many such layers there are.
        world_size: ranks.
        chunk: shards begin and end at its multiples, tokens, as well as at tiles; None for tiles.
        head_ranks: ranks that share heads, a divisor of `world_size` and of both heads; None for what is best.
        batch: batch rows.
        heads: query heads.
        kv_heads: of k and v.
        head_dim: of q and k.
        dtype: of q, k and v.
        links: the rates that time is estimated by.

    Returns:
        A choice whose ranks hold at most an even share of the tokens, rounded up to a tile, or to a chunk.
    """
    load = Load(batch, heads, kv_heads, head_dim, dtype)
    unit = max((chunk or 0) // layers[0][0].tile, 1)
    shared = (
        [head_ranks]
        if head_ranks
        else [n for n in range(1, min(world_size, kv_heads) + 1) if not (world_size % n or heads % n or kv_heads % n)]
    )
    search = _Search(layers, world_size, load, links, unit)
    for count in shared:
        search.price_ways(count)
    for count in dict.fromkeys((search.best()[0].head_ranks, shared[0])):
        search.swap(count)
    best, shards = search.best()
    return ShardChoice(shards, best.head_ranks, best.name, tuple(candidate for candidate, _ in search.found.values()))


class _Search:
    """Candidates of one call."""

    def __init__(self, layers: Layers, world_size: int, load: Load, links: Links, unit: int) -> None:
        self.layers, self.world_size, self.load, self.links, self.unit = layers, world_size, load, links, unit
        self.seq_len, self.tokens = layers[0][0].seq_len, unit * layers[0][0].tile
        self.area = candidates.find_area(layers, unit)
        self.ideal = ideal_seconds(layers, world_size, load, links)
        self.found: dict[tuple[str, int], tuple[Candidate, Shards]] = {}
        self.owners: dict[int, dict[str, IntArray]] = {}
        self.steps = max(_STEPS, _STEPS_OF_A_LINE * len(layers[0][0].area))

    def limit(self) -> float:
        """Seconds within reach."""
        least = min(candidate.seconds for candidate, _ in self.found.values())
        return _REACH * self.ideal if least <= _REACH * self.ideal else least + (_REACH - 1) * self.ideal

    def preference(self, candidate: Candidate) -> tuple[float, float, float]:
        """What orders candidates, the best first."""
        moves = candidate.bytes_max + candidate.bytes_sum / self.world_size
        return max(candidate.seconds, self.limit()), candidate.seconds * moves, candidate.seconds

    def best(self) -> tuple[Candidate, Shards]:
        """The candidate to choose, and its shards."""
        return min(self.found.values(), key=lambda found: self.preference(found[0]))

    def price_ways(self, head_ranks: int) -> None:
        """Price ways in which `head_ranks` ranks share heads; one of them only, if none can be within reach."""
        groups = self.world_size // head_ranks
        waits = exchange_seconds(self.layers, self.world_size, head_ranks, self.load, self.links)
        owners = self.owners[head_ranks] = {}
        for name, owner in candidates.ways([needs for needs, _ in self.layers], self.area, self.unit, groups):
            owners[name] = owner
            self.add(name, owner, head_ranks)
            if groups == 1 or self.ideal + waits > max(self.limit(), _REACH * self.ideal):
                return

    def add(self, name: str, owner: IntArray, head_ranks: int) -> bool:
        """Price a way; whether it is better than what had its name."""
        owner = candidates.divide(owner, head_ranks)
        shards = candidates.as_shards(owner, self.world_size, self.tokens, self.seq_len)
        layers = price(self.layers, shards, head_ranks, self.load, self.links)
        found = Candidate(name, head_ranks, seconds(layers), imbalance(layers), *moved(layers))
        known = self.found.get((name, head_ranks))
        if known is not None and self.preference(known[0]) <= self.preference(found):
            return False
        self.found[name, head_ranks] = found, shards
        return True

    def swap(self, head_ranks: int) -> None:
        """Let ranks swap chunks, in the best ways that they begin with at each size."""
        groups, owners = self.world_size // head_ranks, self.owners[head_ranks]
        now = {name: self.found[name, head_ranks][0] for name in owners}
        for grain in _grains(len(self.area), groups):
            aligned = [name for name in owners if _is_aligned(owners[name], grain)]
            few = -(-len(self.area) // grain) <= _FEW
            aligned.sort(key=lambda name: self.preference(now[name]))
            if not aligned:
                continue
            chunks = self.chunks(grain, groups)
            for name in aligned[: _MANY if few else _KEPT]:
                if self.steps <= 0:
                    return
                swaps = Swaps(chunks, owners[name][::grain])
                self.steps -= swaps.improve(self.aim(swaps, head_ranks), self.steps)
                owner = np.repeat(swaps.owner[: len(owners[name][::grain])], grain)[: len(self.area)]
                if self.add(f"{name}, swapped", owner, head_ranks):
                    owners[name], now[name] = owner, self.found[f"{name}, swapped", head_ranks][0]

    def chunks(self, grain: int, groups: int) -> Chunks:
        """What swaps need to know of chunks of `grain` units."""
        lines = grain * self.unit
        wide = lines if len(self.layers[0][0].area) > _COLUMNS else 1
        sees = candidates.find_sees([needs for needs, _ in self.layers], lines, wide)
        ends = np.minimum(np.arange(sees.shape[2] + 1) * wide * self.layers[0][0].tile, self.seq_len)
        width = np.concatenate([count * np.diff(ends) for _, count in self.layers]).astype(np.float64)
        home = np.tile(np.arange(sees.shape[2]) * wide // lines, len(self.layers))
        order = np.argsort(home, kind="stable")
        area = np.add.reduceat(self.area, np.arange(0, len(self.area), grain)).astype(np.float64)
        return Chunks(sees.reshape(len(sees), -1)[:, order], width[order], home[order], area, groups)

    def aim(self, swaps: Swaps, head_ranks: int) -> Aim:
        """What swaps are for."""
        count, key, gradient = swaps.count, self.load.key_bytes(head_ranks), self.load.gradient_bytes(head_ranks)
        weight = self.links.compute(1, 1, backward=False) / sum(
            self.links.compute(1, 1, backward=x) for x in (False, True)
        )
        moves = self.ideal * self.links.bandwidth
        waits = exchange_seconds(self.layers, self.world_size, head_ranks, self.load, self.links)
        limit = _AIM - waits / max(self.ideal, 1e-12)  # the exchange of heads is borne too, where that can be
        return Aim(
            work=max(float(count.work.mean()), 1),
            forward=max(moves * weight / key, 1),
            backward=max(moves * (1 - weight) / (key + gradient), 1),
            back=key / (key + gradient),
            weight=weight,
            limit=limit if limit > 1 else _AIM,
            most=max(float(count.received.max()), float(count.sent.max()), 1),
        )


def _grains(units: int, ranks: int) -> list[int]:
    """Sizes of chunks that ranks swap, in units: each the largest that divides the one before."""
    room = -(-units // ranks)
    found = []
    while room > 1:
        room = next(size for size in range(room // 2, 0, -1) if room % size == 0)
        found.append(room)
    return [size for size in found if -(-units // size) <= _CHUNKS] or found[:1]


def _is_aligned(owner: IntArray, grain: int) -> bool:
    """Whether each chunk of `grain` units is on one rank."""
    return bool((owner == np.repeat(owner[::grain], grain)[: len(owner)]).all())
