"""A problem -> its block map, and who decided each tile: what an analysis only counts, told tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import Runs, Stretches
from maskflash.analysis.seen import Seen


@dataclass(frozen=True, slots=True, eq=False)
class Decided:
    """An analysis, and the tiles it had to evaluate.

    Every other way decides all tiles. Bounds prove tiles full or skip and samples prove them partial, so that a tile's
    kind tells who decided it, unless its pairs were evaluated.

    Attributes:
        seen: the analysis.
        evaluated: the evaluated tiles, along the lines of the map's rows; None where there are none.
    """

    seen: Seen
    evaluated: Runs | None


def decide(problem: Problem) -> Decided:
    """Analyse a problem, and tell which tiles were evaluated.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    seen = classify(problem)
    if not seen.decided["elements"]:
        return Decided(seen, None)
    assert seen.evaluated is not None, "of those that are counted"
    b, h, i, j = (x.numpy() for x in seen.evaluated.unbind(1))
    batch, heads, n_q, _ = seen.block_map.shape
    line: Any = (b * heads + h) * n_q + i
    stretches = Stretches(line, j, j + 1, np.ones(len(j), dtype=np.bool_))
    return Decided(seen, Runs.from_stretches(batch * heads * n_q, stretches, seen.problem.device))
