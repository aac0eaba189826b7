"""A score function of a batch of requests -> the same of a call with some of them, whose b looks up which they are."""

from __future__ import annotations

from typing import Any

import torch

from maskflash.functions.derived import Derived
from maskflash.functions.sizes import Sizes
from maskflash.masks.requests import REQUESTS, of_some
from maskflash.scores.score import Parted, Score
from maskflash.trace.trace import Traced


class ScoreOfRequests(Parted, Derived):
    """A score function of requests b, over batch rows that are some of them: see `masks/requests.py`."""

    of: Score

    def __init__(self, score: Score) -> None:
        super().__init__(f"{score.name} of requests", score, (REQUESTS,))

    def at(self, dtype: torch.dtype) -> ScoreOfRequests:
        """See `Score.at`."""
        return self.of.at(dtype).twin(ScoreOfRequests)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The function's trace, with its b looked up."""
        return of_some(self.trace_of(mask_args))

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """See `OfRequests.implied`."""
        return self.of.implied(sizes._replace(partial=True))
