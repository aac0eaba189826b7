"""Branches of a predicate -> one value: runs it once per combination of undecided conditions and merges the results.

A condition that Python itself must branch on (a statement-level `if`) can't be recorded, so the code runs again with
the other answer, depth first. Results meet again in an if-then-else graph; equal ones don't fork it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from maskflash.expr.nodes import Builder, Node
from maskflash.trace.premises import Premises

FEW_PATHS = 64  # beyond this many, conditions are also decided by the values of constants
MAX_PATHS = 4096


# What passes through the user's code derives from BaseException: `except Exception` there must not end it.


class TooManyPaths(BaseException):
    """The limit of the current attempt is passed."""


class CannotMerge(Exception):
    """Two branches gave values that no expression covers, such as a number and None."""


class Unrepeatable(BaseException):
    """A second run with the same answers met another condition: the predicate depends on more than its arguments."""


class Apart(BaseException):
    """Something told merged branches apart after all: trace anew, with the branches of this code apart."""

    def __init__(self, code: CodeType) -> None:
        super().__init__(code.co_name)
        self.code = code


class RaisesInBranch(BaseException):
    """The user's code raises on some of its paths, as far as their conditions say; the error is its cause."""


NEVER = object()  # the value of a path that no pair takes
Answer = tuple[int, bool]  # a condition's node, and what it was taken to be


@dataclass(slots=True)
class _Path:
    """One run: the answers it must repeat, those it gave, and what follows from them."""

    prefix: list[Answer]
    facts: Premises
    taken: list[Answer] = field(default_factory=list)


class Paths:
    """The branches of one trace. `number` gives the value of a constant node, or None if it has no fixed value."""

    def __init__(self, builder: Builder, number: Callable[[Node], float | None], limit: int, use_values: bool) -> None:
        self._builder = builder
        self._number = number
        self._limit = limit
        self._use_values = use_values
        self._stack: list[_Path] = []
        self._count = 0

    def explore(
        self,
        run: Callable[[], Any],
        merge: Callable[[int, Any, Any], Any],
        mark: Callable[[], int],
        rewind: Callable[[int], None],
    ) -> Any:
        """The value of `run()` over all its branches; `merge(condition, x, y)` joins two (or raises CannotMerge).

        A run whose value is NEVER is left out. `mark` and `rewind` put per-run counters back before the next run.

        Raises:
            TooManyPaths: the branches exceed the limit.
            Unrepeatable: the code does not meet the same conditions when it is run again.
        """
        outcomes: list[tuple[list[Answer], Any]] = []
        prefix: list[Answer] = []
        start = mark()
        while True:
            outer = self._stack[-1].facts.ranges if self._stack else None
            path = _Path(prefix, Premises(self._builder.nodes, self._number, outer))
            self._stack.append(path)
            try:
                value = run()
            finally:
                self._stack.pop()
            if len(path.taken) < len(prefix):
                raise Unrepeatable
            outcomes.append((path.taken, value))
            while len(outcomes) > 1 and _siblings(outcomes[-2][0], outcomes[-1][0]):
                (_, other), (taken, this) = outcomes[-2:]
                joined = this if other is NEVER else other if this is NEVER else merge(taken[-1][0], other, this)
                outcomes[-2:] = [(taken[:-1], joined)]
            prefix = list(path.taken)
            while prefix and not prefix[-1][1]:
                prefix.pop()
            if not prefix:
                if outcomes[0][1] is NEVER:
                    raise CannotMerge
                return outcomes[0][1]
            prefix[-1] = (prefix[-1][0], False)
            rewind(start)
            self._count += 1
            if self._count >= self._limit:
                raise TooManyPaths

    def branching(self, everywhere: bool = False) -> bool:
        """Whether the code that runs does so for some pairs only: since the innermost `explore` began, or at all."""
        return any(path.taken for path in (self._stack if everywhere else self._stack[-1:]))

    def impossible(self) -> bool:
        """Whether no pair with q >= 0 takes the current path, as far as the ranges of the index variables say."""
        path = self._stack[-1]
        return self._use_values and bool(path.taken) and path.facts.contradict()

    def decide(self, condition: int) -> bool:
        """The answer to a condition on the current path; True first when both are possible."""
        node = self._builder.nodes[condition]
        if node.op == "not":
            return not self.decide(node.args[0])
        if node.op == "const":
            return bool(node.value)
        for path in self._stack:
            if condition in path.facts.answers:
                return path.facts.answers[condition]
        path = self._stack[-1]
        if self._use_values:
            implied = path.facts.implied(condition)
            if implied is not None:
                return implied
        place = len(path.taken)
        if place >= self._limit:  # a loop that no answer ends
            raise TooManyPaths
        answer = True
        if place < len(path.prefix):
            expected, answer = path.prefix[place]
            if expected != condition:
                raise Unrepeatable
        path.taken.append((condition, answer))
        path.facts.learn(condition, answer)
        return answer


def _siblings(x: list[Answer], y: list[Answer]) -> bool:
    return bool(y) and len(x) == len(y) and x[:-1] == y[:-1] and x[-1][0] == y[-1][0] and x[-1][1] != y[-1][1]
