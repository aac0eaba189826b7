"""Masks, block maps, explanations and answers -> text pictures, and the small pieces of HTML that notebooks show.

HTML takes the page's own colours and tells kinds apart by strength, so that it reads in light and dark themes and
without telling hues apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.expr.format import format_expr
from maskflash.visualize.cells import cells

if TYPE_CHECKING:
    from maskflash.masks.compare import Comparison
    from maskflash.masks.mask import Mask

_TEXT_SIDE: Final = 32  # cells of a text picture; larger maps are shrunk to at most this
_DRAWN_SIDE: Final = 64  # of one in a notebook
_SHADES: Final = "·▒█"  # by kind
_OPACITY: Final = {PARTIAL: 0.4, FULL: 0.9}  # of a cell; skipped ones are left out
_MOST: Final = 4000  # characters of one text: notebooks keep what they show
_SIDE: Final = 256  # of a picture, in pixels


def picture(block_map: BlockMap) -> str:
    """The first batch row's and head's tiles as text, under a legend."""
    kinds, legend = _first(block_map, _TEXT_SIDE)
    key = f"{_SHADES[SKIP]} skip  {_SHADES[PARTIAL]} partial  {_SHADES[FULL]} full"
    rows = ("".join(_SHADES[kind] for kind in row) for row in kinds)
    return "\n".join(("  ".join(filter(None, (key, legend))), *rows))


def of_map(block_map: BlockMap) -> str:
    """A block map's sizes and its first batch row's and head's tiles, as HTML."""
    return of_answer(repr(block_map), ()) + _tiles(*_first(block_map, _DRAWN_SIDE))


def of_mask(mask: Mask) -> str:
    """A mask's name, expression and arguments, as HTML."""
    traced = mask.known()
    names = [f"{name}={mask.defaults[name]!r}" if name in mask.defaults else name for name in mask.keywords]
    rows = {
        "visible": format_expr(traced.expr, traced.params, traced.names) if traced else "",
        "arguments": ", ".join(names),
    }
    return of_facts(mask.name, {label: text for label, text in rows.items() if text})


def of_comparison(comparison: Comparison) -> str:
    """Whether two masks are the same, or the pair that shows they aren't, as HTML."""
    if comparison.counterexample is None:
        return of_answer("yes", ())
    b, h, q, kv = comparison.counterexample
    return of_answer("no", [f"for batch row {b}, head {h}, query {q}, key {kv}"])


def of_answer(title: str, below: Sequence[str]) -> str:
    """A title, and text under it line by line, as HTML."""
    text = f"<pre>{_text(chr(10).join(below))}</pre>" if below else ""
    return f"<div><b>{_text(title)}</b>{text}</div>"


def of_facts(title: str, rows: Mapping[str, str]) -> str:
    """A title, and a table of names and values, as HTML."""
    body = "".join(
        f'<tr><th scope="row" style="text-align:left;vertical-align:top">{_text(name)}</th>'
        f'<td style="text-align:left"><pre style="margin:0">{_text(value)}</pre></td></tr>'
        for name, value in rows.items()
    )
    return f"<div><b>{_text(title)}</b><table>{body}</table></div>"


def _first(block_map: BlockMap, most: int) -> tuple[list[list[int]], str]:
    """The kinds of at most `most` x `most` cells of the first batch row and head, and what a cell is."""
    batch, heads, n_q, n_kv = block_map.shape
    side = max(1, math.ceil(max(n_q, n_kv) / most))
    facts = [f"one cell is {side} x {side} tiles"] * (side > 1)
    facts += [f"batch row 0, head 0 of {batch} x {heads}"] * (batch * heads > 1)
    legend = f"({'; '.join(facts)})" if facts else ""
    return (cells(block_map, most).kinds.tolist() if math.prod(block_map.shape) else []), legend


def _tiles(kinds: Sequence[Sequence[int]], legend: str) -> str:
    """A lattice of kinds as a drawing, with a legend."""
    height, width = len(kinds), len(kinds[0]) if kinds else 0
    if not width:
        return f"<div>{_text(legend)}</div>"
    paths = "".join(
        f'<path fill="currentColor" fill-opacity="{opacity}" d="{_runs(kinds, kind)}"/>'
        for kind, opacity in _OPACITY.items()
    )
    scale = _SIDE / max(height, width)
    keys = "".join(
        f' <span style="opacity:{opacity}">&#9632;</span> {name}'
        for name, opacity in (("partial", _OPACITY[PARTIAL]), ("full", _OPACITY[FULL]))
    )
    return (
        f'<svg role="img" aria-label="{_text(legend)}" width="{width * scale:.0f}" height="{height * scale:.0f}" '
        f'viewBox="0 0 {width} {height}" style="border:1px solid currentColor" shape-rendering="crispEdges" '
        f'preserveAspectRatio="none">{paths}</svg><div>&#9633; skip{keys} {_text(legend)}</div>'
    )


def _runs(kinds: Sequence[Sequence[int]], kind: int) -> str:
    """The cells of a kind as one path, runs of a row together."""
    path = []
    for y, row in enumerate(kinds):
        x = 0
        while x < len(row):
            stop = x
            while stop < len(row) and row[stop] == kind:
                stop += 1
            if stop > x:
                path.append(f"M{x} {y}h{stop - x}v1H{x}z")
            x = stop + 1 if stop == x else stop
    return "".join(path)


def _text(value: str) -> str:
    from html import escape  # 2 ms, for a table of all entities

    shown = value if len(value) <= _MOST else f"{value[:_MOST]} ..."
    return escape(shown)
