"""Calls of one pass -> a schedule: chains of calls, of which those that write to no token in common may run at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from maskflash.backends.cpu.calls import Blocks, Call
from maskflash.backends.cpu.costs import Pass


class Chain(NamedTuple):
    """Calls that follow one another, and their predicted cost, in pairs."""

    calls: list[Call]
    cost: float


def chained(calls: list[Call], pass_: Pass, cost_of: Callable[[Call], float]) -> list[Chain]:
    """Calls in chains that may run side by side, each in the calls' order: what they sum up is the same every time."""
    groups = [[n] for n in range(len(calls))]
    if any(call.merges for call in calls):
        groups = _apart(groups, [call.rows.hull for call in calls])
    if pass_ == "backward":
        groups = _apart(groups, [call.columns.hull for call in calls])
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
        single = every[0] if len(chains) == len(every) == 1 and not isinstance(every[0].rows, Blocks) else None
        return Schedule(
            native,
            chains,
            cost=sum(chain.cost for found in chains.values() for chain in found),
            merges=any(call.merges for call in every),
            complete=all(sum(c.rows.total for c in found if not c.merges) == q_len for found in calls.values()),
            only=single if single is not None and single.rows.total == q_len else None,
        )

    def all_calls(self) -> Iterator[Call]:
        """Every call, chain by chain."""
        return (call for chains in self.chains.values() for chain in chains for call in chain.calls)
