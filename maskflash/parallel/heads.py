r"""Tensors of a shard with all heads <-> tensors of some heads with the tokens of several shards: Ulysses.

Ranks that exchange heads for tokens (here two, of four heads each) attend all of their tokens with a part of the heads:

             tokens 0 1 4 5     tokens 2 3 6 7               tokens 0 1 2 3 4 5 6 7
    rank 0   heads 0 to 3                        \  rank 0   heads 0 and 1
    rank 1                      heads 0 to 3     /  rank 1   heads 2 and 3

q, k and v go there together, in one exchange, and out comes back in another. Gradients take the same ways back.

Source: Jacobs et al., DeepSpeed Ulysses, 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.op.parts import part
from maskflash.op.spec import Spec
from maskflash.parallel.peers import Peers
from maskflash.parallel.ranges import union
from maskflash.parallel.routes import Shards

Run = Callable[[Spec, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Attends: a spec, q, k and v -> out and lse."""


def joined(shards: Shards, head_ranks: int) -> Shards:
    """The tokens of each row of ranks: those that `head_ranks` ranks, one after the other, hold together."""
    found = []
    for first in range(0, len(shards), head_ranks):
        ranges = np.array([x for held in shards[first : first + head_ranks] for x in held], dtype=np.int64)
        ranges = ranges.reshape(-1, 2)
        _, start, stop = union(np.zeros(len(ranges), dtype=np.int64), ranges[:, 0], ranges[:, 1])
        found.append(tuple(zip(start.tolist(), stop.tolist(), strict=True)))
    return tuple(found)


def share(operation: str, heads: int, kv_heads: int, head_ranks: int, place: int) -> range:
    """The query heads of one of the ranks that share them out; its key heads are those that these read.

    Raises:
        ArgumentError: they can't be shared out.
    """
    for name, count in (("q", heads), ("k", kv_heads)):
        if count % head_ranks:
            raise ArgumentError(
                f"{operation}: {name} has {count} heads, expected a multiple of the plan's {head_ranks} head ranks; "
                "make the plan with heads= and kv_heads= as they are in the call"
            )
    each = heads // head_ranks
    return range(place * each, (place + 1) * each)


