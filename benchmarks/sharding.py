"""Needs and shards -> what each rank computes and what travels, by three ways to send keys: what balancers are worth.

    needed     a rank receives the keys that its rows need and it doesn't hold       maskflash, MagiAttention
    gathered   every rank receives all keys, whatever the mask                       torch's context parallel
    ring       likewise, from its neighbour, in W - 1 turns                          ring attention

With `head_ranks` > 1 so many ranks exchange heads for tokens first (Ulysses), and keys travel between such groups.
Backward, keys that were needed or went round travel again, and their gradients come back in 32 bits. torch keeps what
it gathered, and scatters gradients in the dtype of keys. What a group exchanged is kept.
"""

from __future__ import annotations

from collections.abc import Callable
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
class Pass:
    """What ranks receive and send in one pass: (ranks,) bytes each, and messages that reach each rank."""

    received: Floats
    sent: Floats
    messages: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A layer's forward and backward on some shards.

    Attributes:
        work: (ranks,) visible pairs, summed over batch rows and query heads.
        forward: what travels.
        backward: likewise.
    """

    work: Floats
    forward: Pass
    backward: Pass

    @property
    def imbalance(self) -> float:
        """The largest work over the mean; 1 where nothing is to do."""
        return float(self.work.max() / self.work.mean()) if self.work.any() else 1.0

    def seconds(self, links: Links, model: Model = LAYER) -> float:
        """The slowest rank's forward, then the slowest rank's backward; ranks compute while they receive and send."""
        return sum(
            max(
                max(links.compute(work, model.head_dim, backward=backward), links.transfer(received, sent, messages))
                for work, received, sent, messages in zip(
                    self.work.tolist(), one.received.tolist(), one.sent.tolist(), one.messages.tolist(), strict=True
                )
            )
            for backward, one in ((False, self.forward), (True, self.backward))
        )


Sender = Callable[[Needs, Shards], Step]


def needed(needs: Needs, shards: Shards, head_ranks: int = 1, model: Model = LAYER) -> Step:
    """What travels where ranks receive the keys that they need, exact to the token."""
    groups = [tuple(sorted(sum(shards[i : i + head_ranks], ()))) for i in range(0, len(shards), head_ranks)]
    routes = find_routes(needs, tuple(groups))
    tokens = routes.tokens().astype(np.float64)
    np.fill_diagonal(tokens, 0)
    # By rank: what its group receives, a part of the heads of it.
    came, went = (np.repeat(x, head_ranks) / head_ranks for x in (tokens.sum(0), tokens.sum(1)))
    to, out = (np.repeat((tokens > 0).sum(axis), head_ranks).astype(np.float64) for axis in (0, 1))
    own, other = _exchanged(shards, head_ranks)
    q, kv = model.query / head_ranks, model.key / head_ranks
    forward = Pass(
        came * model.key + other * (q + kv) + own * q,
        went * model.key + own * (q + kv) + other * q,
        to + 2 * (head_ranks - 1),
    )
    backward = Pass(
        came * model.key + went * model.gradient + other * q + own * (q + kv),
        went * model.key + came * model.gradient + own * q + other * (q + kv),
        to + out + 2 * (head_ranks - 1),
    )
    return Step(np.repeat(routes.work / head_ranks, head_ranks), forward, backward)


def gathered(needs: Needs, shards: Shards, model: Model = LAYER) -> Step:
    """What travels where every rank gathers all keys."""
    foreign, turns = _foreign(needs, shards)
    forward = Pass(foreign * model.key, foreign * model.key, turns)
    return Step(find_routes(needs, shards).work.astype(np.float64), forward, forward)


def ring(needs: Needs, shards: Shards, model: Model = LAYER) -> Step:
    """What travels where keys go round, and backward their gradients with them."""
    foreign, turns = _foreign(needs, shards)
    both = foreign * (model.key + model.gradient)
    forward = Pass(foreign * model.key, foreign * model.key, turns)
    return Step(find_routes(needs, shards).work.astype(np.float64), forward, Pass(both, both, 2 * turns))


def _foreign(needs: Needs, shards: Shards) -> tuple[Floats, Floats]:
    """For each rank, how many tokens it doesn't hold, and how many other ranks there are."""
    held = np.array([sum(stop - start for start, stop in ranges) for ranges in shards], dtype=np.float64)
    return needs.seq_len - held, np.full(len(shards), len(shards) - 1.0)


def _exchanged(shards: Shards, head_ranks: int) -> tuple[Floats, Floats]:
    """For each rank, tokens of its own times the other ranks of its group, and those that the others hold."""
    held = np.array([sum(stop - start for start, stop in ranges) for ranges in shards], dtype=np.float64)
    group = held.reshape(-1, head_ranks).sum(1).repeat(head_ranks)
    return held * (head_ranks - 1), group - held
