"""What pictures have in common: colours that also differ in grey, matplotlib when it is needed, axes in tokens."""

from __future__ import annotations

import math
import textwrap
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
HATCH: Final[dict[int, str | None]] = {SKIP: None, PARTIAL: "////", FULL: None}
HATCH_INK: Final = "#3d6f9e"
OUTLINE: Final = "#c8c8c8"  # of single tiles
DOCUMENT_COLOUR: Final = "#b2182b"
# The explorer's on a dark screen: the same order from paper to ink.
DARK_COLOURS: Final = {SKIP: "#22272e", PARTIAL: "#4a78a6", FULL: "#c4dcf3"}
DARK_HATCH_INK: Final = "#86b0d8"
DARK_OUTLINE: Final = "#4b525b"
DARK_DOCUMENT_COLOUR: Final = "#ff8f87"
_TITLE: Final = 46  # letters that a line of a title has room for
_TICKS: Final = 5  # on an axis of tiles, beside the one at 0
# Of numbers, from low to high: evenly lighter, and unlike the colour of what is hidden, on light screens and on dark.
# Source: matplotlib's viridis, from 0.12 to 0.96.
SCALE: Final = ("#472a7a", "#3e4a89", "#31678e", "#26818e", "#1f9a8a", "#2eb37c", "#5ec962", "#9dd93b", "#e5e419")
UNKNOWN: Final = "#a0a0a0"  # of what is visible, but has no number
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
    made = Figure(figsize=(5.2 * sum(widths), 6.1), dpi=160, layout="constrained")
    made.subplots(1, panels, width_ratios=widths)
    return made


def titled(text: str) -> str:
    """A title in lines that fit a panel, three at most."""
    return "\n".join(textwrap.wrap(text, _TITLE, max_lines=3, placeholder=" …"))


def frame(ax: Axes, q_len: int, kv_len: int, block_size: tuple[int, int] = (1, 1)) -> None:
    """Queries downwards, keys to the right, both in tokens; ticks at borders of tiles, a power of two of them apart.

    Args:
        ax: the axes.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        block_size: tokens per tile, (rows, columns); pairs are tiles of one, so both have the same ticks.
    """
    from matplotlib.ticker import MultipleLocator

    ax.set_xlim(0, max(kv_len, 1))
    ax.set_ylim(max(q_len, 1), 0)
    if max(q_len, kv_len) <= 8 * max(1, min(q_len, kv_len)):
        ax.set_aspect("equal")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    for place, (axis, length) in enumerate(((ax.yaxis, q_len), (ax.xaxis, kv_len))):
        axis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        tiles = math.ceil(max(length, 1) / block_size[place])
        apart = 2 ** max(0, math.ceil(math.log2(tiles / _TICKS)))  # tiles between ticks
        axis.set_major_locator(MultipleLocator(block_size[place] * apart))
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
