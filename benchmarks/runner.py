"""Two contenders, run by turns in one process, -> rows with p20/p50/p80: printed as tables and stored as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import maskflash as mf

ROOT: Final = Path(__file__).parents[1]
PAIRS: Final = 9  # of timings, unless a script says otherwise
WIDTH: Final = 150  # of a table where the output is no terminal
_NOTICEABLE: Final = 0.2  # seconds; the kernel counts others' in hundredths
_OTHERS: Final = 0.1  # of a core
_TRIES: Final = 3

Contender = Callable[[], Sequence[float]]
"""Runs once and returns the seconds of each of its parts."""


@dataclass(frozen=True, slots=True)
class Spread:
    """20th, 50th and 80th percentile of samples."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The percentiles of samples, between neighbours by straight lines."""
        return Spread(*np.percentile(samples, (20, 50, 80)).tolist())


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside what it has to reach.

    Attributes:
        table: which table it belongs to.
        case: what was computed.
        tokens: length of the sequence.
        measure: "forward", "time", "peak memory" and the like.
        dtype: of the tensors, or "".
        unit: "s" or "B", of `ours` and `theirs`; "x" of a growth.
        samples: how many of each side.
        ours: maskflash.
        theirs: the baseline; None where there is none.
        ratio: of the pairs, larger is better; for an efficiency it holds the visited fraction too.
        visited: fraction of 128 x 128 tiles that the mask leaves to visit, where the ratio uses it.
        floor: least median ratio wanted.
        ceiling: largest median of `ours` wanted.
        tiles: how many are full, partial and skip, in a row about a block map.
        predicted: what a model said of `ours` before it was measured.
    """

    table: str
    case: str
    tokens: int
    measure: str
    dtype: str
    unit: str
    samples: int
    ours: Spread
    theirs: Spread | None = None
    ratio: Spread | None = None
    visited: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    tiles: str | None = None
    predicted: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median reaches what is wanted; None where nothing is."""
        if self.floor is not None and self.ratio is not None:
            return self.ratio.p50 >= self.floor
        return None if self.ceiling is None else self.ours.p50 <= self.ceiling


def compared(
    table: str,
    case: str,
    tokens: int,
    measure: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    dtype: str = "",
    unit: str = "s",
    visited: float | None = None,
    floor: float | None = None,
) -> Row:
    """A row of pairs; the ratio's spread is that of the pairs' own ratios."""
    factor = 1.0 if visited is None else visited
    ratios = [factor * b / a for a, b in zip(ours, theirs, strict=True)]
    spreads = Spread.of(ours), Spread.of(theirs), Spread.of(ratios)
    return Row(table, case, tokens, measure, dtype, unit, len(ours), *spreads, visited, floor)


def alone(
    table: str, case: str, tokens: int, measure: str, samples: Sequence[float], *, ceiling: float | None = None
) -> Row:
    """A row without a baseline."""
    return Row(table, case, tokens, measure, "", "s", len(samples), Spread.of(samples), ceiling=ceiling)


def alternate(
    ours: Contender, theirs: Contender, pairs: int, seconds: float = math.inf
) -> tuple[list[list[float]], list[list[float]]]:
    """Run both once uncounted, then by turns; who goes first changes from pair to pair.

    A sample of over 0.2 s is taken again, twice at most, if other processes took a tenth of a core meanwhile.

    Args:
        ours: one side.
        theirs: the other.
        pairs: how many turns at most; at least one is taken.
        seconds: after so many no turn is begun.

    Returns:
        For ours and for theirs, the samples of each part.
    """
    contenders = {"ours": ours, "theirs": theirs}
    samples: dict[str, list[Sequence[float]]] = {name: [] for name in contenders}
    watched = {name: _timed(run)[1] > _NOTICEABLE for name, run in contenders.items()}
    start = time.perf_counter()
    for pair in range(pairs):
        if pair and time.perf_counter() - start > seconds:
            break
        for name in sorted(contenders, reverse=pair % 2 == 1):
            samples[name].append(_undisturbed(contenders[name]) if watched[name] else contenders[name]())
    by_part = {name: [list(part) for part in zip(*rows, strict=True)] for name, rows in samples.items()}
    return by_part["ours"], by_part["theirs"]


def _timed(run: Contender) -> tuple[Sequence[float], float]:
    """A sample, and how long it took in all."""
    start = time.perf_counter()
    sample = run()
    return sample, time.perf_counter() - start


def _undisturbed(run: Contender) -> Sequence[float]:
    """A sample while other processes did next to nothing; after some tries, any."""
    for _ in range(_TRIES):
        before = _others()
        sample, seconds = _timed(run)
        if _others() - before < _OTHERS * seconds:
            break
    return sample


