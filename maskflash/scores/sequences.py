"""A score function of a batch of sequences -> the same of one row of packed tokens, which look theirs up."""

from __future__ import annotations

from typing import Any

import torch

from maskflash.functions.derived import Derived
from maskflash.functions.sizes import Sizes
from maskflash.masks.sequences import ARGUMENTS, of_packed_tokens
from maskflash.scores.score import Parted, Score
from maskflash.trace.trace import Traced


class ScoreInSequences(Parted, Derived):
    """A score function of sequences b, with q and kv inside them, over packed tokens: see `masks/sequences.py`."""

    of: Score

    def __init__(self, score: Score) -> None:
        super().__init__(f"{score.name} in sequences", score, ARGUMENTS)

    def at(self, dtype: torch.dtype) -> ScoreInSequences:
        """See `Score.at`."""
        return self.of.at(dtype).twin(ScoreInSequences)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The function's trace, of packed tokens."""
        return of_packed_tokens(self.trace_of(mask_args), alone=False)

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """See `InSequences.implied`."""
        return self.of.implied(sizes._replace(partial=True))
