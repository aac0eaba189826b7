"""Which tokens each rank holds -> a rank's part of a tensor, and back; what it computes, what travels, and when.

tokens   0 1 2 3 4 5 6 7
rank     0 0 1 1 1 1 0 0      shards ((0, 2), (6, 8)), ((2, 6),)

plan.shard(x, 0)              x[0] x[1] x[6] x[7]
plan.positions(0)             0, 1, 6, 7
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.parallel.links import Links
from maskflash.parallel.routes import Shards, checked
from maskflash.parallel.search import Candidate

_READ: Final = "ShardPlan.from_dict"

PerRank = tuple[int, ...]
"""A number for each rank."""


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """What a pass moves on each rank, and how long the rank takes for it.

    Attributes:
        received: bytes that reach each rank.
        sent: bytes that leave it.
        messages: what it receives, or sends if that is more.
        seconds: as the cost model predicts them; a pass takes as long as its slowest rank.
    """

    received: PerRank
    sent: PerRank
    messages: PerRank
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """What one layer of a model costs each rank.

    Attributes:
        name: of its mask.
        count: how many such layers the model has; all else is of one of them.
        work: visible pairs of each rank's queries, summed over batch rows and query heads. Ranks that share the heads
            of their tokens count equal parts.
        received: keys that each rank needs and doesn't hold.
        sent: keys that each rank holds and others need, counted once for each of them.
        exact: whether these are just the keys that are needed; see `parallel.needs.Needs`.
        forward: what forward moves, and how long it takes.
        backward: the same of backward. Keys travel again, and their gradients travel back.
    """

    name: str
    count: int
    work: PerRank
    received: PerRank
    sent: PerRank
    exact: bool
    forward: PlannedPass
    backward: PlannedPass


@dataclass(frozen=True)
class ShardPlan:
    """Which tokens each rank holds, and what follows from it for a mask: plain data, the same on every rank.

    It pickles, and two plans are equal where all that they hold is.

    Attributes:
        seq_len: tokens.
        tile: tokens; shards begin and end at multiples of it, or with the sequence.
        shards: for each rank its tokens, as (start, stop) that ascend and don't touch.
        head_ranks: how many ranks, in turn, share the heads of their tokens: rank r = t * head_ranks + h attends the
            tokens of ranks t * head_ranks to (t + 1) * head_ranks with the h-th part of the heads.
        name: how the tokens are laid out.
        layers: what each kind of layer costs.
        tried: what the plan was chosen from.
        batch: batch rows.
        heads: query heads.
        kv_heads: heads of k and v.
        head_dim: of all of them.
        dtype: of q, k and v.
        links: what the predicted seconds are made of.

    Example:
        >>> import maskflash as mf
        >>> plan = mf.parallel.plan(mf.sliding_window(100), 1024, 4)
        >>> plan.shards, plan.received
        ((((0, 256),), ((256, 512),), ((512, 768),), ((768, 1024),)), (0, 100, 100, 100))
        >>> x = torch.randn(1, 8, 1024, 64)
        >>> parts = [plan.shard(x, rank) for rank in range(4)]
        >>> torch.equal(plan.unshard(parts), x)
        True
    """

    seq_len: int
    tile: int
    shards: Shards
    head_ranks: int
    name: str
    layers: tuple[PlannedLayer, ...]
    tried: tuple[Candidate, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    links: Links

    @property
    def world_size(self) -> int:
        """How many ranks the plan is for."""
        return len(self.shards)

    @property
    def work(self) -> PerRank:
        """Visible pairs of each rank's queries, summed over batch rows, query heads and layers."""
        return self._sum(lambda layer: layer.work)

    @property
    def received(self) -> PerRank:
        """Keys that each rank needs and doesn't hold, summed over layers."""
        return self._sum(lambda layer: layer.received)

    @property
    def sent(self) -> PerRank:
        """Keys that each rank holds and others need, counted once for each of them, summed over layers."""
        return self._sum(lambda layer: layer.sent)

    @property
    def forward(self) -> PlannedPass:
        """Forward of all layers."""
        return self._pass("forward")

    @property
    def backward(self) -> PlannedPass:
        """Backward of all layers."""
        return self._pass("backward")

    @property
    def bytes_received(self) -> PerRank:
        """Bytes that reach each rank in a training step, forward and backward, of all layers."""
        return tuple(x + y for x, y in zip(self.forward.received, self.backward.received, strict=True))

    @property
    def bytes_sent(self) -> PerRank:
        """Bytes that leave each rank in a training step, likewise."""
        return tuple(x + y for x, y in zip(self.forward.sent, self.backward.sent, strict=True))

    @property
    def imbalance(self) -> float:
        """The largest work of a rank over the mean; 1 where nothing is visible."""
        return max(self.work) * self.world_size / (sum(self.work) or 1) or 1.0

    @property
    def seconds(self) -> float:
        """Of a training step's attention, as the cost model predicts them: each pass waits for its slowest rank."""
        return sum(x.count * (max(x.forward.seconds) + max(x.backward.seconds)) for x in self.layers)

    def tokens(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return sum(stop - start for start, stop in self._held("ShardPlan.tokens", rank))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Where a rank's tokens are in the sequence: (tokens,) int64, ascending; its position ids.

        Args:
            rank: from 0.
            device: where to put them.
        """
        held, on = self._held("ShardPlan.positions", rank), arguments.device("ShardPlan.positions", device)
        return torch.cat([torch.arange(*ends, device=on) for ends in (*held, (0, 0))])

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """What a rank holds of a tensor: a copy. Differentiable.

        Args:
            x: of any shape; its dimension `dim` is the sequence.
            rank: from 0.
            dim: the sequence's, from the end if negative.

        Returns:
            The rank's tokens, in ascending order.

        Raises:
            ArgumentError: the dimension has another length than the plan, or there is no such rank or dimension.
            ArgumentTypeError: x is no tensor; the others are no ints.
        """
        operation = "ShardPlan.shard"
        dim = _dimension(operation, "x", x, dim)
        if x.shape[dim] != self.seq_len:
            raise ArgumentError(
                f"{operation}: x has {x.shape[dim]} tokens in dimension {dim}, expected the plan's {self.seq_len}; "
                "pass the whole tensor, and the dimension of its tokens as dim="
            )
        held = self._held(operation, rank)
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in held or ((0, 0),)], dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 2) -> Tensor:
        """The whole tensor, of what all ranks hold: the reverse of `shard`. Differentiable.

        Args:
            parts: of each rank, in order.
            dim: the sequence's, from the end if negative.

        Raises:
            ArgumentError: there are more or fewer parts than ranks, or one has another length than its shard.
            ArgumentTypeError: they are no tensors.
        """
        operation = "ShardPlan.unshard"
        if not isinstance(parts, (list, tuple)):
            raise ArgumentTypeError(
                f"{operation}: parts is {arguments.by_type(parts)}, expected a list of tensors, one of each rank"
            )
        if len(parts) != self.world_size:
            raise ArgumentError(
                f"{operation}: parts has {len(parts)} tensors, expected one for each of the {self.world_size} ranks"
            )
        for rank, part in enumerate(parts):
            dim = _dimension(operation, f"parts[{rank}]", part, dim)
            if part.shape[dim] != self.tokens(rank):
                raise ArgumentError(
                    f"{operation}: parts[{rank}] has {part.shape[dim]} tokens in dimension {dim}, expected the "
                    f"{self.tokens(rank)} that rank {rank} holds; ShardPlan.shard makes such parts"
                )
        place = torch.cat([self.positions(rank) for rank in range(self.world_size)]).argsort()
        return torch.cat(list(parts), dim).index_select(dim, place.to(parts[0].device))

    def report(self) -> str:
        """What each rank holds, computes, receives and sends, and what else was tried: a table for people."""
        from maskflash.parallel.report import report

        return report(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as lists, numbers and texts, which JSON can hold."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"dtype": str(self.dtype)}))
        return found

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ShardPlan:
        """The plan that `to_dict` was of.

        Args:
            data: what `to_dict` has returned.

        Raises:
            ArgumentError: it has other fields.
            ArgumentTypeError: it is no dict.
        """
        top = _fields(ShardPlan, data)
        for name in ("shards", "layers", "tried"):
            if not isinstance(top[name], tuple):
                raise ArgumentTypeError(f"{_READ}: {name} is {arguments.by_type(top[name])}, expected a list")
        layers = [_fields(PlannedLayer, layer) for layer in top["layers"]]
        for layer in layers:
            layer |= {name: PlannedPass(**_fields(PlannedPass, layer[name])) for name in ("forward", "backward")}
        top["layers"] = tuple([PlannedLayer(**layer) for layer in layers])
        top["tried"] = tuple([Candidate(**_fields(Candidate, one)) for one in top["tried"]])
        top["links"] = Links(**_fields(Links, top["links"]))
        top["dtype"] = next((x for x in arguments.DTYPES if str(x) == top["dtype"]), top["dtype"])
        arguments.dtype(_READ, top["dtype"])
        for name in ("seq_len", "tile", "head_ranks", "batch", "heads", "kv_heads", "head_dim"):
            top[name] = arguments.integer(_READ, name, top[name], low=1)
        top["shards"] = checked(_READ, top["shards"], top["seq_len"], top["tile"])
        shared, ranks = top["head_ranks"], len(top["shards"])
        if ranks % shared:
            raise ArgumentError(f"{_READ}: head_ranks is {shared}, expected a divisor of the number of ranks, {ranks}")
        return ShardPlan(**top)

    def fingerprint(self) -> str:
        """A hash of who holds what: two plans share it where tokens, tile, shards and head ranks are the same.

        Returns:
            The sha256 of these, as 64 hexadecimal digits: the same in every process.
        """
        held = [self.seq_len, self.tile, self.head_ranks, self.shards]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def __repr__(self) -> str:
        return (
            f"ShardPlan({self.seq_len} tokens on {self.world_size} ranks, {self.name}, imbalance {self.imbalance:.3f}, "
            f"{sum(self.received)} keys travel)"
        )

    def _held(self, operation: str, rank: int) -> tuple[tuple[int, int], ...]:
        return self.shards[arguments.integer(operation, "rank", rank, high=self.world_size - 1)]

    def _sum(self, of: Callable[[PlannedLayer], PerRank]) -> PerRank:
        """Something of ranks, summed over all layers of the model."""
        return tuple(map(sum, zip(*([layer.count * x for x in of(layer)] for layer in self.layers), strict=True)))

    def _pass(self, name: str) -> PlannedPass:
        passes = [(layer.count, getattr(layer, name)) for layer in self.layers]
        return PlannedPass(
            *(
                tuple(map(sum, zip(*([n * x for x in getattr(one, field.name)] for n, one in passes), strict=True)))
                for field in fields(PlannedPass)
            )
        )


def _dimension(operation: str, name: str, x: Tensor, dim: int) -> int:
    """A dimension of a tensor, counted from its first."""
    arguments.instance(operation, name, x, Tensor, "torch.as_tensor makes one")
    dims = x.ndim
    if not dims:
        raise ArgumentError(f"{operation}: {name} has no dimension, expected one of tokens")
    return arguments.integer(operation, "dim", dim, low=-dims, high=dims - 1) % dims


def _fields(kind: type, data: Any) -> dict[str, Any]:
    """What a class was stored as: its fields, lists in them as tuples again."""
    names = [field.name for field in fields(kind)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        got = f"the keys {sorted(map(str, data))}" if isinstance(data, dict) else arguments.by_type(data)
        raise ArgumentError(
            f"{_READ}: a {kind.__name__} is {got}, expected {', '.join(names)}; ShardPlan.to_dict makes them"
        )
    return {name: _tuple(data[name]) for name in names}


def _tuple(value: Any) -> Any:
    return tuple([_tuple(x) for x in value]) if isinstance(value, list) else value
