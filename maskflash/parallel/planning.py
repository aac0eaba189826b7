"""A mask, or those of a model's layers, a sequence length and a number of ranks -> a plan of shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.ground.names import unexpected
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import MaskLike
from maskflash.masks.predicate import mask as as_mask
from maskflash.parallel import search
from maskflash.parallel.links import Links
from maskflash.parallel.needs import Needs, find_needs
from maskflash.parallel.price import LayerPrice, Load, Pass, price
from maskflash.parallel.routes import Shards, checked
from maskflash.parallel.shard_plan import PerRank, PlannedLayer, PlannedPass, ShardPlan

_OPERATION: Final = "parallel.plan"
_TILE: Final = 128
_OWN: Final = ("seq_len", "world_size", "kv_heads", "head_dim", "dtype", "chunk", "links", "shards", "head_ranks")


def plan(
    mask: MaskLike | Sequence[MaskLike | tuple[MaskLike, int]],
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
    shards: Shards | None = None,
    head_ranks: int | None = None,
    **args: Any,
) -> ShardPlan:
    """Plan which tokens each of several ranks holds, so that attention under a mask is soon done.

    Rows are computed where their tokens are; keys that a rank needs and doesn't hold travel. The plan is one of the
    candidates, the best of which local search improves. The cost model predicts the time of forward and backward on the
    slowest rank, all layers together. Of those that take at most 2 % longer than perfectly shared work (or, where none
    does, as much longer than the fastest), the plan has the least product of seconds and bytes. No process group is
    needed, and no tensor: every process that makes the same call gets the same plan.

        contiguous     balanced windows stay as they are: hardly any key travels
        zigzag         rank r of W has the r-th and the (2W - 1 - r)-th of 2W parts: balanced under a causal mask
        level          runs of even work, and the lightest tokens where there is room
        documents      whole documents, where they fit
        heap           chunks, the largest work first, each to the rank with the least
        affinity       likewise, to the rank that lacks the fewest keys, while balance allows

    Args:
        mask: a mask or a predicate; or a sequence of the masks of a model's layers, each alone or as (mask, layers).
            Then one plan serves all layers, and their work and bytes are summed.
        seq_len: tokens, which are queries and keys.
        world_size: ranks.
        batch: batch rows; each of them is laid out alike.
        heads: query heads.
        kv_heads: heads of k and v, which divide `heads`; None for as many.
        head_dim: of q, k and v, for bytes and operations.
        dtype: of q, k and v, for bytes.
        chunk: tokens; the plan gives multiples of as many to a rank. None leaves the choice to the plan: lines of 128
            tokens, or chunks of several.
        links: how fast ranks compute and bytes travel: measured ones, or "nvlink", "infiniband" or "cpu". None is
            "nvlink".
        shards: instead of a choice, for each rank its tokens as (start, stop), ascending and apart.
        head_ranks: how many ranks, one after the other, share the heads of their tokens; it divides `world_size`,
            `heads` and `kv_heads`. 1 lets keys alone travel; a mesh of two dimensions has its second. None leaves the
            choice to the plan, or is 1 where shards are given.
        **args: the masks' own arguments; each goes to the masks that take it.

    Returns:
        The plan. A rank holds at most ceil(seq_len / world_size) tokens, rounded up to a multiple of `chunk`, or of
        128 where that is None. Short sequences leave ranks without tokens.

    Raises:
        ArgumentError: a number out of range, or arguments that don't fit together.
        ArgumentTypeError: an argument of a wrong type, one that no mask takes, or one that a mask misses.
        MaskTraceError: a predicate does something that can't become an expression.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

    Source: the candidates are the field's; `maskflash/parallel/candidates.py` names whose.

    Example:
        >>> import maskflash as mf
        >>> plan = mf.parallel.plan(mf.causal(), 65536, 2, heads=32, kv_heads=8)
        >>> plan.imbalance < 1.02
        True
        >>> both = [(mf.sliding_window(127), 5), mf.causal()]  # five layers of windows for one that sees all
        >>> [layer.count for layer in mf.parallel.plan(both, 1024, 2).layers]
        [5, 1]
    """
    given = {"seq_len": seq_len, "world_size": world_size, "batch": batch, "heads": heads, "head_dim": head_dim}
    given["kv_heads"] = given["heads"] if kv_heads is None else kv_heads
    sizes = {name: arguments.length(_OPERATION, name, value, low=1) for name, value in given.items()}
    length, ranks = sizes.pop("seq_len"), sizes.pop("world_size")
    if sizes["heads"] % sizes["kv_heads"]:
        raise ArgumentError(
            f"{_OPERATION}: kv_heads is {sizes['kv_heads']}, expected a divisor of heads, {sizes['heads']}"
        )
    shared = None if head_ranks is None else arguments.length(_OPERATION, "head_ranks", head_ranks, low=1)
    for name, value in (("world_size", ranks), ("heads", sizes["heads"]), ("kv_heads", sizes["kv_heads"])):
        if shared is not None and value % shared:
            raise ArgumentError(f"{_OPERATION}: head_ranks is {shared}, expected a divisor of {name}, {value}")
    load = Load(**sizes, dtype=arguments.dtype(_OPERATION, dtype))
    most = None if chunk is None else arguments.length(_OPERATION, "chunk", chunk, low=1)
    rates = Links.of(links)
    tile = most if most is not None and most % _TILE else _TILE
    held = None if shards is None else checked(_OPERATION, shards, length, tile)
    if held is not None and len(held) != ranks:
        raise ArgumentError(f"{_OPERATION}: shards is of {len(held)} ranks, expected world_size, {ranks}")
    masks = _masks(mask)
    layers = [(_needs(x, length, tile, load, masks, args), count) for x, count in masks]
    if held is None:
        choice = search.choose(layers, ranks, chunk=most, head_ranks=shared, **sizes, dtype=load.dtype, links=rates)
        held, shared, name, tried = choice.shards, choice.head_ranks, choice.name, choice.tried
    else:
        shared, name, tried = shared or 1, "given", ()
    prices = price(layers, held, shared, load, rates)
    of_layers = [_layer(x.name, needs, cost) for (x, _), (needs, _), cost in zip(masks, layers, prices, strict=True)]
    return ShardPlan(length, tile, held, shared, name, tuple(of_layers), tried, **sizes, dtype=load.dtype, links=rates)


def _masks(given: Any) -> list[tuple[Mask, int]]:
    """Masks, and how many layers have each."""
    if not isinstance(given, (list, tuple)):
        return [(as_mask(given), 1)]
    if not given:
        raise ArgumentError(f"{_OPERATION}: mask is an empty sequence, expected at least one mask, or (mask, layers)")
    found = []
    for place, one in enumerate(given):
        pair = one if isinstance(one, (list, tuple)) else (one, 1)
        if len(pair) != 2 or not callable(pair[0]):
            raise ArgumentTypeError(
                f"{_OPERATION}: mask[{place}] is {arguments.by_type(one)}, expected a mask or (mask, layers); a single "
                "pair is a sequence of one: [(mask, layers)]"
            )
        count = arguments.integer(_OPERATION, f"the layers of mask[{place}]", pair[1], low=1)
        found.append((as_mask(pair[0]), count))
    return found


def _needs(
    mask: Mask, length: int, tile: int, load: Load, masks: list[tuple[Mask, int]], args: dict[str, Any]
) -> Needs:
    """What a mask's lines need, given all masks' arguments."""
    known = tuple(dict.fromkeys(name for other, _ in masks for name in other.keywords))
    for name in args:
        if name not in known:
            raise unexpected(_OPERATION, name, known)
    for name in mask.keywords:
        if name in _OWN:
            raise ArgumentError(
                f"{_OPERATION}: the argument {name!r} of {mask.name} would never reach it: the plan has one too; plan "
                f"a mask that has its value: mf.mask(lambda b, h, q, kv: f(b, h, q, kv, {name}=...))"
            )
    own = {name: value for name, value in args.items() if name in mask.keywords}
    call = {"batch": load.batch, "heads": load.heads, **own}
    return find_needs(mask.at_call(_OPERATION, length, length, call).problem, tile)


def _layer(name: str, needs: Needs, cost: LayerPrice) -> PlannedLayer:
    """What a layer costs, as plain numbers."""
    head_ranks = len(cost.work) // len(cost.keys)
    received, sent = ([int(x) for x in cost.keys.sum(axis).repeat(head_ranks)] for axis in (0, 1))
    work = tuple([round(x) for x in cost.work.tolist()])
    passes = _pass(cost.forward), _pass(cost.backward)
    return PlannedLayer(name, cost.count, work, tuple(received), tuple(sent), needs.exact, *passes)


def _pass(cost: Pass) -> PlannedPass:
    received, sent, messages = (_ints(x) for x in (cost.received, cost.sent, cost.messages))
    return PlannedPass(received, sent, messages, tuple(cost.seconds.tolist()))


def _ints(values: Any) -> PerRank:
    return tuple([int(x) for x in values.tolist()])
