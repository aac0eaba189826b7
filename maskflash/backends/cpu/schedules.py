"""The rows of a plan -> the cheapest calls for one pass, dtype and size of call: found once, then looked up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch

from maskflash.backends.cpu.calls import Blocks, Call
from maskflash.backends.cpu.costs import Costs, Pass, candidates
from maskflash.backends.cpu.cover import Segments, cost_of, cover_segments
from maskflash.ground.copies import lasting


class Chain(NamedTuple):
    """Calls that follow one another, and their predicted cost, in pairs."""

    calls: list[Call]
    cost: float


def chained(calls: list[Call], pass_: Pass, cost_of: Callable[[Call], float]) -> list[Chain]:
    """Calls in chains that may run side by side, each in the calls' order: what they sum up is the same every time."""
    groups = [[n] for n in range(len(calls))]
    if any(call.merges for call in calls):
        groups = _apart(groups, [call.row_hull for call in calls])
    if pass_ == "backward":
        groups = _apart(groups, [call.column_hull for call in calls])
    return [Chain([calls[n] for n in sorted(g)], sum(cost_of(calls[n]) for n in g)) for g in groups]


def _apart(groups: list[list[int]], hulls: list[tuple[int, int]]) -> list[list[int]]:
    """Groups joined where one begins before another ends, so that no two of them share a token."""
    found: list[list[int]] = []
    reached = 0
    for start, stop, group in sorted((min(hulls[n][0] for n in g), max(hulls[n][1] for n in g), g) for g in groups):
        if not found or start >= reached:
            found.append([])
        found[-1] += group
        reached = max(reached, stop)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The calls of one pass. Every pair that is visible is in exactly one call.

    Attributes:
        native: compute in the tensors' own dtype, else in float32.
        chains: per (b, h) of the mask, its calls; those of different chains write to no token in common.
        cost: predicted, in pairs.
        merges: whether some rows are in several calls.
        complete: whether every row of every batch row and head is in a call, so that what it writes holds nothing else.
        only: the one call there is, if it computes all rows of every batch row and head.
    """

    native: bool
    chains: dict[tuple[int, int], list[Chain]]
    cost: float
    merges: bool
    complete: bool
    only: Call | None

    @staticmethod
    def of(native: bool, chains: dict[tuple[int, int], list[Chain]], q_len: int) -> Schedule:
        """The schedule of these chains, for so many rows."""
        calls = {unit: [call for chain in found for call in chain.calls] for unit, found in chains.items()}
        every = [call for found in calls.values() for call in found]
        single = every[0] if len(chains) == len(every) == 1 and not isinstance(every[0], Blocks) else None
        return Schedule(
            native,
            chains,
            cost=sum(chain.cost for found in chains.values() for chain in found),
            merges=any(call.merges for call in every),
            complete=all(sum(c.height for c in found if not c.merges) == q_len for found in calls.values()),
            only=single if single is not None and single.height == q_len else None,
        )

    def all_calls(self) -> Iterator[Call]:
        """Every call, chain by chain."""
        return (call for chains in self.chains.values() for chain in chains for call in chain.calls)


@dataclass(frozen=True, slots=True, eq=False)
class Schedules:
    """The schedules of one plan, each made when first asked for: one for each pass, dtype and power of four of work.

    Attributes:
        q_len: rows of the mask, in tokens.
        segments: regular rows, per (b, h) of the mask and layer: a row's further intervals are in further layers.
        strips: calls for irregular rows, per (b, h) of the mask.
        expect: told the calls of each new schedule.
    """

    q_len: int
    segments: dict[tuple[int, int], list[Segments]]
    strips: dict[tuple[int, int], list[Call]]
    expect: Callable[[Iterator[Call]], None]
    _found: dict[tuple[Pass, torch.dtype, int], Schedule] = field(default_factory=dict)
    _sole: dict[tuple[torch.dtype, int], Call | None] = field(default_factory=dict)

    def sole(self, dtype: torch.dtype, work: int) -> Call | None:
        """See `Plan.sole`; every small call asks for it, and one look-up is half the time of two schedules."""
        key = (dtype, _power(work))
        if key not in self._sole:
            forward, backward = self.cheapest("forward", dtype, work), self.cheapest("backward", dtype, work)
            whole = forward.native and backward.native and backward.only is not None
            self._sole[key] = forward.only if whole else None
        return self._sole[key]

    def cheapest(self, pass_: Pass, dtype: torch.dtype, work: int) -> Schedule:
        """The cheapest calls for one pass, all in one dtype; half types are merged from float32 only.

        Args:
            pass_: "forward" or "backward".
            dtype: of q, k and v.
            work: heads x head dim that one call computes.
        """
        power = _power(work)
        key = (pass_, dtype, power)
        found = self._found.get(key)
        if found is None:
            with lasting():
                options = [self._made(pass_, costs.for_work(4**power)) for costs in candidates(pass_, dtype)]
                # A native call rounds what it returns, so rows in several calls would be rounded several times.
                allowed = [s for s in options if not (dtype.itemsize == 2 and s.native and s.merges)]
                found = self._found[key] = min(allowed, key=lambda s: s.cost)
                self.expect(found.all_calls())
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all calls made so far."""
        calls = {id(c): c for of_unit in self.strips.values() for c in of_unit}
        calls.update((id(c), c) for s in self._found.values() for c in s.all_calls())
        return sum(c.nbytes for c in calls.values())

    def _made(self, pass_: Pass, costs: Costs) -> Schedule:
        chains = {
            unit: chained(_covered(layers, costs) + self.strips[unit], pass_, partial(cost_of, costs=costs))
            for unit, layers in self.segments.items()
        }
        return Schedule.of(costs.native, chains, self.q_len)


def _power(work: int) -> int:
    """Of four; works of about the same one share a schedule, since overheads matter to a factor of a few."""
    return round(math.log2(work) / 2) if work > 1 else 0


def _covered(layers: list[Segments], costs: Costs) -> list[Call]:
    """Calls that cover the layers, in their order: every layer after the first merges with what is there."""
    first, *further = (cover_segments(segments, costs) for segments in layers)
    return first + [replace(call, merges=True) for calls in further for call in calls]
