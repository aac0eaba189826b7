"""How strongly a query attends to a key: score functions, their classes, what of them is a mask, and dropout.

The names here are presets: `mf.scores.softcap(20.0)` is what `score=` takes.
"""

from maskflash.scores.presets import (
    alibi,
    bias,
    distance_decay,
    forget_gate,
    key_bias,
    relative_bias,
    relative_table,
    softcap,
    temperature,
)

__all__ = [
    "alibi",
    "bias",
    "distance_decay",
    "forget_gate",
    "key_bias",
    "relative_bias",
    "relative_table",
    "softcap",
    "temperature",
]


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)
