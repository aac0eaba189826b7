"""The frames that run -> the line of the user's code that they stand in, and whether it asks for a class."""

from __future__ import annotations

import linecache
import sys
from dis import opname
from functools import lru_cache
from types import CodeType, FrameType
from typing import Final

from maskflash.expr.nodes import Source

OWN: Final = ("maskflash.expr.", "maskflash.trace.")  # modules whose lines are no user's

_Place = tuple[int | None, int | None, int | None, int | None]  # of an instruction: lines, and columns in UTF-8


class UserCode:
    """Where the predicate of one trace stands.

    Args:
        home: where it is defined; what no line of its code causes is said to come from there.
        entry: the code that runs it: frames from there outward are not the predicate's.
    """

    def __init__(self, home: Source, entry: CodeType) -> None:
        self.home = home
        self._entry = entry
        self._sources: dict[tuple[int, int], Source] = {}
        self._places: dict[int, tuple[CodeType, list[_Place]]] = {}

    def site(self) -> tuple[int, int] | None:
        """The instruction that is running; None outside the predicate."""
        frame = self._frame()
        return None if frame is None else (self._number(frame.f_code), frame.f_lasti)

    def source(self) -> Source:
        """The line that is running."""
        frame = self._frame()
        return self.home if frame is None else self._source_at(frame.f_code, frame.f_lasti, frame.f_lineno)

    def source_of(self, error: BaseException) -> Source:
        """The line that raised."""
        source, step = self.home, error.__traceback__
        while step is not None:
            if not _is_ours(step.tb_frame):
                source = self._source_at(step.tb_frame.f_code, step.tb_lasti, step.tb_lineno)
            step = step.tb_next
        return source

    def _frame(self) -> FrameType | None:
        """The innermost frame that is neither this package's nor torch's; None outside the predicate."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._entry:
            if not _is_ours(frame):
                return frame
            frame = frame.f_back
        return None

    def _source_at(self, code: CodeType, instruction: int, line: int) -> Source:
        key = (self._number(code), instruction)
        if key not in self._sources:
            place = self._places[key[0]][1][instruction // 2]
            number = place[0] or line
            text = _code_text(code.co_filename, number, place)
            self._sources[key] = Source(self.home.function, code.co_filename, number, text)
        return self._sources[key]

    def _number(self, code: CodeType) -> int:
        """What stands for code in keys: its hash costs as much as it is long, and so does finding a line in it."""
        if id(code) not in self._places:
            self._places[id(code)] = code, list(code.co_positions())
        return id(code)


def asks_for_class(frame: FrameType | None) -> bool:
    """Whether user code asks for a class; functions in C that it calls do so too, such as torch's."""
    while frame is not None and frame.f_globals.get("__name__") in ("abc", "typing"):
        frame = frame.f_back
    if frame is None or f"{frame.f_globals.get('__name__')}.".startswith((*OWN, "torch.", "numpy.")):
        return False
    code = frame.f_code
    instruction = opname[code.co_code[frame.f_lasti]]
    if "CALL" not in instruction:
        return instruction in ("LOAD_ATTR", "MATCH_CLASS")
    rewritten = any(name.startswith("__mf_") for name in code.co_freevars)  # there `isinstance` is ours
    return "isinstance" in code.co_names and not rewritten


def _is_ours(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith((*OWN, "torch."))


def _code_text(filename: str, number: int, place: _Place) -> str:
    """The source of the expression at a place, or its first line where it has several."""
    first, last, start, stop = place
    line = linecache.getline(filename, number)
    if first is not None and first == last and start is not None and stop is not None:
        return _encoded(line)[start:stop].decode(errors="replace").strip()
    return line.strip()


@lru_cache(maxsize=16)
def _encoded(line: str) -> bytes:
    return line.encode()
