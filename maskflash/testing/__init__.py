"""Tools for testing masks and attention: one assertion, and Hypothesis strategies for masks and shapes.

Hypothesis is an extra (`pip install maskflash[test]`); only the strategies import it.
"""

from maskflash.backends.reference import error_budget, reference
from maskflash.testing.dense import assert_matches_dense
from maskflash.testing.keep import dropout_keep
from maskflash.testing.shape import Shape
from maskflash.testing.strategies import columns, masks, scores, shapes

__all__ = [
    "Shape",
    "assert_matches_dense",
    "columns",
    "dropout_keep",
    "error_budget",
    "masks",
    "reference",
    "scores",
    "shapes",
]


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)
