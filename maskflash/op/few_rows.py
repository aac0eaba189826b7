"""A call with few rows -> out and lse at once: what a step of decoding takes instead of an analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from maskflash.backends.cpu import few
from maskflash.backends.cpu.scored import ScoredPairs
from maskflash.errors import BackendError
from maskflash.functions.sizes import Sizes
from maskflash.ground.transfer import capturing
from maskflash.op import cache
from maskflash.op.spec import Spec
from maskflash.scores.strength import Gradients

if TYPE_CHECKING:
    from maskflash.analysis.problem import Problem


@dataclass(frozen=True, slots=True, eq=False)
class FewRows:
    """The few rows of one call; it is made for the call, and nobody keeps it.

    Attributes:
        problem: the mask.
        units: what they see; None on a GPU, whose kernel finds it.
        scored: the score function on all pairs; None where there is none, and on a GPU.
    """

    problem: Problem
    units: list[few.Unit] | None = None
    scored: ScoredPairs | None = None

    @staticmethod
    def of(spec: Spec, q: Tensor, k: Tensor) -> FewRows | None:
        """Those of a call; None where an analysis serves it.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
            BackendError: a CUDA graph is being captured, and only what tables hold could show that there is none.
        """
        if spec.seed is not None or spec.precision == "fp8" or not may_be(q, k):
            return None
        if spec.backend == "cpu":
            problem = spec.problem(Sizes.of(q, k))
            if not applies(problem, scored=bool(spec.score)):
                return None
            visible, score = few.look(problem), spec.strength.score
            scored = None if score is None else few.scored(score, len(q), q.shape[1], q.shape[2], k.shape[2])
            if scored is not None:
                scored.check(visible)
            return FewRows(problem, few.units_of(visible.numpy(), problem.batch, q.shape[1], k.shape[1]), scored)
        if spec.backend != "triton":
            return None
        from maskflash.backends.triton.few import are_few

        if not are_few(q.shape[2], k.shape[2]):
            return None
        sizes = Sizes.of(q, k)
        problem = spec.problem(sizes)
        if not shown(spec, problem):
            cache.find(spec, sizes)  # whose analysis reads the tables
            cache.check_reads(spec, sizes)
        return FewRows(problem)

    def forward(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor, *, tuning: bool = False) -> tuple[Tensor, Tensor]:
        """Out and lse."""
        if self.units is not None:
            return few.forward(self.units, q, k, v, spec.scale, spec.sinks, self.scored)
        from maskflash.backends.triton import run as triton

        return triton.few.forward(self.problem, q, k, v, spec.strength, splits=spec.splits or None, tuning=tuning)

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
        """The gradients, by an analysis."""
        return cache.find(spec, Sizes.of(q, k), saved=True).backward(spec, dout, dlse, q, k, v, out, lse)

    def differentiable(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Nothing: what torch differentiates itself comes from an analysis."""
        return

    def at_once(self, scale: float, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Nothing: see `differentiable`."""
        return


def shown(spec: Spec, problem: Problem, *, paged: bool = False) -> bool:
    """Whether sizes alone show that a mask and a score on a GPU look up only what is there.

    Raises:
        BackendError: they don't, and a CUDA graph is being captured, in which nothing can be read.
    """
    from maskflash.backends.triton.few import is_shown

    if is_shown(problem, spec.strength.score, paged=paged):
        return True
    if capturing(problem.device):
        raise BackendError(
            "attention: a CUDA graph is being captured, and only what tensors hold could show that the mask, or the "
            "score, looks up what is there; bound its indices by the tables' sizes, as in `table[min(q, n - 1)]`, or "
            "capture a call whose offsets are numbers"
        )
    return False


def applies(problem: Problem, *, scored: bool) -> bool:
    """Whether calls on the CPU with this mask at these sizes are steps; `scored`: by a score function of all heads."""
    batch, heads = problem.shape[:2]
    return few.are_few(batch, problem.heads if scored else heads, problem.q_len, problem.kv_len)


def may_be(q: Tensor, k: Tensor) -> bool:
    """Whether a call with such tensors may be a step: then it has no name to be found by."""
    if q.device.type not in ("cpu", "cuda") or q.is_nested or k.is_nested or not q.ndim == k.ndim == 4:
        return False
    return few.are_few(1, 1, q.shape[2], k.shape[2])
