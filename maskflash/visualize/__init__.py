"""Masks and block maps -> matplotlib pictures and an HTML explorer, at 64 tokens as at a million.

Everything is drawn from runs of tiles, at no more cells than a figure has room for; no array has an entry for each
pair. matplotlib is an extra (`pip install 'maskflash[plot]'`), imported when a picture is drawn; the explorer needs
none.
"""

from maskflash.visualize.figures import draw_mask, draw_tiles, side_by_side
from maskflash.visualize.forms import draw_row_intervals, draw_slices
from maskflash.visualize.page import explorer
from maskflash.visualize.scores import draw_score
from maskflash.visualize.shards import draw_shards
from maskflash.visualize.vectors import draw_intervals

__all__ = [
    "draw_intervals",
    "draw_mask",
    "draw_row_intervals",
    "draw_score",
    "draw_shards",
    "draw_slices",
    "draw_tiles",
    "explorer",
    "side_by_side",
]


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)
