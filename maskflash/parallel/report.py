"""A plan of shards -> tables of text: what each rank holds, computes and moves; each layer's cost; what was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from maskflash.ground.units import in_bytes, in_seconds

if TYPE_CHECKING:
    from maskflash.parallel.shard_plan import ShardPlan

_RANKS: Final = 64  # that are listed
_OF_RANKS: Final = (
    *("rank", "tokens", "ranges", "work", "keys in", "keys out", "forward in", "out", "backward in", "out"),
    *("messages", "seconds"),
)
_OF_LAYERS: Final = ("mask", "layers", "imbalance", "keys travel", "bytes travel", "forward", "backward")
_OF_TRIED: Final = ("tried", "head ranks", "seconds", "imbalance", "most bytes of a rank", "bytes of all")


def report(plan: ShardPlan) -> str:
    """What a plan says, for people."""
    ranks, forward, backward = plan.world_size, plan.forward, plan.backward
    all_work = sum(plan.work) or 1
    rows = [
        (
            f"{rank}",
            f"{plan.tokens(rank):,}",
            f"{len(plan.shards[rank]):,}",
            f"{100 * plan.work[rank] / all_work:.2f} %",
            f"{plan.received[rank]:,}",
            f"{plan.sent[rank]:,}",
            *(in_bytes(x[rank]) for x in (forward.received, forward.sent, backward.received, backward.sent)),
            f"{forward.messages[rank] + backward.messages[rank]:,}",
            in_seconds(forward.seconds[rank] + backward.seconds[rank]),
        )
        for rank in range(min(ranks, _RANKS))
    ]
    layers = [
        (
            layer.name,
            f"{layer.count}",
            f"{max(layer.work) * ranks / (sum(layer.work) or 1):.3f}",
            f"{sum(layer.received):,}",
            in_bytes(sum(layer.forward.received) + sum(layer.backward.received)),
            *(in_seconds(max(x.seconds)) for x in (layer.forward, layer.backward)),
        )
        for layer in plan.layers
    ]
    tried = [
        (
            x.name,
            f"{x.head_ranks}",
            in_seconds(x.seconds),
            f"{x.imbalance:.3f}",
            in_bytes(x.bytes_max),
            in_bytes(x.bytes_sum),
        )
        for x in plan.tried
    ]
    more = [f"... and {ranks - _RANKS:,} more ranks"] if ranks > _RANKS else []
    parts = [[_summary(plan)], [*_table(_OF_RANKS, rows), *more], _table(_OF_LAYERS, layers)]
    if tried:
        parts.append(_table(_OF_TRIED, tried))
    return "\n\n".join("\n".join(part) for part in parts)


def _summary(plan: ShardPlan) -> str:
    """The plan in a few sentences."""
    share = f", {plan.head_ranks} of them share the heads of their tokens" if plan.head_ranks > 1 else ""
    most, every = max(map(max, zip(plan.bytes_received, plan.bytes_sent, strict=True))), sum(plan.bytes_received)
    inexact = "" if all(x.exact for x in plan.layers) else "Some keys that nobody sees count as needed.\n"
    return (
        f"{plan.seq_len:,} tokens on {plan.world_size:,} ranks{share}: {plan.name}.\n"
        f"The largest work of a rank is {plan.imbalance:.3f} of the mean. A training step's attention takes "
        f"{in_seconds(plan.seconds)}, as predicted.\n{inexact}"
        f"It moves {in_bytes(every)} in all, and at most {in_bytes(most)} to a rank or from it."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    first, *rest = widths
    return [
        "  ".join((row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))))
        for row in (head, *rows)
    ]
