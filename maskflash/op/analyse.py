"""A mask at given lengths -> what a backend needs to run it: the passes in order, each with its one home.

    trace       trace/trace.py          predicate -> expression; those of combinations are joined (trace/combine.py)
    simplify    expr/simplify.py        the expression in normal form
    classify    analysis/classify.py    expression -> what rows see, and the block map, by the cheapest way
    plan        backends/*/plan.py      that -> what the backend walks: dense calls on the CPU, tiles on a GPU

The first two depend on the mask alone and are kept by it; the others also on lengths and on table contents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskflash.functions.sizes import Sizes
from maskflash.op.spec import ENGINES, Backend, Spec
from maskflash.scores.strength import Gradients

if TYPE_CHECKING:
    from maskflash.analysis.block_map import BlockMap
    from maskflash.analysis.problem import Problem
    from maskflash.backends.cpu.plan import Plan
    from maskflash.backends.triton.plan import DevicePlan
    from maskflash.engines.engine import Prepared


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What is known of a mask at given lengths before any q, k or v. It is kept, and holds none of the mask's tables.

    Attributes:
        block_map: the mask's tiles.
        decided: how many of them each means decided.
        plan: what the backend walks.
        backend: whose plan that is.
        run: its `run` module; or the engine of another library, which has the same functions.
    """

    block_map: BlockMap
    decided: dict[str, int]
    plan: Plan | DevicePlan | Prepared
    backend: Backend
    run: Any

    def forward(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse of a call that the spec asks for."""
        found: tuple[Tensor, Tensor] = self.run.forward(self.plan, *self._of_mask(spec, q, k), q, k, v, spec.strength)
        return found

    def backward(
        self,
        spec: Spec,
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> Gradients:
        """The gradients of all that has one, from those of out and lse; None stands for zeros."""
        dout = torch.zeros_like(out) if dout is None else dout
        of_mask = self._of_mask(spec, q, k)
        found: Gradients = self.run.backward(self.plan, *of_mask, dout, dlse, q, k, v, out, lse, spec.strength)
        return found

    def at_once(self, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """`out` of the one dense call that is all there is to do, made so that torch differentiates it; else None."""
        if self.backend != "cpu":
            return None
        call = self.run.sole_call(self.plan, q, k, v)
        return None if call is None else self.run.attend(self.plan, call, q, k, v, scale)

    def differentiable(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Out and lse that torch differentiates through an engine's own functions; None where no engine runs."""
        if self.backend not in ENGINES:
            return None
        of_mask = self._of_mask(spec, q, k)
        found: tuple[Tensor, Tensor] = self.run.differentiable(self.plan, *of_mask, q, k, v, spec.strength)
        return found

    def _of_mask(self, spec: Spec, q: Tensor, k: Tensor) -> tuple[Problem, ...]:
        """What a backend that evaluates pairs itself needs beside its plan."""
        return () if self.backend == "cpu" else (spec.problem(Sizes.of(q, k)),)

    @property
    def nbytes(self) -> int:
        """Bytes held so far; a plan grows as passes first need it."""
        return self.block_map.nbytes + self.plan.nbytes


def analyse(problem: Problem, backend: Backend) -> Analysis:
    """Run the passes that depend on lengths and on table contents.

    They are loaded here, when first needed: `import maskflash` should cost next to nothing beside torch.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
        UnsupportedMask: an engine has no such form.
    """
    from maskflash.analysis.classify import classify

    seen = classify(problem)
    if backend in ENGINES:
        from maskflash.engines import named

        engine = named.ENGINES[backend]
        return Analysis(seen.block_map, seen.decided, engine.prepare(seen, problem), backend, engine)
    if backend == "triton":
        from maskflash.backends.triton import run as triton

        return Analysis(seen.block_map, seen.decided, triton.plan(seen, problem.device), backend, triton)
    from maskflash.backends.cpu import run as cpu

    return Analysis(seen.block_map, seen.decided, cpu.plan(seen), backend, cpu)
