"""Stored results -> charts of the same medians that the tables have, with their 20th and 80th percentiles.

causal, 8,192     |    ├──■─┤       a median and its spread; the line at 1 is where both are as fast
document, 8,192   |       ├─■──┤
                  1              10
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.runner import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

RESULTS: Final = ROOT / "benchmarks" / "results" / "cpu"
_MARKERS: Final = "osD^vPX"
_INK: Final = "#606060"


class Chart(NamedTuple):
    """What a chart shows.

    Attributes:
        question: whose results.
        table: which of their tables.
        title: what is drawn, with its unit.
        over: "cases" puts each case in a row of its own, "tokens" each length in its place on a logarithmic axis.
        value: the spread that is drawn, "ours" or "ratio".
        measures: which of them; none for all.
    """

    question: str
    table: str
    title: str
    over: str
    value: str = "ratio"
    measures: tuple[str, ...] = ()


CHARTS: Final = {
    "documents": Chart("attention", "documents", "time of SDPA with the dense mask, over ours", "cases"),
    "efficiency": Chart("attention", "efficiency", "efficiency, 1 is dense speed", "tokens"),
    "lengths": Chart("analysis", "lengths", "seconds to a block map", "tokens", "ours"),
    "million": Chart("million", "million", "seconds to a block map", "tokens", "ours", ("time",)),
    "twelve": Chart("flashmask", "dense", "time of SDPA with the dense mask, over ours", "cases"),
    "twelve beside flex": Chart("flashmask", "flex", "time of compiled FlexAttention, over ours", "cases"),
    "scores": Chart("scores", "dense", "time of dense torch, over ours", "cases"),
    "decoding": Chart("decode", "steps", "time of SDPA, over ours", "cases"),
}


def stored(name: str) -> Figure:
    """A chart of the stored results."""
    text = (RESULTS / f"{CHARTS[name].question}.json").read_text(encoding="utf-8")
    return drawn(CHARTS[name], json.loads(text)["rows"])


def drawn(chart: Chart, rows: Iterable[Row]) -> Figure:
    """A chart of the rows of its table."""
    from matplotlib.figure import Figure

    own = [
        row for row in rows if row["table"] == chart.table and row["measure"] in (chart.measures or (row["measure"],))
    ]
    same = len({row["tokens"] for row in own}) == 1
    places = list(dict.fromkeys(_case(row, same) for row in own))
    named = "case" if chart.over == "tokens" else "measure"
    several = {key for key in (named, "dtype") if len({row[key] for row in own}) > 1} | {named}
    series: dict[str, list[Row]] = {}
    for row in own:
        series.setdefault(", ".join(str(row[key]) for key in (named, "dtype") if key in several), []).append(row)
    height = 1.2 + (0.2 + 0.09 * len(series)) * len(places) if chart.over == "cases" else 4.2
    made = Figure(figsize=(6.6, height), layout="constrained")
    ax = made.add_subplot()
    for number, (label, line) in enumerate(series.items()):
        look = {"color": f"C{number}", "label": label, "markersize": 6, "capsize": 2, "elinewidth": 1}
        look["marker"] = _MARKERS[number % len(_MARKERS)]
        if chart.over == "cases":
            shift = 0.6 * ((number + 0.5) / len(series) - 0.5)  # beside one another
            heights = [places.index(_case(row, same)) + shift for row in line]
            ax.errorbar(_medians(chart, line), heights, xerr=_spreads(chart, line), linestyle="none", **look)
        else:
            tokens = [row["tokens"] for row in line]
            dashes = "--" if line[0]["dtype"] == "bfloat16" else "-"
            ax.errorbar(tokens, _medians(chart, line), yerr=_spreads(chart, line), linestyle=dashes, **look)
    _axes(ax, chart, places, own)
    if len(series) > 1:
        made.legend(loc="outside upper left", ncols=2, frameon=False)
    return made


def _case(row: Row, same: bool) -> str:
    """A case, with its length unless all have the same."""
    return row["case"] if same else f"{row['case']}, {row['tokens']:,}"


def _medians(chart: Chart, rows: Sequence[Row]) -> list[float]:
    return [row[chart.value]["p50"] for row in rows]


def _spreads(chart: Chart, rows: Sequence[Row]) -> list[list[float]]:
    """From the 20th percentile to the median, and from there to the 80th."""
    values = [row[chart.value] for row in rows]
    return [[x["p50"] - x["p20"] for x in values], [x["p80"] - x["p50"] for x in values]]


def _axes(ax: Axes, chart: Chart, places: Sequence[str], rows: Sequence[Row]) -> None:
    """Name the axes; values are logarithmic, but for efficiencies."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = ax.xaxis if chart.over == "cases" else ax.yaxis
    mark = ax.axvline if chart.over == "cases" else ax.axhline
    lengths = sorted({row["tokens"] for row in rows})
    values.set_label_text(chart.title + (f", {lengths[0]:,} tokens" if len(lengths) == 1 else ""))
    values.grid(visible=True, color="#808080", alpha=0.3, linewidth=0.6)
    if chart.table != "efficiency":
        (ax.set_xscale if chart.over == "cases" else ax.set_yscale)("log")
        values.set_major_locator(LogLocator(subs=(1, 2, 5)))
        values.set_minor_locator(NullLocator())
        values.set_major_formatter(lambda value, _: f"{value:g}")
    if chart.value == "ratio":
        mark(1, color=_INK, linewidth=1)  # as fast
    if chart.over == "cases":
        ax.set_yticks(range(len(places)), places)
        ax.invert_yaxis()
    else:
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
        ax.set_xlabel("tokens")
        ax.xaxis.set_minor_locator(NullLocator())
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
