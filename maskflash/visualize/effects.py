"""A mask and a score function -> what it adds to a score, of each visible pair or of sampled ones in each square.

f(score, b, h, q, kv) - score        for one score, the same of all pairs: 0 unless another is asked for
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from maskflash.analysis.problem import Problem
from maskflash.expr.evaluate import Inputs, compute
from maskflash.expr.nodes import Expr
from maskflash.ground import arguments
from maskflash.masks.combination import Combination
from maskflash.masks.mask import Mask
from maskflash.masks.sight import Sight
from maskflash.scores.lifting import Lifted, has_holes
from maskflash.scores.reads import check_pairs
from maskflash.scores.score import Score, ScoreLike, as_score, own_arguments

SAMPLES: Final = 16  # along each side of a square; all of its tokens where it has no more

Numbers = NDArray[np.float64]


class Added(NamedTuple):
    """What is added in squares of pairs: (rows, columns) each, over the visible pairs that were looked at.

    Attributes:
        mean: NaN where none of them is visible.
        least: likewise.
        largest: likewise.
    """

    mean: Numbers
    least: Numbers
    largest: Numbers


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """A score function under a mask, at the lengths of a call.

    Attributes:
        name: of the score function.
        at: the score that it changes.
        sight: what is visible: the mask, and what the score function leaves of it.
        problem: the same, on the CPU.
        expr: the score function's program, as far as it isn't a mask.
        inputs: the values of its slots, on the CPU.
    """

    name: str
    at: float
    sight: Sight
    problem: Problem
    expr: Expr
    inputs: Inputs

    @classmethod
    def of(
        cls, operation: str, mask: Mask, score: ScoreLike, at: float, q_len: int, kv_len: int, call: dict[str, Any]
    ) -> Self:
        """What a score function does in a call; `call` has its arguments by name: see `Mask.at`.

        Raises:
            ArgumentTypeError: the score function is none, or `at` no number.
            ArgumentError: lengths, or arguments, that don't fit.
        """
        found = as_score(operation, score)
        at = arguments.real(operation, "at", at)
        sight = Combination("and", mask, Lifted(found)).at_call(operation, q_len, kv_len, call)
        inputs = _bound(found, sight)[1]
        if has_holes(inputs.tables):
            sight = Combination("and", mask, Lifted(found, holes=True)).at_call(operation, q_len, kv_len, call)
        return cls(found.name, at, sight, sight.problem.on_host(), *_bound(found, sight))

    @property
    def shape(self) -> tuple[int, int]:
        """Batch rows and heads that differ; 1 where they are all alike."""
        batch, heads = self.problem.shape[:2]
        return (
            self.problem.batch if "b" in self.expr.reads else batch,
            self.problem.heads if "h" in self.expr.reads else heads,
        )

    def added(self, b: int, h: int, square: tuple[int, int]) -> Added:
        """What is added in each square of so many rows and columns.

        Of a square with more than 16 tokens along a side, 16 of them are looked at, evenly from the first to the last.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
        """
        (q, first_q), (kv, first_kv) = (
            _sampled(length, side)
            for length, side in zip((self.problem.q_len, self.problem.kv_len), square, strict=True)
        )
        value = self._values(b, h, torch.from_numpy(q)[:, None], torch.from_numpy(kv))
        if not value.size:
            empty = np.zeros((len(first_q), len(first_kv)))
            return Added(empty, empty, empty)

        def folded(operation: np.ufunc, x: NDArray[Any]) -> Numbers:
            found: Numbers = operation.reduceat(operation.reduceat(x, first_q, axis=0), first_kv, axis=1)
            return found

        seen = folded(np.add, (~np.isnan(value)).astype(np.float64))
        with warnings.catch_warnings(action="ignore"):  # of 0 / 0 where nothing is visible
            mean = folded(np.add, np.nan_to_num(value)) / seen
        return Added(mean, folded(np.fmin, value), folded(np.fmax, value))

    def _values(self, b: int, h: int, q: torch.Tensor, kv: torch.Tensor) -> Numbers:
        """What is added to each pair; NaN where it is hidden, by the mask or by a score of -inf."""
        pairs = self.problem.indices(torch.tensor(b), torch.tensor(h), q, kv)
        visible = self.problem.visible(torch.tensor(b), torch.tensor(h), q, kv).expand(len(q), len(kv))
        if visible.numel():
            check_pairs(pairs, visible, self.expr, self.inputs)
        score = torch.tensor(self.at, dtype=torch.float32)
        value = compute(self.expr, self.inputs, {**pairs, "score": score})[0].double() - score.double()
        visible = visible & (value != -torch.inf)
        return torch.where(visible, value, torch.nan).numpy()


def _bound(score: Score, sight: Sight) -> tuple[Expr, Inputs]:
    """What a score function makes of visible pairs in a call, and what fills its slots."""
    bound = score.bind(sight.sizes, own_arguments(score, sight.mask_args))
    params, tables = bound.inputs.params, bound.inputs.tables
    return bound.slots.expr, Inputs(params, tuple(table.detach().cpu() for table in tables))


def _sampled(length: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Which tokens are looked at, in order, and where among them those of each square begin."""
    start = np.arange(0, length, side)
    last = np.minimum(start + side, length) - 1 - start
    steps = np.linspace(0, 1, SAMPLES)
    found = np.unique(start[:, None] + np.rint(last[:, None] * steps).astype(np.int64))
    return found, found.searchsorted(start)
