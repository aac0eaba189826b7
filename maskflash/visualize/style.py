"""What pictures have in common: colours that also differ in grey, matplotlib when it is needed, axes in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.errors import BackendError
from maskflash.ground import arguments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By kind, from light to dark: a third of the scale apart in luminance, and one hue, so that they differ in print and
# for every kind of colour vision.
COLOURS: Final = {SKIP: "#f7f7f7", PARTIAL: "#7fb0da", FULL: "#12355b"}
HATCH: Final = {SKIP: None, PARTIAL: "////", FULL: None}
HATCH_INK: Final = "#3d6f9e"
OUTLINE: Final = "#c8c8c8"  # of single tiles
DOCUMENT_COLOUR: Final = "#b2182b"
VECTOR_COLOURS: Final = {"lts": "#d95f02", "lte": "#8c2d04", "uts": "#b8860b", "ute": "#e6ab02"}
VECTOR_DASHES: Final = {"lts": "solid", "lte": "dashed", "uts": "dotted", "ute": "dashdot"}


def axes(ax: Axes | None) -> Axes:
    """The axes to draw on; None makes a figure of one.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentTypeError: it can't be drawn on.
    """
    if ax is None:
        return figure(1).axes[0]
    from matplotlib.axes import Axes

    arguments.instance("visualize", "ax", ax, Axes, "such as matplotlib's plt.subplots makes")
    return ax


def figure(panels: int, widths: Sequence[float] | None = None) -> Figure:
    """A figure with panels side by side; no window belongs to it, and nothing has to be closed.

    Args:
        panels: how many.
        widths: of each, as parts of a square one; None makes all square.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError(
            "visualize: pictures need matplotlib, which is not installed here; pip install 'maskflash[plot]'"
        ) from None
    widths = [1.0] * panels if widths is None else widths
    made = Figure(figsize=(5.2 * sum(widths), 5.4), dpi=160, layout="constrained")
    made.subplots(1, panels, width_ratios=widths)
    return made


def frame(ax: Axes, q_len: int, kv_len: int) -> None:
    """Queries downwards, keys to the right, both in tokens."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(0, max(kv_len, 1))
    ax.set_ylim(max(q_len, 1), 0)
    if max(q_len, kv_len) <= 8 * max(1, min(q_len, kv_len)):
        ax.set_aspect("equal")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda tokens, place: f"{tokens:,.0f}")
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
