"""Masks and block maps -> coloured tiles on axes, and several of them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.visualize.cells import Cells, cells
from maskflash.visualize.style import COLOURS, HATCH, HATCH_INK, OUTLINE, axes, figure, frame, titled
from maskflash.visualize.vectors import draw_intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Mask | BlockMap | Callable[..., Any]

_MOST: Final = 512  # pairs or tiles a side, up to which each is drawn by itself
_COARSE: Final = 256  # cells a side beyond that: each is two pixels or more, so that those along a boundary are seen
_OUTLINED: Final = 64  # tiles a side, up to which each has its outline, and partial ones are hatched
_TILES: Final = {FULL: "full", PARTIAL: "partial", SKIP: "skip"}
_PAIRS: Final = {FULL: "visible", PARTIAL: "in part", SKIP: "hidden"}
_SQUARES: Final = {FULL: "all visible", PARTIAL: "some", SKIP: "none"}


def draw_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    ax: Axes | None = None,
    batch_row: int = 0,
    head: int = 0,
    legend: bool = True,
    **call: Any,
) -> Axes:
    """Draw which pairs are visible, each by itself up to 512 tokens, then by at most 256 squares a side.

    A square is dark if all of its pairs are visible, light if none is, else between: the same words as for tiles, and
    found in the same way, so a million tokens cost milliseconds to a second.

    Args:
        mask: the mask.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        ax: where to draw; None makes a figure (`returned.figure`).
        batch_row: which batch row to draw.
        head: which query head to draw.
        legend: whether to say what the colours mean.
        **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `Mask.at`.

    Returns:
        The axes, in tokens: queries downwards, keys to the right.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentError: lengths, or a row or head, that don't fit.

    Example:
        >>> import maskflash as mf
        >>> draw_mask(mf.causal(), 64, 64).get_title()
        'causal()'
    """
    _check(mask, Mask, "draw_mask")
    legend = arguments.flag("draw_mask", "legend", legend)
    q_len, kv_len = arguments.integer("draw_mask", "q_len", q_len), arguments.integer("draw_mask", "kv_len", kv_len)
    size = 1 if max(q_len, kv_len) <= _MOST else math.ceil(max(q_len, kv_len) / _COARSE)
    block_map = mask.block_map(q_len, kv_len, block_size=size, **call)
    drawn = cells(block_map, _MOST, batch_row, head)
    ax = axes(ax)
    _image(ax, drawn)
    frame(ax, q_len, kv_len)
    ax.set_title(titled(mask.name))
    if legend and size == 1:
        _legend(ax, {kind: _PAIRS[kind] for kind in (FULL, SKIP)})
    elif legend:
        _legend(ax, _SQUARES, f"squares of {size:,} x {size:,} pairs")
    return ax


def draw_tiles(
    block_map: BlockMap, *, ax: Axes | None = None, batch_row: int = 0, head: int = 0, legend: bool = True
) -> Axes:
    """Draw a block map: full tiles dark, partial ones between and hatched, skipped ones light.

    Beyond 64 tiles a side outlines and hatches are left out, and beyond 512 at most 256 cells a side stand for several
    tiles each: full or skip if all of them are, else partial. Ticks are at borders of tiles.

    Args:
        block_map: from `mask.block_map(...)`.
        ax: where to draw; None makes a figure (`returned.figure`).
        batch_row: which batch row; a map with one serves all.
        head: which head; likewise.
        legend: whether to say what the colours mean, and how many tiles of the whole map are of each kind.

    Returns:
        The axes, in tokens: queries downwards, keys to the right.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentError: the map has no such row or head.

    Example:
        >>> import maskflash as mf
        >>> draw_tiles(mf.causal().block_map(1024, 1024)).get_title()
        'tiles of 128 x 128 tokens'
    """
    _check(block_map, BlockMap, "draw_tiles")
    legend = arguments.flag("draw_tiles", "legend", legend)
    most = _MOST if max(block_map.shape[2:]) <= _MOST else _COARSE
    drawn = cells(block_map, most, batch_row, head)
    ax = axes(ax)
    outlined = max(drawn.kinds.shape) <= _OUTLINED and drawn.side == 1
    if outlined:
        _outlined(ax, drawn)
    else:
        _image(ax, drawn)
    frame(ax, block_map.q_len, block_map.kv_len, block_map.block_size)
    rows, columns = block_map.block_size
    ax.set_title(f"tiles of {rows} x {columns} tokens")
    if legend:
        names = {kind: f"{block_map.counts[name]:,} {name}" for kind, name in _TILES.items()}
        side = drawn.side
        _legend(ax, names, f"tiles; drawn in squares of {side:,} x {side:,}" if side > 1 else "", hatched=outlined)
    return ax


def side_by_side(
    panels: Mapping[str, Panel], q_len: int | None = None, kv_len: int | None = None, **options: Any
) -> Figure:
    """Draw masks and block maps beside one another, each under its title; column intervals with their vectors.

    Args:
        panels: title -> mask, block map, or a function that draws on the axes that it is given as `ax=`, such as
            `partial(draw_score, mask, score, 1024, 1024)`.
        q_len: rows in tokens; needed where a mask is among them.
        kv_len: columns in tokens; likewise.
        **options: of `draw_mask`, for the masks; of block maps too, batch_row and head.

    Returns:
        The figure, with axes in the panels' order.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentError: there is nothing to draw, or a mask without lengths.

    Example:
        >>> import maskflash as mf
        >>> causal = mf.causal()
        >>> made = side_by_side({"pairs": causal, "tiles": causal.block_map(1024, 1024)}, 1024, 1024)
        >>> [ax.get_title() for ax in made.axes]
        ['pairs', 'tiles']
    """
    arguments.instance("side_by_side", "panels", panels, Mapping, "it is {title: mask or block map}")
    if not panels:
        raise ArgumentError("side_by_side: panels is empty, expected {title: mask or block map}")
    place = {name: options[name] for name in ("batch_row", "head") if name in options}
    for title, panel in panels.items():
        if isinstance(panel, Mask) or not (isinstance(panel, BlockMap) or callable(panel)):
            _check(panel, Mask, f"side_by_side: {title}")
            if q_len is None or kv_len is None:
                raise ArgumentError(f"side_by_side: {title!r} is a mask, so q_len and kv_len are needed")
    made = figure(len(panels))
    for ax, (title, panel) in zip(made.axes, panels.items(), strict=True):
        if isinstance(panel, BlockMap):
            draw_tiles(panel, ax=ax, **place)
        elif not isinstance(panel, Mask):
            panel(ax=ax)
        else:
            assert q_len is not None and kv_len is not None, "checked above"
            draw_mask(panel, q_len, kv_len, ax=ax, **options)
            if isinstance(panel, ColumnIntervals):
                draw_intervals(panel, q_len, ax=ax, batch_row=options.get("batch_row", 0))
        ax.set_title(titled(title))
    return made


def _image(ax: Axes, drawn: Cells) -> None:
    """Cells as an image; the last row and column may be smaller."""
    from matplotlib.colors import ListedColormap

    if drawn.kinds.size:
        colours = ListedColormap([COLOURS[kind] for kind in (SKIP, PARTIAL, FULL)])
        ax.pcolorfast(drawn.columns, drawn.rows, drawn.kinds, cmap=colours, vmin=SKIP, vmax=FULL)


def _outlined(ax: Axes, drawn: Cells) -> None:
    """Each tile as a rectangle with its outline."""
    from matplotlib.collections import PolyCollection

    for kind, colour in COLOURS.items():
        ax.add_collection(
            PolyCollection(
                list(drawn.corners(drawn.kinds == kind)),
                facecolor=colour,
                edgecolor=HATCH_INK if HATCH[kind] else OUTLINE,
                linewidth=0.4,
                hatch=HATCH[kind],
                label=_TILES[kind],
            )
        )


def _legend(ax: Axes, names: Mapping[int, str], title: str = "", *, hatched: bool = False) -> None:
    """Name the kinds below the axes, under what a cell is where it isn't a pair or a tile."""
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=COLOURS[kind],
            edgecolor=HATCH_INK if HATCH[kind] and hatched else "#808080",
            hatch=HATCH[kind] if hatched else None,
            label=name,
        )
        for kind, name in names.items()
    ]
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "frameon": False}
    ax.legend(handles=handles, title=title or None, ncols=len(handles), **below)


def _check(value: object, kind: type, operation: str) -> None:
    if not isinstance(value, kind):
        fix = "; make one with mf.mask" if kind is Mask else "; make one with mask.block_map"
        raise ArgumentTypeError(f"{operation}: got a {type(value).__name__}, expected a {kind.__name__}{fix}")
