"""Rows of `benchmarks/parallel.py` -> the tables that it prints and the docs show, and the picture of the frontier.

A row has a contender's figures for a mask, a length and a number of ranks. Bytes are shown as parts of a gather's: the
bytes with which every rank would receive all keys that it doesn't hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.sharding import LAYER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Lines = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A table's columns, and its lines."""

LINKS: Final = ("nvlink", "infiniband", "cpu")
BALANCED: Final = 1.02
LEAN: Final = 0.7  # of the best balancer's bytes
FINEST: Final = "heap, 128"
PLANNING: Final = {(65_536, 64): 2.0, (1_048_576, 256): 20.0}  # seconds, by tokens and ranks
SIZE: Final = (65_536, 8)  # of the table of balancers

_SHOWN: Final = (
    "contiguous",
    "head and tail",
    "per document",
    "round robin",
    "heap, 2048",
    "heap, 512",
    "affine heap, 2048",
    "affine heap, 512",
)


def gather(row: Row) -> float:
    """Bytes with which each of so many ranks receives all keys, forward."""
    return row["tokens"] * (row["ranks"] - 1) / row["ranks"] * LAYER.key


def most(row: Row) -> float:
    """The bytes that the rank which receives most receives forward, as a part of a gather's."""
    return row["forward bytes"][0] / gather(row) if row["ranks"] > 1 else 0.0


def mean(row: Row) -> float:
    """What ranks receive forward on average, likewise."""
    return row["forward bytes"][2] / row["ranks"] / gather(row) if row["ranks"] > 1 else 0.0


def cells(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The grid's rows by contender, one for each mask, length and number of ranks."""
    wanted = [row for row in rows if row["table"] == "grid"]
    return [{row["by"]: row for row in some} for _, some in groupby(wanted, lambda row: (*_size(row), row["mask"]))]


def _size(row: Row) -> tuple[int, int]:
    return row["tokens"], row["ranks"]


def others(cell: dict[str, Row]) -> dict[str, Row]:
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
    kinds: dict[str, Callable[[dict[str, Row]], list[Row]]] = {
        "best balancer": lambda cell: list(others(cell).values()),
        "torch, gathered": lambda cell: [row for name, row in cell.items() if name.startswith("torch")],
        "ring, zigzag": lambda cell: [row for name, row in cell.items() if name.startswith("ring")],
        "Ulysses": lambda cell: [row for name, row in cell.items() if name == "Ulysses"],
    }
    lines = []
    by_size: dict[tuple[int, int], list[dict[str, Row]]] = {}
    for cell in cells(rows):
        by_size.setdefault(_size(next(iter(cell.values()))), []).append(cell)
    for (tokens, ranks), some in by_size.items():
        for link in LINKS:
            texts = []
            for choose in kinds.values():
                ratios = [
                    min(row["milliseconds"][link] for row in choose(cell)) / cell[f"plan, {link}"]["milliseconds"][link]
                    for cell in some
                    if choose(cell)
                ]
                texts.append(f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "")
            lines.append([f"{tokens:,}", f"{ranks:,}", link, *texts])
    return ("tokens", "ranks", "links", *kinds), lines


def planning(rows: Iterable[Row]) -> Lines:
    """How long plans took, by size: the median of masks and links, and the longest."""
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
    found = cells(rows)
    lines = []
    anchors = [cell["head and tail"] for cell in found if "causal" in {row["mask"] for row in cell.values()}]
    eight = [row for row in anchors if row["ranks"] == 8]
    texts = {f"{mean(row):.3f}" for row in eight}
    lines.append(["causal by head and tail at 8 ranks: of a gather", "0.750", *[", ".join(sorted(texts))] * len(LINKS)])
    for name, wanted, count in (
        (f"imbalance where the finest heap has at most {BALANCED}", f"at most {BALANCED}", _balanced),
        ("bytes there over the best balancer's: documents, share-question", f"at most {LEAN}", _lean),
        ("sizes where a balancer has better balance and fewer bytes", "0", _beaten),
    ):
        lines.append([name, wanted, *(count(found, f"plan, {link}") for link in LINKS)])
    for (tokens, ranks), limit in PLANNING.items():
        times = [
            [row["planning"] for row in rows if row["by"] == f"plan, {link}" and _size(row) == (tokens, ranks)]
            for link in LINKS
        ]
        texts = [f"{max(some):.2f} s" if some else "" for some in times]
        lines.append([f"planning {tokens:,} tokens, {ranks} ranks: the longest", f"under {limit:.0f} s", *texts])
    return ("goal", "wanted", *LINKS), lines


def _balanced(found: Sequence[dict[str, Row]], plan: str) -> str:
    """The largest imbalance, and how many are within the goal."""
    values = [cell[plan]["imbalance"] for cell in found if _reached(cell)]
    return f"{max(values):.3f}; {sum(x <= BALANCED for x in values)} of {len(values)} met" if values else ""


def _lean(found: Sequence[dict[str, Row]], plan: str) -> str:
    """The largest ratio of bytes, and how many are within the goal."""
    ratios = []
    for cell in found:
        if not (_reached(cell) and cell[plan]["mask"][:2] in ("13", "16")):
            continue
        best = min(most(row) for row in others(cell).values() if row["imbalance"] <= BALANCED)
        ratios.append(most(cell[plan]) / best if best else 1.0)
    return f"{max(ratios):.2f}; {sum(x <= LEAN for x in ratios)} of {len(ratios)} met" if ratios else ""


def _beaten(found: Sequence[dict[str, Row]], plan: str) -> str:
    """At how many sizes a balancer is better in both, by more than rounding, and who."""
    names = [
        name
        for cell in found
        for name, row in others(cell).items()
        if row["imbalance"] < cell[plan]["imbalance"] * 0.9999 and most(row) < most(cell[plan]) * 0.9999
    ]
    cases = sum(
        any(
            row["imbalance"] < cell[plan]["imbalance"] * 0.9999 and most(row) < most(cell[plan]) * 0.9999
            for row in others(cell).values()
        )
        for cell in found
    )
    return f"{cases} of {len(found)}" + (f" ({', '.join(sorted(set(names)))})" if names else "")


def _reached(cell: dict[str, Row]) -> bool:
    return FINEST in cell and cell[FINEST]["imbalance"] <= BALANCED


TABLES: Final[dict[str, tuple[str, Callable[[Iterable[Row]], Lines]]]] = {
    "goals": ("Goals", goals),
    "balance": (
        f"{SIZE[0]:,} tokens, {SIZE[1]} ranks: imbalance · bytes received, mean · and most, of a gather's",
        balance,
    ),
    "seconds": ("Predicted time over the plan's: median of the masks (least-most)", seconds),
    "planning": ("Planning, needs included", planning),
}
