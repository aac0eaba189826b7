"""What commands write: a block map as text that fits a terminal, JSON, and progress where somebody watches."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.text import Text

from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.visualize.cells import Cells

CELLS: Final = 32  # of a picture's side, at most: two characters each, with the rows' numbers in 80 columns
_LABELLED: Final = 8  # every so many cells have their number
_STYLES: Final = {FULL: "bold blue", PARTIAL: "cyan", SKIP: "bright_black"}
_SHADES: Final = {FULL: "██", PARTIAL: "▒▒", SKIP: "· "}
_ASCII: Final = {FULL: "##", PARTIAL: "++", SKIP: ". "}
_NAMES: Final = {FULL: "full", PARTIAL: "partial", SKIP: "skip"}


class _Output(Console):
    """A console that leaves it to the command what a closed pipe means."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def console() -> Console:
    """Standard output: coloured on a terminal, unless $NO_COLOR is set; nothing is wrapped or cut."""
    return _Output(soft_wrap=True, highlight=False, emoji=False, markup=False)


def room(length: int) -> int:
    """Cells that fit beside the numbers of so many rows."""
    width = shutil.get_terminal_size().columns
    return max(1, min(CELLS, (width - _gutter(length) - 1) // 2))


def picture(drawn: Cells, encoding: str = "utf-8") -> Text:
    """Cells as lines: keys to the right, queries downwards, both numbered in tokens, over a legend."""
    try:
        "".join(_SHADES.values()).encode(encoding)
        shades = _SHADES
    except UnicodeEncodeError:
        shades = _ASCII
    gutter = _gutter(int(drawn.rows[-1]))
    numbers = "".join(f"{start:<{2 * _LABELLED},}" for start in drawn.columns[:-1:_LABELLED]).rstrip()
    text = Text(f"{'key':>{gutter}} {numbers}\n")
    for i, row in enumerate(drawn.kinds.tolist()):
        number = f"{drawn.rows[i]:,}" if i % _LABELLED == 0 else ""
        text.append(f"{number:>{gutter}} ")
        for kind in row:
            text.append(shades[kind], style=_STYLES[kind])
        text.rstrip()
        text.append("\n")
    text.append(" " * gutter)
    for kind, name in _NAMES.items():
        text.append(" ")
        text.append(shades[kind].strip(), style=_STYLES[kind])
        text.append(f" {name} ")
    return text


def print_json(data: dict[str, Any]) -> None:
    """Write data as JSON."""
    print(json.dumps(data, indent=2))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is being done on a terminal's standard error, and take it back when it is done."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(what):
        yield


def encoding() -> str:
    """Of standard output."""
    return sys.stdout.encoding or "utf-8"


def _gutter(length: int) -> int:
    return max(len(f"{length:,}"), 3)
