"""Stored results of packed documents -> bars of time in text, which a git host, a site and an index show alike.

    training step        dense mask  ████████████████  1.64 s
                         maskflash   ██████            591 ms

Each pair of bars has its own scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks import runner
from benchmarks.runner import Row, Spread

BARS: Final = 40  # characters of the longer bar
QUESTIONS: Final = {"Attention": "attention", "Training": "train_packed"}
_DOCUMENTS: Final = {"table": "documents", "case": "causal documents", "tokens": 8192}
CASES: Final = (
    ("attention, 8,192 tokens", "attention", _DOCUMENTS | {"measure": "forward"}),
    ("with its backward", "attention", _DOCUMENTS | {"measure": "forward + backward"}),
    ("training step, 4,096 tokens", "train_packed", {"table": "speed", "measure": "time", "tokens": 4096}),
)
"""What a pair of bars is called, the question whose rows have it, and which row it is; float32."""


def chart(rows: Mapping[str, Sequence[Any]]) -> str:
    """A pair of bars for each case that was measured, each pair to its own scale."""
    lines = []
    for title, question, wanted in CASES:
        found = [row for row in rows.get(question, ()) if _is(row, {**wanted, "dtype": "float32"})]
        lines += [line for row in found for line in _pair(title, row)]
    return "\n".join(f"    {line}" for line in lines)


def _is(row: Row, wanted: Mapping[str, Any]) -> bool:
    return all(getattr(row, name) == value for name, value in wanted.items())


def _pair(title: str, row: Row) -> list[str]:
    assert row.theirs is not None
    longest = max(row.ours.p50, row.theirs.p50)
    lines = []
    for heading, name, seconds in ((title, "dense mask", row.theirs.p50), ("", "maskflash", row.ours.p50)):
        bar = "█" * max(1, round(BARS * seconds / longest))
        lines.append(f"{heading:<29}{name:<12}{bar:<{BARS + 2}}{runner.spread(Spread(seconds, seconds, seconds), 's')}")
    return lines