def _others() -> float:
    """CPU seconds that processes but this one have used since the machine started; 0 where nothing tells."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text(encoding="ascii").split()[1:4])
    except OSError:
        return 0.0
    own = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def timed(function: Callable[[], Any]) -> Contender:
    """A contender of one part."""

    def run() -> tuple[float]:
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        del result  # freed outside the measured time, as the caller's own would be
        return (seconds,)

    return run


def conditions(quick: bool) -> dict[str, Any]:
    """Where and with what the rows were measured."""
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "maskflash": mf.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "quick": quick,
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few pairs: does it run at all?")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="timings of each side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of documents and tensors (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also store the rows")
    return parser


def finish(
    question: str,
    titles: dict[str, str],
    rows: list[Row],
    options: argparse.Namespace,
    where: dict[str, Any] | None = None,
) -> list[Row]:
    """Print the rows, one table for each title, and store them if asked to; `where`: this process's `conditions`."""
    where = where or conditions(options.quick)
    if options.quick:
        rows = [replace(row, floor=None, ceiling=None) for row in rows]
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for key, title in titles.items():
        console.print(_table(title, [row for row in rows if row.table == key]))
    console.print(describe(where), highlight=False, soft_wrap=True)
    if options.json:
        store(options.json, question, where, rows)
    return rows


def store(path: Path, question: str, where: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write rows and their conditions to a file."""
    plain = [{k: v for k, v in asdict(row).items() if v is not None} | {"met": row.met} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"question": question, "conditions": where, "rows": plain}
    draft = path.with_suffix(".draft")  # what is cut short while it writes keeps what was there
    draft.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def store_lines(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a file, each on a line of its own, after what holds for all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(_rounded(row)) for row in rows)
    draft = path.with_suffix(".draft")  # what is cut short while it writes keeps what was there
    draft.write_text(f'{json.dumps(_rounded(head), indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    draft.replace(path)


def describe(where: dict[str, Any]) -> str:
    """The conditions as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    quick = "; a quick run, not a measurement" if where["quick"] else ""
    return f"{where['device']}, {where['threads']} threads; {versions}; commit {where['commit']}{quick}"


def spread(values: Spread | None, unit: str) -> str:
    """The median and its unit ("s", "B", "x", or "" for an efficiency), and the other percentiles in brackets."""
    if values is None:
        return ""
    scale, name = 1.0, unit and f" {unit}"
    if unit == "B":
        scale, name = 2.0**-20, " MiB"
    elif unit == "s" and values.p50 < 1:
        scale, name = 1e3, " ms"
    elif unit == "x":
        name = "x"
    show = (lambda x: f"{x:.2f}") if unit == "" else _digits
    low, middle, high = (show(x * scale) for x in (values.p20, values.p50, values.p80))
    return f"{middle}{name}" + (f" ({low}-{high})" if low != high else "")


def ratio_unit(row: Row) -> str:
    """A factor, or nothing for an efficiency."""
    return "x" if row.visited is None else ""


def wanted(row: Row) -> str:
    """What a row has to reach, and whether it does."""
    if row.met is None:
        return ""
    goal = row.ceiling if row.floor is None else row.floor
    assert goal is not None
    text = spread(Spread(goal, goal, goal), row.unit if row.floor is None else ratio_unit(row))
    return f"{'<=' if row.floor is None else '>='} {text}, {'met' if row.met else 'not met'}"


def cells(row: Row) -> dict[str, str]:
    """A row as text, by column."""
    visited = "" if row.visited is None else f"{100 * row.visited:.1f} %"
    return {
        "case": row.case,
        "tokens": f"{row.tokens:,}" if row.tokens else "",
        "dtype": row.dtype,
        "measure": row.measure,
        "full / partial / skip": row.tiles or "",
        "visited": visited,
        "maskflash": spread(row.ours, row.unit),
        "baseline": spread(row.theirs, row.unit),
        "ratio": spread(row.ratio, ratio_unit(row)),
        "n": str(row.samples),
        "predicted": row.predicted or "",
        "wanted": wanted(row),
    }


def filled(rows: Sequence[Row]) -> list[str]:
    """The columns that some row has something in."""
    texts = [cells(row) for row in rows]
    return [name for name in (texts[0] if texts else ()) if any(text[name] for text in texts)]


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = filled(rows)
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "dtype", "measure", "wanted") else "right")
    for row in rows:
        text = cells(row)
        style = "bold red" if row.met is False else ""
        table.add_row(*(text[name] for name in columns), style=style)
    return table


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _rounded(value: Any) -> Any:
    """Floats to four digits: stored results stay small and readable."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _cpu_name() -> str:
    """The processor, the vector instructions that torch uses on it, and its products of bfloat16."""
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        models = [line for line in listing.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    products = "without AMX"
    if torch.cpu._is_amx_tile_supported():
        products = "with AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        products = "with AVX512-BF16"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {products})"


def _commit() -> str:
    """The checkout's commit, marked where what is measured has changed since; without a history, $COMMIT."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "maskflash", "templates", "benchmarks/*.py", "pyproject.toml")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or "unknown"
