"""Turns the job's figures into a table for people and into plain data for tools."""

from dataclasses import dataclass
from platform import python_version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import maskflash as mf
from maskflash.demo.checks import Check
from maskflash.demo.documents import Packed
from maskflash.demo.measure import PAIRS, Times
from maskflash.demo.workload import HEAD_DIM, HEADS


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the job found.

    Attributes:
        documents: the packed sequence.
        dtype: of q, k and v.
        seed: of documents and weights.
        density: visible pairs over all pairs.
        tiles: how many are full, partial and skip.
        analysis: seconds from predicate to block map.
        times: medians by contender, "maskflash" and "sdpa".
        peaks: bytes by contender; None where unknown.
        checks: each result's error beside its budget.
    """

    documents: Packed
    dtype: torch.dtype
    seed: int
    density: float
    tiles: dict[str, int]
    analysis: float
    times: dict[str, Times]
    peaks: dict[str, int | None]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data; times in seconds, memory in bytes, ratios are SDPA's over ours."""
        return {
            "tokens": len(self.documents.tokens),
            "documents": len(self.documents.lengths),
            "dtype": _name(self.dtype),
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "versions": {"maskflash": mf.__version__, "torch": torch.__version__, "python": python_version()},
            "density": self.density,
            "tiles": self.tiles,
            "analysis_seconds": self.analysis,
            **{f"{label}_seconds": self._seconds(label) for label in Times.__slots__},
            "peak_bytes": self._peaks(),
            "checks": [check.to_dict() for check in self.checks],
            "passed": self.passed,
        }

    def print(self, console: Console) -> None:
        """Write two tables: what it cost beside SDPA, and each check."""
        console.print(self._cost_table(), self._check_table(), sep="\n")

    def _cost_table(self) -> Table:
        lengths = self.documents.lengths
        table = _table(
            f"{len(lengths)} documents of {min(lengths):,} to {max(lengths):,} bytes packed into {sum(lengths):,} "
            f"tokens, {self.density:.1%} of pairs visible\n{_name(self.dtype)}, batch 1, {HEADS} heads of {HEAD_DIM}, "
            f"{torch.get_num_threads()} threads, medians of {PAIRS} alternating runs",
            ("", "maskflash", "SDPA, dense mask", "ratio"),
        )
        table.add_row("tiles", "\n".join(f"{count:,} {kind}" for kind, count in self.tiles.items()))
        table.add_row("analysis", _ms(self.analysis))
        for label in Times.__slots__:
            row = self._seconds(label)
            table.add_row(label, _ms(row["maskflash"]), _ms(row["sdpa"]), _times(row["ratio"]))
        peaks = self._peaks()
        table.add_row("peak memory¹", _mib(peaks["maskflash"]), _mib(peaks["sdpa"]), _times(peaks["ratio"]))
        table.caption = "¹ resident memory that mask, forward and backward add to a fresh process"
        return table

    def _check_table(self) -> Table:
        table = _table(
            "Largest error beside its budget, both against dense float64",
            ("result", "error", "budget", ""),
        )
        for check in self.checks:
            verdict = "[green]passed[/]" if check.passed else "[bold red]FAILED[/]"
            table.add_row(check.name, f"{check.error:.2g}", f"{check.budget:.2g}", verdict)
        return table

    def _seconds(self, label: str) -> dict[str, float]:
        seconds = {name: getattr(times, label) for name, times in self.times.items()}
        return {**seconds, "ratio": seconds["sdpa"] / seconds["maskflash"]}

    def _peaks(self) -> dict[str, float | None]:
        ours, dense = self.peaks["maskflash"], self.peaks["sdpa"]
        return {"maskflash": ours, "sdpa": dense, "ratio": dense / ours if ours and dense else None}


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _mib(count: float | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"
