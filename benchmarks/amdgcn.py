"""The assembly text of an AMD kernel -> what the gates ask of it; Triton compiles it without ROCm and without a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_BRANCH: Final = re.compile(r"^\s*s_c?branch\w*\s+(\.L\w+)", re.MULTILINE)
_LABEL: Final = re.compile(r"^(\.L\w+):", re.MULTILINE)
_PRODUCT: Final = re.compile(r"\bv_(mfma|wmma)_")
_SCRATCH: Final = re.compile(r"\bscratch_(?:load|store)_")


@dataclass(frozen=True, slots=True)
class Found:
    """What a kernel needs.

    Attributes:
        registers: of a lane, accumulation registers included.
        scratch: bytes of memory of its own that each lane has, where registers go that don't fit.
        scratch_in_loops: how often the innermost loops with products read or write it.
        product: "mfma" or "wmma", the instructions of matrix cores; "" where it has none.
        waves: that fit a SIMD at once, as far as registers go.
    """

    registers: int
    scratch: int
    scratch_in_loops: int
    product: str
    waves: int


def read(text: str) -> Found:
    """What a kernel's text says."""
    product = _PRODUCT.search(text)
    return Found(
        _number(text, "; TotalNumVgprs") or _number(text, "; NumVgprs"),
        _number(text, "; ScratchSize"),
        sum(len(_SCRATCH.findall(loop)) for loop in _loops(text)),
        product[1] if product else "",
        _number(text, "; Occupancy"),
    )


def _loops(text: str) -> list[str]:
    """The text of the innermost loops that hold products."""
    labels = {found[1]: found.end() for found in _LABEL.finditer(text)}
    spans = [(labels.get(found[1], len(text)), found.start()) for found in _BRANCH.finditer(text)]
    spans = [(start, end) for start, end in spans if start < end and _PRODUCT.search(text, start, end)]
    return [
        text[start:end]
        for start, end in spans
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]


def _number(text: str, name: str) -> int:
    found = re.search(rf"^{name}: (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
