"""Forms of other engines -> pictures: slices as outlined shapes, what rows see as steps over the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from maskflash.forms.row_intervals import RowIntervals
from maskflash.forms.slices import Slices
from maskflash.ground import arguments
from maskflash.visualize.cells import index
from maskflash.visualize.style import axes, frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS: Final = 128  # of a slanted edge: more than a panel has room for
_ROWS: Final = 1024  # of intervals, likewise
_COLOURS: Final = ("#12355b", "#1b7837", "#b35806", "#762a83")  # of each kind of slice


def draw_slices(slices: Slices, q_len: int, kv_len: int, *, ax: Axes | None = None, legend: bool = True) -> Axes:
    """Draw MagiAttention's slices over what is on the axes, each with its outline, in a colour for its type.

    Args:
        slices: from `mask.to_slices(...)`.
        q_len: rows in tokens; those of all batch rows, one after the other.
        kv_len: columns in tokens, likewise.
        ax: where to draw, such as what `draw_mask` returned; None makes a figure.
        legend: whether to name the types.

    Returns:
        The axes, in tokens.

    Raises:
        BackendError: matplotlib is not installed.

    Example:
        >>> import maskflash as mf
        >>> slices = (mf.causal() & mf.document([300, 724])).to_slices(1024, 1024)
        >>> ax = draw_slices(slices, 1024, 1024)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['2 causal']
    """
    operation = "draw_slices"
    arguments.instance(operation, "slices", slices, Slices, "make them with mask.to_slices")
    legend = arguments.flag(operation, "legend", legend)
    rows, columns = (arguments.integer(operation, n, x) for n, x in (("q_len", q_len), ("kv_len", kv_len)))
    fresh = ax is None
    ax = axes(ax)
    if fresh:
        frame(ax, rows, columns)
    from matplotlib.collections import PolyCollection

    shapes: dict[int, list[NDArray[np.float64]]] = {}
    each = (slices.q_ranges.tolist(), slices.k_ranges.tolist(), slices.types.tolist())
    for q_range, k_range, kind in zip(*each, strict=True):
        shapes.setdefault(kind, []).append(_shape(q_range, k_range, kind))
    handles, names = [], list(slices.counts)
    for kind, found in sorted(shapes.items()):
        colour, label = _COLOURS[kind], f"{len(found):,} {names[kind]}"
        drawn = PolyCollection(found, facecolor=f"{colour}40", edgecolor=colour, linewidth=1.2, label=label)
        handles.append(ax.add_collection(drawn))
    if legend and handles:
        ax.legend(handles=handles, loc="upper right", framealpha=0.9)
    return ax


def draw_row_intervals(
    intervals: RowIntervals, *, ax: Axes | None = None, batch_row: int = 0, head: int = 0, legend: bool = True
) -> Axes:
    """Draw the ends of each row's intervals over what is on the axes: where one starts, and where it stops.

    Beyond 1,024 rows one row of each group stands for all.

    Args:
        intervals: from `mask.to_row_intervals(...)`.
        ax: where to draw, such as what `draw_mask` returned; None makes a figure.
        batch_row: which batch row; one serves all.
        head: which query head; likewise.
        legend: whether to say which line is which.

    Returns:
        The axes, in tokens.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentError: there is no such batch row or head.

    Example:
        >>> import maskflash as mf
        >>> ax = draw_row_intervals((mf.causal() & mf.document([300, 724])).to_row_intervals(1024, 1024))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['start', 'stop']
    """
    operation = "draw_row_intervals"
    arguments.instance(operation, "intervals", intervals, RowIntervals, "make them with mask.to_row_intervals")
    legend = arguments.flag(operation, "legend", legend)
    b, h = index("batch_row", batch_row, intervals.shape[0]), index("head", head, intervals.shape[1])
    fresh = ax is None
    ax = axes(ax)
    if fresh:
        frame(ax, intervals.q_len, intervals.kv_len)
    edges = np.linspace(0, intervals.q_len, min(intervals.q_len, _ROWS) + 1).round().astype(np.int64)
    top, bottom, left, right = [], [], [], []
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        for start, stop in intervals.row(first, b=b, h=h):
            top.append(first)
            bottom.append(last)
            left.append(start)
            right.append(stop)
    starts = ax.vlines(left, top, bottom, colors=_COLOURS[2], linewidth=2.4, label="start")
    stops = ax.vlines(right, top, bottom, colors=_COLOURS[1], linewidth=2.4, label="stop")
    if legend:
        ax.legend(handles=[starts, stops], loc="upper right", framealpha=0.9)
    return ax


def _shape(q_range: list[int], k_range: list[int], kind: int) -> NDArray[np.float64]:
    """The outline of a slice, (corners, 2) in tokens: down its right side, and up its left."""
    rows = np.linspace(q_range[0], q_range[1], min(q_range[1] - q_range[0], _STEPS) + 1).round()
    first, last = rows[:-1], rows[1:] - 1  # rows of each step
    left = np.full_like(first, k_range[0]) + (first - q_range[0] if kind & 2 else 0)
    right = np.full_like(first, k_range[1]) - (q_range[1] - 1 - last if kind & 1 else 0)
    right, left = right.clip(k_range[0]), left.clip(None, k_range[1])
    some = left < right
    first, last, left, right = (x[some] for x in (first, last, left, right))
    down = np.stack((np.repeat(right, 2), np.stack((first, last + 1), 1).ravel()), 1)
    up = np.stack((np.repeat(left, 2), np.stack((first, last + 1), 1).ravel()), 1)[::-1]
    return np.concatenate((down, up))
