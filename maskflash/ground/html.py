"""What notebooks show of maskflash's values: text, tables and pictures -> small pieces of HTML.

Everything takes the page's own colours and tells kinds apart by strength, so that it reads in light and dark themes
and without telling hues apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

_MOST: Final = 4000  # characters of one text: notebooks keep what they show
_OPACITY: Final = {1: 0.4, 2: 0.9}  # of a cell, by kind: partial and full; skip is left out
_SIDE: Final = 256  # of a picture, in pixels


def lines(title: str, below: Sequence[str]) -> str:
    """A title, and text under it line by line."""
    text = f"<pre>{_text(chr(10).join(below))}</pre>" if below else ""
    return f"<div><b>{_text(title)}</b>{text}</div>"


def facts(title: str, rows: Mapping[str, str], picture: str = "") -> str:
    """A title, a table of names and values, and a picture."""
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left;vertical-align:top">{_text(name)}</th>'
        f'<td style="text-align:left"><pre style="margin:0">{_text(value)}</pre></td></tr>'
        for name, value in rows.items()
    )
    return f"<div><b>{_text(title)}</b><table>{cells}</table>{picture}</div>"


def tiles(kinds: Sequence[Sequence[int]], legend: str) -> str:
    """A lattice of kinds (0 skip, 1 partial, 2 full) as a drawing, with a legend."""
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
        for name, opacity in (("partial", _OPACITY[1]), ("full", _OPACITY[2]))
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
