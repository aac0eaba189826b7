"""A schedule -> what our own tiles compute, in parts that may run side by side: some heads of one batch row each.

Heads that read one key head are never apart. Where the mask has heads of its own, each is a part for itself, and those
of one key head follow one another in one lane, since they add to the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from maskflash.backends.cpu.calls import Band, Call
from maskflash.backends.cpu.plan import Plan
from maskflash.backends.cpu.schedules import Schedule

TILE: Final = 1 << 18  # scores of one tile, of all its heads: what is computed of them stays in cache
WIDTH: Final = 512  # columns of a tile
_HEIGHT: Final = 256  # rows of a tile, where its heads leave room for as many
_WORTH: Final = 1 << 16  # scores of a tile: with fewer, starting its operations takes as long as they do
_MAX_SUMS: Final = 1 << 22  # elements of all lanes' gradients of tables


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Calls on some heads of one batch row, one after the other.

    Attributes:
        batch_row: b.
        heads: the query heads.
        kv_heads: the key heads that they read.
        calls: what is computed.
        cost: predicted, in pairs.
        tile: scores of a tile, of all its heads.
    """

    batch_row: int
    heads: range
    kv_heads: range
    calls: list[Call]
    cost: float
    tile: int

    def of_heads(self, x: Tensor) -> Tensor:
        """Its query heads of x (B, Hq, ...)."""
        return x[self.batch_row, self.heads.start : self.heads.stop]

    def of_kv_heads(self, x: Tensor) -> Tensor:
        """Its key heads of x (B, Hkv, ...)."""
        return x[self.batch_row, self.kv_heads.start : self.kv_heads.stop]

    def height(self, call: Call) -> int:
        """How many rows its tiles of a call have: where both edges move, as many more columns are computed for each."""
        rows = min(self.tile // (len(self.heads) * max(min(len(call.columns), WIDTH), 64)), _HEIGHT)
        if isinstance(call.mask, Band) and call.mask.start_step == call.mask.stop_step:
            rows = min(rows, max(call.mask.width // 4, _WORTH // (len(self.heads) * call.mask.width)))
        return max(rows, 32)


def works(plan: Plan, schedule: Schedule, q: Tensor, k: Tensor, *, times: int = 1) -> list[Work]:
    """All that a schedule computes, for q (B, Hq, Sq, D) and k (B, Hkv, Skv, D).

    Args:
        plan: of the mask.
        schedule: its calls.
        q: or its like.
        k: or its like.
        times: how much larger tiles are than usual, and how much lower, so of more heads: less is asked of Python for
            each score, and less is computed beyond a mask's edges.
    """
    tile = times * TILE
    (batch, heads, q_len), (kv_heads, kv_len) = q.shape[:3], k.shape[1:3]
    own_batch, own_heads = plan.block_map.shape[:2]
    group = heads // kv_heads
    pairs = min(q_len, _HEIGHT // times) * min(kv_len, WIDTH)
    step = max(min(tile // (group * max(pairs, 1)), kv_heads), 1)
    found: list[Work] = []
    for (b, h), chains in schedule.chains.items():
        for row in [b] if own_batch > 1 else range(batch):
            if own_heads > 1:
                parts = [(range(h, h + 1), range(h // group, h // group + 1))]
            else:
                blocks = [range(low, min(low + step, kv_heads)) for low in range(0, kv_heads, step)]
                parts = [(range(x.start * group, x.stop * group), x) for x in blocks]
            for of_q, of_kv in parts:
                found += [Work(row, of_q, of_kv, chain.calls, chain.cost * len(of_q), tile) for chain in chains]
    return found


def lanes(found: list[Work], *, by_kv_head: bool, size: int, shared: bool) -> list[list[Work]]:
    """Work in lanes that write to no memory in common, each in order; the same ones whatever the number of threads.

    Args:
        found: all work.
        by_kv_head: whether query heads of one key head may be in several works.
        size: elements of the gradients of tables that each lane sums up.
        shared: whether lanes of different heads sum them up in one memory.
    """
    groups: dict[tuple[int, ...], list[Work]] = {}
    for number, work in enumerate(found):
        head = work.kv_heads.start
        key = (head,) if shared else (work.batch_row, head) if by_kv_head else (number,)
        groups.setdefault(key, []).append(work)
    each = list(groups.values())
    if shared or not size:
        return each
    count = max(min(_MAX_SUMS // size, len(each)), 1)
    return [[work for group in each[lane::count] for work in group] for lane in range(count)]


def share(found: list[Work], size: int, *, by_head: bool) -> bool:
    """Whether lanes sum up gradients of tables in one memory: where each head has its own part of large ones."""
    return by_head and len(found) * size > _MAX_SUMS
