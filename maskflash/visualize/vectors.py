"""FlashMask's vectors -> steps over the columns, and the rows they hide hatched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskflash.errors import ArgumentTypeError
from maskflash.ground import arguments
from maskflash.masks.columns import ColumnIntervals
from maskflash.visualize.cells import index
from maskflash.visualize.style import VECTOR_COLOURS, VECTOR_DASHES, axes, frame

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Band = tuple[NDArray[np.int32], NDArray[np.int32]]

_HATCH_INK: Final = "#b35806"
_HATCH: Final = "\\\\"
_BINS: Final = 1024  # of columns: more than a panel has room for


def draw_intervals(
    columns: ColumnIntervals,
    q_len: int,
    *,
    ax: Axes | None = None,
    batch_row: int = 0,
    head: int = 0,
    legend: bool = True,
) -> Axes:
    """Draw FlashMask's vectors over what is on the axes: a line for each, hatches where they hide rows.

    Beyond 1,024 columns a line becomes the band between a vector's least and largest value in each of 1,024 groups, and
    only rows that all columns of a group hide are hatched. What `causal` hides besides isn't drawn.

    Args:
        columns: the vectors.
        q_len: rows in tokens.
        ax: where to draw, such as what `draw_mask` returned; None makes a figure.
        batch_row: which batch row of the vectors; one serves all.
        head: which head of the vectors (not of the queries, where these share one); likewise.
        legend: whether to name the lines and the hatch.

    Returns:
        The axes, in tokens.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentError: the vectors have no such batch row or head.

    Example:
        >>> import maskflash as mf
        >>> vectors = (mf.causal() & mf.document([300, 724])).to_flashmask(1024, 1024)
        >>> ax = draw_intervals(vectors, 1024, ax=mf.visualize.draw_mask(vectors, 1024, 1024))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['lts', 'hidden by them']
    """
    if not isinstance(columns, ColumnIntervals):
        raise ArgumentTypeError(
            f"draw_intervals: got a {type(columns).__name__}, expected ColumnIntervals; use mask.to_flashmask(...)"
        )
    legend = arguments.flag("draw_intervals", "legend", legend)
    rows = arguments.integer("draw_intervals", "q_len", q_len)
    batch, heads, kv_len = columns.lts.shape
    place = index("batch_row", batch_row, batch), index("head", head, heads)
    edges = np.linspace(0, kv_len, min(kv_len, _BINS) + 1).round().astype(np.int64)
    bands = {name: _band(vector[place], edges, rows) for name, vector in columns.vectors().items()}
    fresh = ax is None
    ax = axes(ax)
    if fresh:
        frame(ax, rows, kv_len)
    if kv_len:
        _hatch(ax, edges, bands["lts"], bands.get("lte", _same(rows, edges)))
        if "ute" in bands:
            _hatch(ax, edges, bands.get("uts", _same(0, edges)), bands["ute"])
        for name, (low, high) in bands.items():
            ax.stairs(
                high,
                edges,
                baseline=low,
                fill=True,
                facecolor=VECTOR_COLOURS[name],
                edgecolor=VECTOR_COLOURS[name],
                linestyle=VECTOR_DASHES[name],
                linewidth=1.6,
                label=name,
            )
        if legend:
            if (before := ax.get_legend()) is not None:
                before.remove()
                ax.add_artist(before).set_clip_on(False)  # else the layout leaves it no room
            ax.legend(handles=_handles(bands), loc="upper right", framealpha=0.9)
    return ax


def _handles(names: Iterable[str]) -> list[Artist]:
    """A line for each vector, as it is drawn, and the hatch of what they hide."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks: list[dict[str, Any]] = [
        {"color": VECTOR_COLOURS[name], "linestyle": VECTOR_DASHES[name], "label": name} for name in names
    ]
    lines = [Line2D([], [], linewidth=1.6, **look) for look in looks]
    return [*lines, Patch(facecolor="none", edgecolor=_HATCH_INK, hatch=_HATCH, label="hidden by them")]


def _band(vector: Tensor, edges: NDArray[np.int64], rows: int) -> Band:
    """The least and the largest entry of each group of columns, clipped to the rows."""
    values = vector.cpu().numpy().clip(0, rows)
    if not len(values):
        return values, values
    return np.minimum.reduceat(values, edges[:-1]), np.maximum.reduceat(values, edges[:-1])


def _same(row: int, edges: NDArray[np.int64]) -> Band:
    values = np.full(len(edges) - 1, row, dtype=np.int32)
    return values, values


def _hatch(ax: Axes, edges: NDArray[np.int64], start: Band, stop: Band) -> None:
    """Hatch the rows that every column of a group hides."""
    first, last = start[1], np.maximum(start[1], stop[0])
    ax.stairs(last, edges, baseline=first, fill=True, facecolor="none", edgecolor=_HATCH_INK, hatch=_HATCH, linewidth=0)
