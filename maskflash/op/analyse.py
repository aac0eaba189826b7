"""A mask at given lengths -> what a backend needs to run it: the passes in order, each with its one home.

    trace       masks/mask.py        predicate -> expression (expr/trace.py), combinations joined (expr/combine.py)
    simplify    expr/simplify.py     the expression in normal form
    classify    blocks/classify.py   expression -> block map: formulas, intervals, groups, pieces, parts; or tiles
    hulls       blocks/hulls.py      expression -> what rows see, where formulas, pieces or groups tell (CPU only)
    plan        kernels/*.py         block map -> what the backend walks: dense calls on the CPU, runs on a GPU

The first two depend on the mask alone and are kept by it; the others also on lengths and on table contents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from maskflash.analysis.classify import Classified
    from maskflash.analysis.problem import Problem
    from maskflash.backends.cpu.plan import Plan as CpuPlan
    from maskflash.backends.triton.plan import DevicePlan

Backend = Literal["cpu", "triton"]

_MANY_PAIRS: Final = 1 << 19  # in partial tiles: fewer are evaluated sooner than hulls are found


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What is known of a mask at given lengths before any q, k or v."""

    classified: Classified
    plan: CpuPlan | DevicePlan

    @property
    def nbytes(self) -> int:
        """Bytes held so far; a plan grows as passes first need it."""
        return self.classified.block_map.nbytes + self.plan.nbytes


def analyse(problem: Problem, backend: Backend) -> Analysis:
    """Run the passes that depend on lengths and on table contents.

    They are loaded here, when first needed: `import maskflash` should cost next to nothing beside torch.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    from maskflash.analysis.classify import classify

    device, problem = problem.device, problem.on_host()
    classified = classify(problem)
    if backend == "triton":
        from maskflash.backends.triton.plan import plan as triton_plan

        return Analysis(replace(classified, hulls=None), triton_plan(problem, classified, device))
    from maskflash.analysis.ways.ends import find_hulls
    from maskflash.backends.cpu.plan import plan as cpu_plan

    block_map = classified.block_map
    pairs = block_map.counts["partial"] * math.prod(block_map.block_size)
    hulls = classified.hulls or (find_hulls(problem) if pairs > _MANY_PAIRS else None)
    return Analysis(replace(classified, hulls=None), cpu_plan(block_map, problem.visible, hulls))
