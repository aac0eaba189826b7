"""Who meets whom -> what each warp knows to have happened: vector clocks, after Lamport (1978) and Mattern (1989).

    warp 0    1 ---- writes x (tag: warp 0, clock 1) -- arrives --> 2
                                                          |
    warp 1    1 ------------------------------------- waits ------> knows 1 of warp 0: x may be read

What a warp does carries its tag: who, and when by his own clock. Another may rely on it once it knows of that time.
Besides warps there are agents that work beside them, each with a clock of its own: the products of a warp, the copies
from shared memory that it began, and the copies to shared memory that an mbarrier counts.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tests.ptx.values import Array

AGENTS: Final = 256  # a tag is clock * AGENTS + agent
BEYOND: Final = 1 << 30  # tags from here on are nobody's: what they stand for, nobody knows to have happened
MBARRIERS: Final = 64  # in a block, at most


class Clocks:
    """The clocks of blocks that run together.

    Attributes:
        warps: of a block.
        products: the agent that multiplies for a block's first warp; the next one does for its next.
        stores: the agent that copies from shared memory for a block's first warp, and so on.
        loads: the agent that copies to shared memory for a block's first mbarrier, and so on.
        known: (warps of all blocks, agents) the latest time of each agent that a warp knows of.
        fenced: the same, of what it knew at its last `fence.proxy.async`: what the asynchronous proxy may rely on.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self.warps, self.products = warps, warps
        self.stores, self.loads = 2 * warps, 3 * warps
        self.known = np.zeros((blocks * warps, self.loads + MBARRIERS), np.int32)
        self.fenced = np.zeros_like(self.known)
        self._step(np.arange(blocks * warps))

    def tags(self, warps: Array) -> Array:
        """What these warps do now carries these."""
        own = warps % self.warps
        return np.asarray(self.known[warps, own] * AGENTS + own)

    def unknown(self, warps: Array, tags: Array) -> Array:
        """Which of (n, any) tags the warps (n,) do not know to have happened."""
        return np.asarray(tags // AGENTS > self.known[warps[:, None], tags % AGENTS])

    def unfenced(self, warps: Array, tags: Array) -> Array:
        """Which of (n, any) tags are of warps' own stores that no fence orders before the asynchronous proxy."""
        agents = tags % AGENTS
        return np.asarray((tags // AGENTS > self.fenced[warps[:, None], agents]) & (agents < self.warps))

    def meet(self, warps: Array) -> None:
        """The warps of each row of (meetings, warps) meet: all know what one of them knew."""
        for matrix in (self.known, self.fenced):
            matrix[warps] = matrix[warps].max(1, keepdims=True)
        self._step(warps.ravel())

    def fence(self, warps: Array) -> None:
        """What these warps know of now, the asynchronous proxy may rely on."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.known[warps])
        self._step(warps)

    def release(self, warp: int, to: Array) -> None:
        """Add what a warp knows to (2, agents): known and fenced."""
        np.maximum(to, (self.known[warp], self.fenced[warp]), out=to)
        self._step(np.array([warp]))

    def acquire(self, warps: Array, given: Array) -> None:
        """These warps get to know what (2, agents) has."""
        for matrix, row in zip((self.known, self.fenced), given, strict=True):
            matrix[warps] = np.maximum(matrix[warps], row)

    def _step(self, warps: Array) -> None:
        self.known[warps, warps % self.warps] += 1
