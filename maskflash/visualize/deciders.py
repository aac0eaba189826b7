"""A problem -> its block map, and who decided each tile: what an analysis only counts, told tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.classify import Classified, classify
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import Runs, Segments
from maskflash.analysis.ways.meets import find_meets
from maskflash.analysis.ways.tiles import Tiles


@dataclass(frozen=True, slots=True, eq=False)
class Decided:
    """An analysis, and the tiles it had to evaluate.

    Every other way decides all tiles. Bounds prove tiles full or skip and samples prove them partial, so that a tile's
    kind tells who decided it, unless its pairs were evaluated.

    Attributes:
        classified: the analysis.
        evaluated: the evaluated tiles, along the lines of the map's rows; None where there are none.
    """

    classified: Classified
    evaluated: Runs | None


class _Watched(Tiles):
    """Tiles that remember which of them were evaluated."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.evaluated: list[Tensor] = []

    def _evaluate(self, tiles: Tensor) -> None:
        self.evaluated.append(tiles)
        super()._evaluate(tiles)


def decide(problem: Problem) -> Decided:
    """Analyse a problem; where tiles were evaluated, go through its tiles again to see which.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    classified = classify(problem)
    if not classified.by_elements:
        return Decided(classified, None)
    watched = _Watched(problem)
    watched.meets = find_meets(problem, watched.undecided)
    watched.settle(lambda pairs: True)  # as the analysis did, since it says that tiles were evaluated
    b, h, i, j = (x.cpu().numpy() for x in torch.cat(watched.evaluated).unbind(1))
    _, heads, n_q, _ = problem.shape
    line: Any = (b * heads + h) * n_q + i
    lines = problem.shape[0] * heads * n_q
    segments = Segments(line, j, j + 1, np.ones(len(j), dtype=np.bool_))
    return Decided(classified, Runs.from_segments(lines, segments, problem.device))
