"""Who arrives at a program's mbarriers, and which copies fill what they guard -> when each of their phases is complete.

full    a phase is complete when the bytes of its last bulk copy are there; its n-th wait is for phase n
empty   a phase is complete when every warp that ever arrives has done so; a ring of k starts empty, so its n-th wait
        is for phase n - k, and the first k are for none
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.sass.work import Kind, Work


class MBarriers:
    """The mbarriers of a program, each known by its place; a ring of them is one."""

    def __init__(self, turns: Sequence[tuple[Sequence[Work], int]], depths: Mapping[int, int], ahead: int) -> None:
        """Before the first turn.

        Args:
            turns: of each role, and its warps.
            depths: how many mbarriers a ring has.
            ahead: phases that copies before the first turn complete.

        Raises:
            ValueError: if a role waits at an mbarrier that none fills and none arrives at.
        """
        self.depths, self.arriving = depths, defaultdict[int | None, int](int)
        self.complete: dict[int | None, list[float]] = {}
        for turn, warps in turns:
            named = [(work.kind, work.place) for work in turn]
            for place in {place for kind, place in named if kind is Kind.ARRIVE}:
                self.arriving[place] += warps
            self.complete |= {place: [0.0] * ahead for kind, place in named if kind is Kind.BULK_COPY}
        self.filled = set(self.complete)
        self.complete |= {place: [] for place in self.arriving}
        waited = {work.place for turn, _ in turns for work in turn if work.kind is Kind.WAIT_BARRIER}
        if alone := sorted(f"{place:#x}" for place in waited - set(self.complete) if place is not None):
            raise ValueError(
                f"mbarriers: got waits at {', '.join(alone)}, expected a role that copies to what they guard, or "
                "arrives there; the model cannot tell when these waits end"
            )
        self.arrived: dict[int | None, list[int]] = defaultdict(list)
        self.filling: dict[int | None, float] = defaultdict(float)

    def copy(self, work: Work, arrival: float) -> None:
        """A bulk copy is issued whose bytes will be there at a time."""
        self.filling[work.place] = max(self.filling[work.place], arrival)
        if work.closes:
            self.complete[work.place].append(self.filling.pop(work.place))

    def arrive(self, work: Work, before: int, now: float) -> None:
        """A warp arrives that did so some times before."""
        counts = self.arrived[work.place]
        counts += [0] * (before + 1 - len(counts))
        counts[before] += 1
        if counts[before] == self.arriving[work.place]:
            self.complete[work.place].append(now)

    def ready(self, work: Work, before: int) -> float | None:
        """When a warp's wait ends that waited some times before; None if that is not known yet."""
        phase = before if work.place in self.filled else before - self.depths.get(work.place or 0, 1)
        times = self.complete[work.place]
        return 0.0 if phase < 0 else times[phase] if phase < len(times) else None
