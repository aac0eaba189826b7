"""Needs and shards -> what each rank computes and what travels, by three ways to send keys: what balancers are worth.

    needed     a rank receives the keys that its rows need and it doesn't hold       maskflash, MagiAttention
    gathered   every rank receives all keys, whatever the mask                       torch's context parallel
    ring       likewise, from its neighbour, in W - 1 turns                          ring attention

With `head_ranks` > 1 so many ranks exchange heads for tokens first (Ulysses), and keys travel between such groups.
Backward, keys that were needed or went round travel again, and their gradients come back in 32 bits. torch keeps what
it gathered, and scatters gradients in the dtype of keys. What a group exchanged is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from maskflash.parallel.links import Links
from maskflash.parallel.needs import Needs
from maskflash.parallel.routes import Shards, find_routes

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Model:
    """What a layer of attention is made of."""

    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def key(self) -> int:
        """Bytes of a token of k and v."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def gradient(self) -> int:
        """Bytes of a token's gradients of k and v in 32 bits."""
        return 2 * self.kv_heads * self.head_dim * 4

    @property
    def query(self) -> int:
        """Bytes of a token of q, or of out."""
        return self.heads * self.head_dim * self.itemsize


LAYER: Final = Model(heads=32, kv_heads=8, head_dim=128, itemsize=2)
"""A layer of a Llama of 8 billion weights, in 16 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """What travels: (ranks,) bytes that each receives and sends, and messages: of both ways the more."""

    received: Floats
    sent: Floats
    messages: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Journey:
    """A pass of a layer.

    Attributes:
        keys: what travels while ranks compute.
        heads: what a group exchanges before and after, while they wait.
    """

    keys: Moved
    heads: Moved

    @property
    def received(self) -> Floats:
        """(ranks,) bytes."""
        return self.keys.received + self.heads.received

    @property
    def sent(self) -> Floats:
        """(ranks,) bytes."""
        return self.keys.sent + self.heads.sent

    @property
    def messages(self) -> Floats:
        """(ranks,) of both kinds."""
        return self.keys.messages + self.heads.messages


@dataclass(frozen=True, slots=True, eq=False)
class LayerStep:
    """A layer's forward and backward on some shards.

    Attributes:
        work: (ranks,) visible pairs, summed over batch rows and query heads.
        forward: what travels.
        backward: likewise.
    """

    work: Floats
    forward: Journey
    backward: Journey

    @property
    def imbalance(self) -> float:
        """The largest work over the mean; 1 where nothing is to do."""
        return float(self.work.max() / self.work.mean()) if self.work.any() else 1.0

    def seconds(self, links: Links, model: Model = LAYER) -> float:
        """The slowest rank's forward, then the slowest rank's backward."""
        total = 0.0
        for backward, one in ((False, self.forward), (True, self.backward)):
            compute = np.array([links.compute(x, model.head_dim, backward=backward) for x in self.work.tolist()])
            total += float((np.maximum(compute, _took(one.keys, links)) + _took(one.heads, links)).max())
        return total


def _took(moved: Moved, links: Links) -> Floats:
    each = zip(moved.received.tolist(), moved.sent.tolist(), moved.messages.tolist(), strict=True)
    return np.array([links.transfer(*one) for one in each])


def needed(needs: Needs, shards: Shards, head_ranks: int = 1, model: Model = LAYER) -> LayerStep:
    """What travels where ranks receive the keys that they need, exact to the token."""
    groups = [tuple(sorted(sum(shards[i : i + head_ranks], ()))) for i in range(0, len(shards), head_ranks)]
    routes = find_routes(needs, tuple(groups))
    tokens = routes.tokens().astype(np.float64)
    np.fill_diagonal(tokens, 0)
    # Each rank of a group receives what the group needs, for its own part of the heads.
    come, go = (np.repeat(tokens.sum(axis), head_ranks) / head_ranks for axis in (0, 1))
    sources, targets = (np.repeat((tokens > 0).sum(axis), head_ranks).astype(np.float64) for axis in (0, 1))
    keys, gradients = (come * model.key, go * model.key), (go * model.gradient, come * model.gradient)
    back = (keys[0] + gradients[0], keys[1] + gradients[1])
    heads = _exchanged(shards, head_ranks, model)
    return LayerStep(
        np.repeat(routes.work / head_ranks, head_ranks),
        Journey(Moved(*keys, np.maximum(sources, targets)), heads),
        Journey(Moved(*back, sources + targets), Moved(heads.sent, heads.received, heads.messages)),
    )


def gathered(needs: Needs, shards: Shards, model: Model = LAYER) -> LayerStep:
    """What travels where every rank gathers all keys."""
    foreign, turns = _foreign(needs, shards)
    keys = Moved(foreign * model.key, foreign * model.key, turns)
    one = Journey(keys, _exchanged(shards, 1, model))
    return LayerStep(find_routes(needs, shards).work.astype(np.float64), one, one)


def ring(needs: Needs, shards: Shards, model: Model = LAYER) -> LayerStep:
    """What travels where keys go round, and backward their gradients with them."""
    foreign, turns = _foreign(needs, shards)
    keys, both, nothing = foreign * model.key, foreign * (model.key + model.gradient), _exchanged(shards, 1, model)
    return LayerStep(
        find_routes(needs, shards).work.astype(np.float64),
        Journey(Moved(keys, keys, turns), nothing),
        Journey(Moved(both, both, 2 * turns), nothing),
    )


def _foreign(needs: Needs, shards: Shards) -> tuple[Floats, Floats]:
    """For each rank, how many tokens it doesn't hold, and how many other ranks there are."""
    return needs.seq_len - _held(shards), np.full(len(shards), len(shards) - 1.0)


def _exchanged(shards: Shards, head_ranks: int, model: Model) -> Moved:
    """What each rank of a group exchanges forward: q, k and v before, out after; backward it is the other way round."""
    held = _held(shards)
    own, other = held * (head_ranks - 1), held.reshape(-1, head_ranks).sum(1).repeat(head_ranks) - held
    row, key = model.query / head_ranks, model.key / head_ranks
    messages = np.full(len(shards), 2.0 * (head_ranks - 1))
    return Moved(other * (row + key) + own * row, own * (row + key) + other * row, messages)


def _held(shards: Shards) -> Floats:
    return np.array([sum(stop - start for start, stop in ranges) for ranges in shards], dtype=np.float64)
