"""A mask at given lengths -> what a backend needs to run it: the passes in order, each with its one home.

    trace       masks/predicate.py     predicate -> expression (trace/trace.py), combinations joined (trace/combine.py)
    simplify    expr/simplify.py       the expression in normal form
    classify    analysis/classify.py   expression -> what rows see, and the block map, by the cheapest of its ways
    plan        backends/*/plan.py     what rows see -> what the backend walks: dense calls on the CPU, runs on a GPU

The first two depend on the mask alone and are kept by it; the others also on lengths and on table contents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maskflash.analysis.block_map import BlockMap
    from maskflash.analysis.problem import Problem
    from maskflash.backends.cpu.plan import Plan as CpuPlan
    from maskflash.backends.triton.plan import Plan as TritonPlan

Backend = Literal["cpu", "triton"]


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What is known of a mask at given lengths before any q, k or v. It is kept, and holds none of the mask's tables.

    Attributes:
        block_map: the mask's tiles.
        decided: how many of them each means decided.
        plan: what the backend runs.
    """

    block_map: BlockMap
    decided: dict[str, int]
    plan: CpuPlan | TritonPlan

    @property
    def nbytes(self) -> int:
        """Bytes held so far; a plan grows as passes first need it."""
        return self.block_map.nbytes + self.plan.nbytes


def analyse(problem: Problem, backend: Backend) -> Analysis:
    """Run the passes that depend on lengths and on table contents.

    They are loaded here, when first needed: `import maskflash` should cost next to nothing beside torch.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    from maskflash.analysis.classify import classify

    seen = classify(problem)
    plan: CpuPlan | TritonPlan
    if backend == "triton":
        from maskflash.backends.triton.plan import plan as triton_plan

        plan = triton_plan(seen, problem.device)
    else:
        from maskflash.backends.cpu.plan import plan as cpu_plan

        plan = cpu_plan(seen)
    return Analysis(seen.block_map, seen.decided, plan)
