"""Which of the groups that could go on does, and when a copy arrives: orders that a kernel must be right in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.ptx.threads import Threads


@dataclass(frozen=True, slots=True)
class Order:
    """One way to run a kernel.

    Attributes:
        name: of it.
        first: the group that runs, as long as it can: "text", the one that is behind in the text; "low" or "high", the
            one of the first or last warp; "turns", the one that has not run for the longest; "random".
        copies: when they arrive: "soon"; "late", once nobody can go on without; "random".
        seed: of what is random.
    """

    name: str
    first: str
    copies: str
    seed: int = 0

    def turns(self) -> Turns:
        """A run in this order."""
        return Turns(self)


TEXT: Final = Order("text", "text", "soon")
ORDERS: Final = (
    TEXT,
    Order("in turn", "turns", "soon"),
    Order("first warps first", "low", "late"),
    Order("last warps first", "high", "late"),
    Order("last warps first, copies soon", "high", "soon"),
    *(Order(f"random {seed}", "random", "random", seed) for seed in range(3)),
)


class Turns:
    """One run: what was chosen so far."""

    def __init__(self, order: Order) -> None:
        self.order, self.random = order, np.random.default_rng(order.seed)
        self.now, self.ran = 0, dict[int, int]()  # first thread of a group -> when it ran last

    def sorted(self, groups: list[Threads]) -> list[Threads]:
        """Groups in the order in which they are asked to go on."""
        self.now += 1
        first = self.order.first
        if first == "random":
            return [groups[n] for n in self.random.permutation(len(groups))]
        if first == "turns":
            out = sorted(groups, key=lambda group: (self.ran.get(int(group.ids[0]), 0), group.at))
            if out:
                self.ran[int(out[0].ids[0])] = self.now
            return out
        warp = (lambda group: int(group.thread[0])) if first == "low" else lambda group: -int(group.thread[0])
        return sorted(
            groups, key=(lambda group: group.at) if first == "text" else lambda group: (warp(group), group.at)
        )

    def landing(self, count: int) -> int | None:
        """Which of so many copies arrives now, if any, oldest first."""
        if self.order.copies == "late" or (self.order.copies == "random" and self.random.random() < 0.7):
            return None
        return self.any_landing(count)

    def any_landing(self, count: int) -> int:
        """Which of so many copies arrives now."""
        return int(self.random.integers(count)) if self.order.copies == "random" else 0
