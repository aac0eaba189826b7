"""Rows of `benchmarks/parallel.py` -> the tables that it prints and the docs show, and the picture of the frontier.

A row has a contender's figures for a mask, a length and a number of ranks. Bytes are shown as parts of a gather's: the
bytes with which every rank would receive all keys that it doesn't hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.runner import ROOT
from benchmarks.sharding import LAYER
from maskflash.parallel.links import KNOWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Cell = dict[str, Row]
"""All contenders of a mask, a length and a number of ranks."""
Lines = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A table's columns, and its lines."""

RESULTS: Final = ROOT / "benchmarks/results/cpu/parallel.json"
BALANCED: Final = 1.02
SAVED: Final = 0.7  # of the bytes of the leanest balanced layout
LEAN: Final = ("13 causal documents", "16K question, 12 answers")
FINEST: Final = "heap, 128"
PLANNING: Final = {(65_536, 64): 2, (1_048_576, 256): 20}  # seconds, by tokens and ranks
SIZE: Final = (65_536, 8)  # of the table of balancers

_SHOWN: Final = {  # and how the picture marks them
    "contiguous": "s",
    "head and tail": "X",
    "per document": "P",
    "round robin": "v",
    "heap, 2048": "o",
    "heap, 512": "o",
    "heap, 128": "o",
    "affine heap, 2048": "D",
    "affine heap, 512": "D",
}


def gather(row: Row) -> float:
    """Bytes with which each of so many ranks receives all keys, forward."""
    return row["tokens"] * (row["ranks"] - 1) / row["ranks"] * LAYER.key


def most(row: Row) -> float:
    """The bytes that the rank which receives most receives forward, as a part of a gather's."""
    return row["forward bytes"][0] / gather(row) if row["ranks"] > 1 else 0.0


def mean(row: Row) -> float:
    """What ranks receive forward on average, likewise."""
    return row["forward bytes"][2] / row["ranks"] / gather(row) if row["ranks"] > 1 else 0.0


def cells(rows: Iterable[Row]) -> list[Cell]:
    """The grid's rows by contender, one for each mask, length and number of ranks."""
    wanted = [row for row in rows if row["table"] == "grid"]
    return [{row["by"]: row for row in some} for _, some in groupby(wanted, lambda row: (*_size(row), row["mask"]))]


def _size(row: Row) -> tuple[int, int]:
    return row["tokens"], row["ranks"]


def others(cell: Cell) -> Cell:
    """Who lays tokens out and lets needed keys travel, but plans."""
    return {name: row for name, row in cell.items() if not name.startswith(("plan", "torch", "ring", "Ulysses"))}


def balance(rows: Iterable[Row]) -> Lines:
    """Imbalance, and bytes received on average and at most, of each mask by each contender."""
    lines = []
    for cell in cells(rows):
        first = next(iter(cell.values()))
        if _size(first) == SIZE:
            shown = [cell.get(name) for name in (*_SHOWN, "plan, infiniband")]
            texts = [f"{row['imbalance']:.3f} · {mean(row):.2f} · {most(row):.2f}" if row else "" for row in shown]
            lines.append([first["mask"], *texts])
    return ("mask", *_SHOWN, "plan, infiniband"), lines


def seconds(rows: Iterable[Row]) -> Lines:
    """Predicted time of each size and link: others' over the plan's, the median of the masks and the least."""
    kinds: dict[str, Callable[[Cell], list[Row]]] = {
        "best balancer": lambda cell: list(others(cell).values()),
        "torch, gathered": lambda cell: [row for name, row in cell.items() if name.startswith("torch")],
        "ring, zigzag": lambda cell: [row for name, row in cell.items() if name.startswith("ring")],
        "Ulysses": lambda cell: [row for name, row in cell.items() if name == "Ulysses"],
    }
    lines = []
    by_size: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells(rows):
        by_size.setdefault(_size(next(iter(cell.values()))), []).append(cell)
    for (tokens, ranks), some in by_size.items():
        for link in KNOWN:
            texts = []
            for choose in kinds.values():
                ratios = [
                    min(row["milliseconds"][link] for row in choose(cell)) / cell[f"plan, {link}"]["milliseconds"][link]
                    for cell in some
                    if choose(cell) and f"plan, {link}" in cell
                ]
                texts.append(f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "")
            if any(texts):
                lines.append([f"{tokens:,}", f"{ranks:,}", link, *texts])
    return ("tokens", "ranks", "links", *kinds), lines


