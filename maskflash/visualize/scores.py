"""A mask and a score function -> a picture of what it adds to a score, in colours on a scale of numbers.

Few pairs are drawn one by one. Of many, tiles are, or squares of tiles: each in the colour of the mean over some of its
pairs, hatched where the mask hides others.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maskflash.analysis.runs import PARTIAL, SKIP
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.mask import Mask
from maskflash.scores.score import ScoreLike
from maskflash.visualize.cells import Cells, cells
from maskflash.visualize.effects import SAMPLES, Effect
from maskflash.visualize.style import COLOURS, OUTLINE, SCALE, UNKNOWN, axes, frame, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from numpy.typing import NDArray

_PAIRS: Final = 512  # tokens a side, up to which each pair is drawn by itself
_SQUARES: Final = 64  # a side: each has room for its hatch
_HATCH: Final = "#ffffffa0"
_LINE: Final = 40  # letters that a line of the legend has room for


def draw_score(
    mask: Mask,
    score: ScoreLike,
    q_len: int,
    kv_len: int,
    *,
    at: float = 0.0,
    ax: Axes | None = None,
    batch_row: int = 0,
    head: int = 0,
    block_size: BlockSize = 128,
    legend: bool = True,
    **call: Any,
) -> Axes:
    """Draw what a score function adds to a score, wherever the mask shows the pair.

    Up to 512 tokens each pair has its colour. Beyond, each tile has that of the mean over at most 16 x 16 of its pairs,
    those that are visible among them; beyond 64 tiles a side, squares of several tiles do. Tiles that are visible in
    part are hatched. Ticks are at borders of tiles. The bar beside the picture says which colour is which number.

    Args:
        mask: the mask.
        score: the score function, or several that are applied in turn: as in `compile`.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        at: the score that is changed, the same for all pairs. A bias adds the same to each; a soft-cap adds nothing to
            0, and more to larger ones.
        ax: where to draw; None makes a figure (`returned.figure`).
        batch_row: which batch row to draw.
        head: which query head to draw.
        block_size: tokens per tile, one number or (q_tokens, kv_tokens).
        legend: whether to draw the bar, and say what hatches are.
        **call: batch, heads, q_offset, kv_offset, device, the mask's own arguments and the score function's.

    Returns:
        The axes, in tokens: queries downwards, keys to the right.

    Raises:
        BackendError: matplotlib is not installed.
        ArgumentError: lengths, or a row or head, that don't fit.
        MaskIndexError: a look-up out of range that no guard excludes.

    Example:
        >>> import maskflash as mf
        >>> draw_score(mf.causal(), mf.scores.alibi(), 64, 64, heads=8, head=2).get_title()
        'alibi()'
    """
    operation = "draw_score"
    arguments.instance(operation, "mask", mask, Mask, "make one with mf.mask")
    legend = arguments.flag(operation, "legend", legend)
    size = arguments.block_size(operation, block_size)
    effect = Effect.of(operation, mask, score, at, q_len, kv_len, call)
    effect.sight.sizes.check_index(b=batch_row, h=head)
    q_len, kv_len = effect.problem.q_len, effect.problem.kv_len
    alone = max(q_len, kv_len) <= _PAIRS
    drawn = cells(effect.sight.block_map((1, 1) if alone else size), _PAIRS if alone else _SQUARES, batch_row, head)
    square = (1, 1) if alone else (drawn.side * size[0], drawn.side * size[1])
    number = np.ma.masked_invalid(effect.added(batch_row, head, square).mean)
    unknown = (drawn.kinds > SKIP) & np.ma.getmaskarray(number)
    ax = axes(ax)
    ax.set_facecolor(COLOURS[SKIP])
    image = _image(ax, number, drawn)
    _squares(ax, unknown, drawn, facecolor=UNKNOWN)
    if not alone:
        _squares(ax, drawn.kinds == PARTIAL, drawn, facecolor="none", edgecolor=_HATCH, hatch="////", linewidth=0)
    _borders(ax, size, q_len, kv_len)
    frame(ax, q_len, kv_len, size)
    ax.set_title(titled(effect.name))
    if legend:
        assert ax.figure is not None, "axes are a figure's"
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
        bar.set_label(f"added to a score of {effect.at:g}")
        _legend(ax, drawn, square, size, bool(unknown.any()))
    return ax


def _image(ax: Axes, number: np.ma.MaskedArray[Any, Any], drawn: Cells) -> ScalarMappable:
    """Numbers as an image, those that there aren't left out."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    low, high = (number.min(), number.max()) if number.count() else (0.0, 0.0)
    room = 0.5 * (low == high)  # one number is in the middle of the scale
    norm = Normalize(low - room, high + room)
    colours = LinearSegmentedColormap.from_list("numbers", SCALE)
    if not number.size:
        return ScalarMappable(norm, colours)
    return ax.pcolorfast(drawn.columns, drawn.rows, number, cmap=colours, norm=norm)


def _squares(ax: Axes, chosen: NDArray[np.bool_], drawn: Cells, **look: Any) -> None:
    """Draw over some of the squares."""
    from matplotlib.collections import PolyCollection

    ax.add_collection(PolyCollection(list(drawn.corners(chosen)), **look))


def _borders(ax: Axes, size: tuple[int, int], q_len: int, kv_len: int) -> None:
    """Lines between tiles, where they have room."""
    if max(math.ceil(q_len / size[0]), math.ceil(kv_len / size[1])) <= _SQUARES:
        ax.hlines(range(0, q_len, size[0]), 0, kv_len, color=OUTLINE, linewidth=0.4)
        ax.vlines(range(0, kv_len, size[1]), 0, q_len, color=OUTLINE, linewidth=0.4)


def _legend(ax: Axes, drawn: Cells, square: tuple[int, int], size: tuple[int, int], unknown: bool) -> None:
    """Say below the axes what has a colour, and what those are that have none."""
    from matplotlib.patches import Patch

    alone = square == (1, 1)
    handles = [Patch(facecolor=COLOURS[SKIP], edgecolor="#808080", label="hidden")]
    if not alone:
        handles.append(Patch(facecolor=SCALE[3], edgecolor=_HATCH, hatch="////", label="visible in part"))
    if unknown:
        handles.append(Patch(facecolor=UNKNOWN, label="not finite" if alone else "no sampled pair"))
    tile = f"tile of {size[0]:,} x {size[1]:,}" if drawn.side == 1 else f"square of {square[0]:,} x {square[1]:,}"
    some = f"each {tile} pairs: the mean of its visible ones"
    if max(square) > SAMPLES:
        some += f", of {min(SAMPLES, square[0])} x {min(SAMPLES, square[1])} that were looked at"
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "frameon": False}
    ax.legend(handles=handles, title="each pair" if alone else textwrap.fill(some, _LINE), ncols=len(handles), **below)
