"""What a way has found of a problem -> its block map, who decided it, and what rows and columns see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.facts import Facts
from maskflash.analysis.intervals import Rows
from maskflash.analysis.problem import Problem

DECIDERS: Final = ("pairs", "formula", "intervals", "groups", "columns", "parts", "bounds", "samples", "elements")
"""Who decides tiles. Each of the first six decides all of a map or none."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the rows of a problem see: the result of its analysis.

    It holds the problem, and so the mask's tables.

    Attributes:
        facts: what was found of the problem on the way, and what is still to be found when it is first asked for.
        block_map: which tiles are full, partial or skip.
        decided: how many tiles each of DECIDERS decided.
        evaluated: (n, 4) int64, (b, h, i, j) of the tiles whose pairs all had to be evaluated; None where no tile was
            looked at.
    """

    facts: Facts
    block_map: BlockMap
    decided: dict[str, int]
    evaluated: Tensor | None = None

    @property
    def problem(self) -> Problem:
        """What was asked, on the CPU."""
        return self.facts.problem

    @property
    def largest(self) -> float:
        """A cap on the mask's 64-bit integers over all its pairs, before any wrapping, and on its tables' sizes."""
        sizes = (size for table in self.problem.inputs.tables for size in table.shape)
        return max(self.problem.largest(), *sizes, 0)

    def rows(self) -> Rows | None:
        """What rows see, found at the first call; None where only pairs tell."""
        return self.facts.rows

    def columns(self) -> Rows | None:
        """By which rows columns are seen, found at the first call: the rows of the problem turned over."""
        return self.facts.columns