def planning(rows: Iterable[Row]) -> Lines:
    """CPU seconds that plans took, by size: the median of masks and links, and the longest."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["table"] == "grid" and row["by"].startswith("plan"):
            found.setdefault(_size(row), []).append(row)
    lines = []
    for (tokens, ranks), some in found.items():
        slowest = max(some, key=lambda row: row["planning"])
        middle = median(row["planning"] for row in some)
        lines.append(
            [f"{tokens:,}", f"{ranks:,}", f"{middle:.2f} s", f"{slowest['planning']:.2f} s ({slowest['mask']})"]
        )
    return ("tokens", "ranks", "median", "longest"), lines


def goals(rows: Iterable[Row]) -> Lines:
    """What was wanted, and what is there with the plans for each link."""
    rows = list(rows)
    found = {link: [cell for cell in cells(rows) if f"plan, {link}" in cell] for link in KNOWN}
    checks: list[tuple[str, str, Callable[[Sequence[Cell], str], str]]] = [
        ("causal by head and tail at 8 ranks: bytes of a gather's", "0.75", _anchor),
        (
            f"imbalance where the finest heap has at most {BALANCED}",
            f"at most {BALANCED}, or sooner done than all of that",
            _balanced,
        ),
        *(
            (f"{mask}: bytes of the leanest balanced layout's", f"at most {SAVED}", partial(_lean, mask))
            for mask in LEAN
        ),
        ("where a balancer has better balance and fewer bytes", "nowhere", _beaten),
        *(
            (
                f"longest planning of {tokens:,} tokens, {ranks} ranks",
                f"under {limit} s",
                partial(_longest, tokens, ranks),
            )
            for (tokens, ranks), limit in PLANNING.items()
        ),
    ]
    return ("goal", "wanted", *KNOWN), [
        [goal, wanted, *(check(found[link], f"plan, {link}") or "not run" for link in KNOWN)]
        for goal, wanted, check in checks
    ]


def _anchor(found: Sequence[Cell], plan: str) -> str:
    """Whose bytes are known."""
    eight = [cell["head and tail"] for cell in found if cell[plan]["mask"] == "causal" and cell[plan]["ranks"] == 8]
    return ", ".join(sorted({f"{mean(row):.2f}" for row in eight}))


def _balanced(found: Sequence[Cell], plan: str) -> str:
    """How many are balanced, how many of the others are faster than all balanced layouts, and their largest imbalance.

    Balanced layouts are those of balancers, and the plans for other links.
    """
    link = plan.removeprefix("plan, ")
    reached = [cell for cell in found if FINEST in cell and cell[FINEST]["imbalance"] <= BALANCED]
    uneven = [cell for cell in reached if cell[plan]["imbalance"] > BALANCED]
    sooner = 0
    for cell in uneven:
        plans = {name: row for name, row in cell.items() if name.startswith("plan")}
        even = [row for row in (others(cell) | plans).values() if row["imbalance"] <= BALANCED]
        sooner += all(cell[plan]["milliseconds"][link] < row["milliseconds"][link] for row in even)
    text = f"{len(reached) - len(uneven)} of {len(reached)} balanced"
    most = max((cell[plan]["imbalance"] for cell in uneven), default=1)
    return text + (f", {sooner} of the others sooner done, with up to {most:.3f}" if uneven else "")


def _lean(mask: str, found: Sequence[Cell], plan: str) -> str:
    """Bytes over those of the balanced layout that needs fewest: of all ranks, and of the one that receives most."""
    texts = []
    for cell in found:
        if cell[plan]["mask"] == mask and _size(cell[plan]) == SIZE:
            balanced = [row for row in others(cell).values() if row["imbalance"] <= BALANCED]
            for which, of in (("in all", mean), ("at most", most)):
                texts.append(f"{of(cell[plan]) / min(map(of, balanced)):.2f} {which}")
    return ", ".join(texts)


def _beaten(found: Sequence[Cell], plan: str) -> str:
    """In how many cells a balancer is better in both by more than rounding, and which balancers."""
    better = [
        (number, name)
        for number, cell in enumerate(found)
        for name, row in others(cell).items()
        if all(of(row) < of(cell[plan]) * 0.9999 for of in (most, mean, lambda row: row["imbalance"]))
    ]
    names = ", ".join(sorted({name for _, name in better}))
    return f"{len({number for number, _ in better})} of {len(found)}" + (f": {names}" if names else "")


def _longest(tokens: int, ranks: int, found: Sequence[Cell], plan: str) -> str:
    times = [cell[plan]["planning"] for cell in found if _size(cell[plan]) == (tokens, ranks)]
    return f"{max(times):.2f} s" if times else ""


def frontier(rows: Iterable[Row]) -> Figure:
    """Balance over bytes: what balancers lay out, and the plans for slower and faster links between them.

    The less of both the better. Plans are joined by a line, from slow links to fast ones.
    """
    from matplotlib.figure import Figure

    rows = list(rows)
    plans: dict[str, list[Row]] = {}
    for row in rows:
        if row["table"] == "frontier":
            plans.setdefault(row["mask"], []).append(row)
    made = Figure(figsize=(11, 3.2 * math.ceil(len(plans) / 2)), layout="constrained")
    for number, (mask, line) in enumerate(plans.items()):
        ax = made.add_subplot(math.ceil(len(plans) / 2), 2, number + 1)
        cell = next(x for x in cells(rows) if mask == (one := next(iter(x.values())))["mask"] and _size(one) == SIZE)
        for place, (name, marker) in enumerate(_SHOWN.items()):
            if name in cell:
                spot = most(cell[name]), cell[name]["imbalance"]
                ax.plot(*spot, marker, color=f"C{place}", markersize=8, label=name, alpha=0.85)
        ax.plot([most(x) for x in line], [x["imbalance"] for x in line], ".-k", label="plans", zorder=3)
        ax.set_title(mask)
        ax.set_xlabel("bytes of the rank that receives most, of a gather's")
        ax.set_ylabel("work, most / mean")
        ax.set_xlim(0, 1.05)
    handles = {label: h for ax in made.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    made.legend(handles.values(), handles, loc="outside right center", frameon=False)
    return made


def stored_frontier() -> Figure:
    """The frontier of the stored results."""
    return frontier(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])


TABLES: Final[dict[str, tuple[str, Callable[[Iterable[Row]], Lines]]]] = {
    "goals": ("Goals", goals),
    "balance": (
        f"{SIZE[0]:,} tokens, {SIZE[1]} ranks: imbalance · bytes received, mean · and most, of a gather's",
        balance,
    ),
    "seconds": ("Predicted time over the plan's: median of the masks (least-most)", seconds),
    "planning": ("CPU time of planning, needs included", planning),
}
