"""A plan of shards and a mask -> a picture: each row in the colour of the rank that holds it, who works and receives.

  keys 0 ... S
q ■ · · · ▐0     0 ■■■■■■     0 ■■■
  ■ ■ · · ▐1     1 ■■■■■      1 ■■■■
  ■ ■ ■ · ▐1     work over    bytes received
  ■ ■ ■ ■ ▐0     the mean
  ▬0▬1▬1▬0       the strips: who holds a row, who holds a key
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.ground import arguments
from maskflash.masks.mask import Mask
from maskflash.parallel.shard_plan import ShardPlan
from maskflash.visualize.cells import Cells, cells
from maskflash.visualize.style import COLOURS, figure, frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST: Final = 512  # cells a side: more than a panel has room for
_FEW: Final = 32  # ranks, up to which there is a gap between bars
_GREY: Final = 0.25
_LIGHT: Final = 0.5  # of white in the colour of what is visible in part, and of bytes of the backward pass
_STRIP: Final = 0.035  # of the map's side
_MIB: Final = 2**20

Colours = NDArray[np.float64]


def draw_shards(plan: ShardPlan, mask: Mask, *, batch_row: int = 0, head: int = 0, **call: Any) -> Figure:
    """Draw which rank attends which pairs under a plan, beside each rank's work and what it receives.

    Every row of the map has its rank's colour, from dark for rank 0 to light for the last; pairs that are visible in
    part are paler. The strip at the right says who holds each row, and that below who holds each key: a row's keys of
    another colour than its own travel. Beyond 512 tokens a cell is a square of several, in the colour of its first row.

    Args:
        plan: from `mf.parallel.plan`.
        mask: the mask, or one of the masks that the plan is for.
        batch_row: which batch row to draw.
        head: which query head to draw.
        **call: device and the mask's own arguments: see `Mask.at`. Lengths, batch and heads are the plan's.

    Returns:
        The figure. Its axes are the map in tokens, the work over the mean, and MiB received in forward and backward.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentTypeError: the plan is no ShardPlan, or the mask no Mask.
        ArgumentError: there is no such batch row or head.

    Example:
        >>> import maskflash as mf
        >>> mask = mf.causal() & mf.document([300, 724])
        >>> made = draw_shards(mf.parallel.plan(mask, 1024, 4), mask)
        >>> [ax.get_title() for ax in made.axes[1:]]
        ['work over the mean', 'MiB received']
    """
    operation = "draw_shards"
    arguments.instance(operation, "plan", plan, ShardPlan, "make one with mf.parallel.plan")
    arguments.instance(operation, "mask", mask, Mask, "make one with mf.mask")
    tokens = plan.seq_len
    size = max(1, math.ceil(tokens / _MOST))
    block_map = mask.block_map(tokens, tokens, block_size=size, **{"batch": plan.batch, "heads": plan.heads, **call})
    drawn = cells(block_map, _MOST, batch_row, head)
    made = figure(3, widths=(1, 0.45, 0.45))
    place, work, moved = made.axes
    colours = _colours(plan.world_size)
    _map(place, plan, drawn, colours)
    frame(place, tokens, tokens)
    place.set_title(mask.name)
    total = np.array(plan.work, dtype=np.float64)
    _bars(work, [total / (total.mean() or 1.0)], colours)
    work.axvline(1, color="#404040", linewidth=0.8)
    work.set_title("work over the mean")
    work.set_ylabel("rank")
    _bars(moved, [np.array(one.received) / _MIB for one in (plan.forward, plan.backward)], colours)
    moved.set_title("MiB received")
    _legends(place, moved, plan)
    return made


def _map(ax: Axes, plan: ShardPlan, drawn: Cells, colours: Colours) -> None:
    """Cells in the colours of who holds their rows, and strips of who holds rows and keys."""
    held = sorted((start, stop, rank) for rank, ranges in enumerate(plan.shards) for start, stop in ranges)
    edges = np.array([start for start, _, _ in held] + [plan.seq_len], dtype=np.int64)
    held_by = colours[[rank for _, _, rank in held]]
    own = held_by[np.searchsorted(edges, drawn.rows[:-1], side="right") - 1][:, None]
    kind = drawn.kinds[:, :, None]
    blank = np.array([int(COLOURS[SKIP][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    ax.pcolorfast(drawn.columns, drawn.rows, np.select([kind == FULL, kind == PARTIAL], [own, _lighter(own)], blank))
    right, below = ax.inset_axes((1.015, 0, _STRIP, 1)), ax.inset_axes((0, -0.015 - _STRIP, 1, _STRIP))
    right.pcolorfast([0, 1], edges, held_by[:, None])
    right.set_ylim(plan.seq_len, 0)
    below.pcolorfast(edges, [0, 1], held_by[None])
    below.set_xlim(0, plan.seq_len)
    for strip in (right, below):
        strip.set_axis_off()


def _legends(place: Axes, moved: Axes, plan: ShardPlan) -> None:
    """Say what strips, pale squares and pale bars are; ranks have their numbers beside the bars."""
    from matplotlib.patches import Patch

    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.05), "frameon": False}
    strips = "right: the rank that holds each row; below: each key; pale squares: some pairs visible"
    if plan.seq_len <= _MOST:
        strips = strips.partition("; pale")[0]
    place.legend(handles=[], title=textwrap.fill(strips, 54), **below)
    ink = np.full((1, 3), _GREY)
    parts = [Patch(color=shade[0], label=name) for name, shade in (("forward", ink), ("backward", _lighter(ink)))]
    moved.legend(handles=parts, **below)


def _colours(ranks: int) -> Colours:
    """(ranks, 3), dark to light: neighbours differ in grey as well, as far as so many can."""
    from matplotlib import colormaps

    found: Colours = colormaps["viridis"](np.linspace(0.05, 0.9, ranks))[:, :3]
    return found


def _lighter(colours: Colours) -> Colours:
    return colours + _LIGHT * (1 - colours)


def _bars(ax: Axes, parts: list[NDArray[np.float64]], colours: Colours) -> None:
    """A bar for each rank, of parts one after the other, the later ones paler."""
    ranks = len(colours)
    begin = np.zeros(ranks)
    for part, shade in zip(parts, (colours, _lighter(colours)), strict=False):
        ax.barh(np.arange(ranks), part, left=begin, height=0.85 if ranks <= _FEW else 1.0, color=shade)
        begin = begin + part
    ax.set_ylim(ranks - 0.5, -0.5)
    ax.locator_params(axis="y", integer=True)
    ax.locator_params(axis="x", nbins=4)
