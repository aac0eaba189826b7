"""Shards and what lines need -> what each rank computes, what travels, and how long a step takes: exact counts.

A key is a token of k and of v. Forward, a rank receives the keys that it needs and doesn't hold. Backward, it receives
them again, and sends their gradients back. Where several ranks share the heads of a group of tokens, they first
exchange heads for tokens, and afterwards back:

    rank 0: tokens 0..7, 4 heads      rank 0: tokens 0..15, heads 0 and 1
    rank 1: tokens 8..15, 4 heads     rank 1: tokens 0..15, heads 2 and 3

Source: the exchange is that of Jacobs et al., DeepSpeed Ulysses, 2023 (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from maskflash.analysis.runs import IntArray
from maskflash.parallel.links import Links
from maskflash.parallel.needs import Needs
from maskflash.parallel.routes import Shards, owners

Layers = Sequence[tuple[Needs, int]]
"""What the lines of each kind of layer need, and how many layers of it a model has."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a token weighs: the sizes of q (batch, heads, S, head_dim) and of k and v (batch, kv_heads, S, head_dim)."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def key_bytes(self, head_ranks: int = 1) -> int:
        """Bytes of a token of k and v, for the heads of one rank."""
        return 2 * self.batch * self.kv_heads // head_ranks * self.head_dim * self.dtype.itemsize

    def gradient_bytes(self, head_ranks: int = 1) -> int:
        """Bytes of a token's gradients of k and v, which travel in float32, or in float64 where k and v are."""
        return self.key_bytes(head_ranks) // self.dtype.itemsize * max(self.dtype.itemsize, 4)

    def row_bytes(self, head_ranks: int = 1) -> int:
        """Bytes of a token of q, or of out, for the heads of one rank."""
        return self.batch * self.heads // head_ranks * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What a pass of one layer moves on each rank, and how long the rank takes for it.

    Attributes:
        received: (ranks,) int64, bytes, those of exchanged heads too.
        sent: (ranks,) int64, likewise.
        messages: (ranks,) int64, what a rank receives, or sends if that is more.
        seconds: (ranks,) float64.
    """

    received: IntArray
    sent: IntArray
    messages: IntArray
    seconds: Any


@dataclass(frozen=True, slots=True, eq=False)
class LayerPrice:
    """What a layer costs.

    Attributes:
        count: how many such layers a model has.
        work: (ranks,) float64, visible pairs, summed over batch rows and a rank's query heads.
        keys: (groups, groups) int64, how many keys of group i group j needs; those that stay are 0. A group has
            `head_ranks` ranks, and each of them receives these keys for its own heads.
        forward: of one layer.
        backward: of one layer.
    """

    count: int
    work: Any
    keys: IntArray
    forward: Pass
    backward: Pass


def travelling(needs: Needs, owner: IntArray, groups: int) -> IntArray:
    """(groups, groups) int64: how many keys of group i group j needs; those that stay are 0."""
    order = np.argsort(owner, kind="stable")
    holders, first = np.unique(owner[order], return_index=True)
    found = np.zeros((groups, groups), dtype=np.int64)
    if len(holders):
        found[holders] = np.add.reduceat(needs.tiled.counted(owner, groups)[:, order], first, axis=1).T
    np.fill_diagonal(found, 0)
    return found


def price(layers: Layers, shards: Shards, head_ranks: int, load: Load, links: Links) -> list[LayerPrice]:
    """What each layer costs under shards, where every `head_ranks` ranks in turn share the heads of their tokens."""
    tokens = np.array([sum(stop - start for start, stop in ranges) for ranges in shards], dtype=np.int64)
    return [_price(needs, count, shards, tokens, head_ranks, load, links) for needs, count in layers]


def _price(
    needs: Needs, count: int, shards: Shards, tokens: IntArray, head_ranks: int, load: Load, links: Links
) -> LayerPrice:
    groups = len(shards) // head_ranks
    owner = owners(shards, needs.seq_len, needs.tile) // head_ranks
    keys = travelling(needs, owner, groups)
    work = np.repeat(np.bincount(owner, weights=needs.area, minlength=groups), head_ranks) / head_ranks
    come, go = (np.repeat(keys.sum(axis), head_ranks) for axis in (0, 1))
    sources, targets = (np.repeat((keys > 0).sum(axis), head_ranks) for axis in (0, 1))
    key, gradient = load.key_bytes(head_ranks), load.gradient_bytes(head_ranks)
    passes = []
    for backward in (False, True):
        ways = (come * key + backward * go * gradient, go * key + backward * come * gradient)
        messages = sources + targets if backward else np.maximum(sources, targets)
        took = np.maximum(links.compute(work, load.head_dim, backward=backward), _transfer(links, *ways, messages))
        comes, goes = _exchanged(tokens, head_ranks, load)
        swapped = (goes, comes) if backward else (comes, goes)
        calls = np.full_like(messages, 2 * (head_ranks - 1))
        took = took + _transfer(links, *swapped, calls)
        passes.append(Pass(ways[0] + swapped[0], ways[1] + swapped[1], messages + calls, took))
    return LayerPrice(count, work, keys, *passes)


def _transfer(links: Links, received: IntArray, sent: IntArray, messages: IntArray) -> Any:
    return messages * links.latency + np.maximum(received, sent) / links.bandwidth


def _exchanged(tokens: IntArray, head_ranks: int, load: Load) -> tuple[IntArray, IntArray]:
    """Bytes that each rank receives and sends forward: q, k and v of others for its heads, and out of its tokens."""
    others = np.repeat(tokens.reshape(-1, head_ranks).sum(1), head_ranks) - tokens
    rows, keys = load.row_bytes(head_ranks), load.key_bytes(head_ranks)
    own = tokens * (head_ranks - 1)
    return others * (rows + keys) + own * rows, own * (rows + keys) + others * rows


def ideal_seconds(layers: Layers, world_size: int, load: Load, links: Links) -> float:
    """How long the attention of a training step takes where work is shared evenly and no rank waits for a transfer."""
    work = sum(float(needs.area.sum()) * count for needs, count in layers) / world_size
    return float(sum(links.compute(work, load.head_dim, backward=backward) for backward in (False, True)))


def exchange_seconds(layers: Layers, world_size: int, head_ranks: int, load: Load, links: Links) -> float:
    """How long ranks that share heads exchange them in a training step, where each holds as many tokens."""
    tokens = np.full(head_ranks, -(-layers[0][0].seq_len // world_size))
    took = _transfer(links, *_exchanged(tokens, head_ranks, load), np.array(2 * (head_ranks - 1)))
    return 2 * sum(count for _, count in layers) * float(took.max())


def seconds(layers: list[LayerPrice]) -> float:
    """How long the attention of a training step takes: passes wait for their slowest rank."""
    return sum(x.count * float(x.forward.seconds.max() + x.backward.seconds.max()) for x in layers)


def imbalance(layers: list[LayerPrice]) -> float:
    """The largest work of a rank over the mean, all layers together; 1 where there is none."""
    work = np.sum([x.count * x.work for x in layers], axis=0)
    return float(work.max() / work.mean()) if work.any() else 1.0


def moved(layers: list[LayerPrice]) -> tuple[int, int]:
    """Bytes of a training step: the most that a rank receives or sends, and the sum that all receive."""
    received = np.sum([x.count * (x.forward.received + x.backward.received) for x in layers], axis=0)
    sent = np.sum([x.count * (x.forward.sent + x.backward.sent) for x in layers], axis=0)
    return int(np.maximum(received, sent).max()), int(received.sum())