@dataclass(frozen=True, slots=True, eq=False)
class HeadExchange:
    """How some ranks exchange heads for tokens.

    Attributes:
        peers: these ranks.
        tokens: how many tokens each of them holds.
        order: (all of these tokens,) int64, where each is among the shards, one after the other, by token; None where
            that is where it is already.
        place: (all of these tokens,) int64, the other way round.
    """

    peers: Peers
    tokens: tuple[int, ...]
    order: Tensor | None
    place: Tensor | None

    @classmethod
    def of(cls, shards: Shards, peers: Peers, device: torch.device) -> HeadExchange:
        """That of ranks that hold these shards."""
        held = [np.concatenate([np.arange(0), *(np.arange(*x) for x in ranges)]) for ranges in shards]
        token = np.concatenate(held)
        order = token.argsort()
        tokens = tuple(map(len, held))
        if np.array_equal(order, np.arange(len(order))):
            return cls(peers, tokens, None, None)
        return cls(peers, tokens, *(torch.from_numpy(x).to(device) for x in (order, order.argsort())))

    def to_heads(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Tensors (B, H, tokens of this rank, D) -> (B, H / ranks, tokens of all, D): strided. Differentiable."""
        found: tuple[Tensor, ...] = _ToHeads.apply(self, *xs)  # type: ignore[no-untyped-call]
        return found

    def to_tokens(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Tensors (B, H / ranks, tokens of all, D) -> (B, H, tokens of this rank, D). Differentiable."""
        found: tuple[Tensor, ...] = _ToTokens.apply(self, *xs)  # type: ignore[no-untyped-call]
        return found

    def sent_to_heads(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """`to_heads` of tensors of one dtype, in one exchange."""
        ranks, own = len(self.tokens), self.tokens[self.peers.place]
        shapes = [(x.shape[0], x.shape[1] // ranks, x.shape[3]) for x in xs]
        rows, parts = _buffer(xs[0], (ranks, own), shapes)
        for x, shape, place in zip(xs, shapes, parts, strict=True):
            place.copy_(x.unflatten(1, (ranks, shape[1])).permute(1, 3, 0, 2, 4))
        received, _ = _buffer(xs[0], (sum(self.tokens),), shapes)
        self.peers.all_to_all(received, rows.flatten(0, 1), self.tokens, (own,) * ranks)
        if self.order is not None:
            received = received.index_select(0, self.order)
        return [x.permute(1, 2, 0, 3) for x in _parts(received, shapes)]

    def sent_to_tokens(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """`to_tokens` of tensors of one dtype, in one exchange."""
        ranks, own = len(self.tokens), self.tokens[self.peers.place]
        shapes = [(x.shape[0], x.shape[1], x.shape[3]) for x in xs]
        rows, parts = _buffer(xs[0], (sum(self.tokens),), shapes)
        for x, place in zip(xs, parts, strict=True):
            place.copy_(x.permute(2, 0, 1, 3))
        if self.place is not None:
            rows = rows.index_select(0, self.place)
        received, parts = _buffer(xs[0], (ranks, own), shapes)
        self.peers.all_to_all(received.flatten(0, 1), rows, (own,) * ranks, self.tokens)
        return [x.permute(2, 0, 3, 1, 4).flatten(1, 2) for x in parts]


def attend(
    exchange: HeadExchange, spec: Spec, q: Tensor, k: Tensor, v: Tensor, run: Run, *, lse: bool
) -> tuple[Tensor, ...]:
    """Attention of this rank's tokens, computed where their heads are. Differentiable in what `run` is in.

    Args:
        exchange: who shares heads out.
        spec: of the whole call, with all heads.
        q: (B, Hq, tokens of this rank, D).
        k: (B, Hkv, tokens of this rank, D).
        v: (B, Hkv, tokens of this rank, Dv).
        run: attends the tokens of all these ranks under the spec of some heads: out (B, Hq / ranks, tokens of all, Dv)
            and its natural lse.
        lse: whether to return that too.

    Returns:
        out: (B, Hq, tokens of this rank, Dv).
        lse: if asked for, (B, Hq, tokens of this rank).
    """
    heads = share("parallel.compile", q.shape[1], k.shape[1], len(exchange.tokens), exchange.peers.place)
    found, found_lse = run(part(spec, range(q.shape[0]), heads), *exchange.to_heads(q, k, v))
    if not lse:
        return exchange.to_tokens(found)
    out, own_lse = exchange.to_tokens(found, found_lse[..., None])
    return out, own_lse[..., 0]


def _buffer(like: Tensor, rows: tuple[int, ...], shapes: Sequence[tuple[int, int, int]]) -> tuple[Tensor, list[Tensor]]:
    """Room for rows that hold (B, H, D) of several tensors, and its parts."""
    found = like.new_empty((*rows, sum(b * h * d for b, h, d in shapes)))
    return found, _parts(found, shapes)


def _parts(rows: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The tensors (..., B, H, D) in rows: views."""
    split = rows.split([b * h * d for b, h, d in shapes], -1)
    return [x.unflatten(-1, shape) for x, shape in zip(split, shapes, strict=True)]


def _by_dtype(xs: Sequence[Tensor], send: Any) -> tuple[Tensor, ...]:
    """All tensors sent, those of one dtype together."""
    return tuple(y for _, alike in groupby(xs, lambda x: x.dtype) for y in send(list(alike)))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return _by_dtype(xs, exchange.sent_to_heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.to_tokens(*gradients)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return _by_dtype(xs, exchange.sent_to_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.to_heads(*gradients)
