"""What can go wrong -> an error: the kernel's own fault, or PTX that the emulator does not know."""

from __future__ import annotations


class Fault(Exception):
    """The kernel did what it must not do.

    Attributes:
        kind: where and what, in a few words that tests compare: "global bounds", "shared race".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind

    def at(self, place: str) -> Fault:
        """The same fault, with the place where it happened."""
        found = Fault(self.kind, f"{str(self).removeprefix(f'{self.kind}: ')}\n    at {place}")
        return found.with_traceback(self.__traceback__)


class Unsupported(Exception):
    """PTX that the emulator does not know: never guessed at."""
