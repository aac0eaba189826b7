"""Asynchronous work that was begun -> what is still in flight: copies of `cp.async`, products of `wgmma`.

Each thread counts its commits. What it begins belongs to the group of its next commit, and `wait_group n` ends all of
its groups but the last n:

    begin begin commit   begin commit   begin commit   wait_group 1
    '---- group 0 ----'  '- group 1 -'  '- group 2 -'  0 and 1 have ended
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.clocks import Clocks
from tests.ptx.faults import Fault
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.values import Array


@dataclass(slots=True)
class Copy:
    """One cp.async: by which threads, of which of their groups, whereto, and what; (threads, bytes)."""

    ids: Array
    group: Array
    places: Array
    rows: Array


class Copies:
    """The copies of threads 0 to threads - 1 that are in flight."""

    def __init__(self, shared: SharedMemory, threads: int) -> None:
        self.shared, self.commits = shared, np.zeros(threads, np.int64)
        self.open: list[Copy] = []

    def begin(self, ids: Array, address: Array, rows: Array) -> None:
        """Copy (threads, bytes) to shared memory, some time later."""
        if len(ids):
            places = self.shared.start_copy(ids, address, rows.shape[1])
            self.open.append(Copy(ids, self.commits[ids], places, rows))

    def commit(self, ids: Array) -> None:
        """End these threads' group."""
        self.commits[ids] += 1

    def wait(self, ids: Array, left: int) -> None:
        """Let all but the last `left` groups of these threads arrive."""
        waiting = np.zeros(len(self.commits), np.bool_)
        waiting[ids] = True
        still = []
        for copy in self.open:
            done = waiting[copy.ids] & (copy.group < self.commits[copy.ids] - left)
            if done.any():
                tags = self.shared.clocks.tags(copy.ids[done] // 32)
                self.shared.end_copy(copy.places[done], copy.rows[done], tags)
            if not done.all():
                still.append(Copy(copy.ids[~done], copy.group[~done], copy.places[~done], copy.rows[~done]))
        self.open = still


@dataclass(slots=True)
class Product:
    """One wgmma: by which warps, of which of their groups, its number among theirs, and which registers it uses."""

    warps: Array
    group: Array
    number: Array
    sums: frozenset[int]
    inputs: frozenset[int]


class Products:
    """The products of warps that are in flight, and the registers that no `wgmma.fence` has ordered.

    Attributes:
        begun: of each warp.
        commits: of each warp.
        ordered: which warps have passed a fence.
        open: what is in flight.
        touched: register -> warps that read or wrote it, other than by wgmma, since their last fence.
    """

    def __init__(self, clocks: Clocks) -> None:
        warps = len(clocks.known)
        self.clocks, self.begun = clocks, np.zeros(warps, np.int64)
        self.commits, self.ordered = np.zeros(warps, np.int64), np.zeros(warps, np.bool_)
        self.open: list[Product] = []
        self.touched: dict[int, Array] = {}

    def touch(self, warps: Array, registers: frozenset[int]) -> None:
        """An instruction reads or writes these registers of products.

        Raises:
            Fault: a product in flight has them.
        """
        for product in self.open:
            if registers & (product.sums | product.inputs) and np.isin(warps, product.warps).any():
                raise Fault("wgmma registers", "a product in flight uses them, and no wait_group came between")
        for register in registers:
            self.touched.setdefault(register, np.zeros(len(self.commits), np.bool_))[warps] = True

    def fence(self, warps: Array) -> None:
        """Order registers before the products that follow."""
        self.ordered[warps] = True
        for touched in self.touched.values():
            touched[warps] = False

    def begin(self, warps: Array, sums: frozenset[int], inputs: frozenset[int]) -> None:
        """Start a product. Sums of another one in flight may only be summed on.

        Raises:
            Fault: registers of it were used since the last fence, or are inputs that another one is still to write.
        """
        used = any(self.touched[x][warps].any() for x in sums | inputs if x in self.touched)
        if used or not self.ordered[warps].all():
            raise Fault("wgmma fence", "its registers were used, and no wgmma.fence came between")
        if any(inputs & product.sums and np.isin(warps, product.warps).any() for product in self.open):
            raise Fault("wgmma registers", "a product in flight is still to write its inputs")
        self.begun[warps] += 1
        self.open.append(Product(warps, self.commits[warps], self.begun[warps], sums, inputs))

    def readers(self, warps: Array) -> tuple[Array, Array]:
        """The agents that multiply for warps, and the times by their clocks at which the next product ends."""
        return warps % self.clocks.warps + self.clocks.products, self.begun[warps] + 1

    def commit(self, warps: Array) -> None:
        """End these warps' group."""
        self.commits[warps] += 1

    def wait(self, warps: Array, left: int) -> None:
        """End all but the last `left` groups of these warps."""
        still, known = [], self.clocks.known
        for product in self.open:
            done = np.isin(product.warps, warps) & (product.group < self.commits[product.warps] - left)
            ended = product.warps[done]
            known[ended, ended % self.clocks.warps + self.clocks.products] = product.number[done]
            if not done.all():
                kept = product.warps[~done], product.group[~done], product.number[~done]
                still.append(Product(*kept, product.sums, product.inputs))
        self.open = still
