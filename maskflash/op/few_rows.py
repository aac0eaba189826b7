"""A call with few rows on the CPU -> out and lse at once: what a step of decoding takes instead of an analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from maskflash.backends.cpu import few
from maskflash.functions.sizes import Sizes
from maskflash.op import cache
from maskflash.op.spec import Spec
from maskflash.scores.strength import Gradients

if TYPE_CHECKING:
    from maskflash.analysis.problem import Problem


@dataclass(frozen=True, slots=True, eq=False)
class FewRows:
    """What the few rows of one call see; it is made for the call, and nobody keeps it.

    Attributes:
        units: what they see.
    """

    units: list[few.Unit]

    @staticmethod
    def of(spec: Spec, q: Tensor, k: Tensor) -> FewRows | None:
        """That of a call; None where an analysis serves it.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
        """
        if spec.backend != "cpu" or spec.seed is not None or not may_be(q, k):
            return None
        problem = spec.problem(Sizes.of(q, k))
        if not applies(problem, scored=bool(spec.score)):
            return None
        return FewRows(few.look(problem, q.shape[1], k.shape[1]))

    def forward(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse."""
        score = spec.strength.score
        scored = None if score is None else few.scored(score, len(q), q.shape[1], q.shape[2], k.shape[2])
        return few.forward(self.units, q, k, v, spec.scale, spec.sinks, scored)

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


def applies(problem: Problem, *, scored: bool) -> bool:
    """Whether calls on the CPU with this mask at these sizes are steps; `scored`: by a score function of all heads."""
    batch, heads = problem.shape[:2]
    return few.are_few(batch, problem.heads if scored else heads, problem.q_len, problem.kv_len)


def may_be(q: Tensor, k: Tensor) -> bool:
    """Whether a call with such tensors may be a step: then it has no name to be found by."""
    if q.device.type != "cpu" or q.is_nested or k.is_nested or not q.ndim == k.ndim == 4:
        return False
    return few.are_few(1, 1, q.shape[2], k.shape[2])
