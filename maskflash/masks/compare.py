"""Two masks -> whether they are the same, or one within the other; else pairs that show they are not, in a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from maskflash.analysis.changes import find_changes, find_runs
from maskflash.analysis.problem import Problem
from maskflash.masks.predicate import MaskLike, mask

Pair = tuple[int, int, int, int]

_WHOLE: Final = 16  # rows and columns that are drawn whole
_AROUND: Final = 4  # rows and columns on each side of a pair, else
_MARKS: Final = ("·", "a", "b", "■")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer to a question about two masks; it is true or false itself.

    Attributes:
        holds: the answer.
        counterexample: (b, h, q, kv) of a pair that the masks treat differently; None where the answer is yes.
    """

    holds: bool
    counterexample: Pair | None

    def __bool__(self) -> bool:
        return self.holds

    def _repr_html_(self) -> str:
        from maskflash.visualize import notebook

        return notebook.of_comparison(self)


class Surplus(NamedTuple):
    """What one mask shows and another doesn't.

    Attributes:
        pairs: how many, over all batch rows and heads.
        first: (b, h, q, kv) of one: the first of the first key that has any.
    """

    pairs: int
    first: Pair


@dataclass(frozen=True, slots=True)
class Relation:
    """How two masks differ at some lengths; it is true if they don't, and prints what differs, with a picture.

    Attributes:
        a: the first mask, as messages call it.
        b: the second.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        only_a: what the first shows and the second hides; None for nothing.
        only_b: what the second shows and the first hides; None for nothing.
        picture: the pairs around those that differ first, queries downwards: ■ both show it, a and b one, · none.
    """

    a: str
    b: str
    q_len: int
    kv_len: int
    only_a: Surplus | None
    only_b: Surplus | None
    picture: str

    def __bool__(self) -> bool:
        return self.only_a is None and self.only_b is None

    def __str__(self) -> str:
        how = {
            (True, True): "a and b show the same pairs",
            (False, True): "a shows what b shows, and more",
            (True, False): "b shows what a shows, and more",
            (False, False): "each shows pairs that the other hides",
        }[self.only_a is None, self.only_b is None]
        lines = [f"a  {self.a}", f"b  {self.b}", "", f"{self.q_len:,} queries x {self.kv_len:,} keys: {how}"]
        for name, only in (("a", self.only_a), ("b", self.only_b)):
            if only is not None:
                b, h, q, kv = only.first
                where = f"batch row {b}, head {h}, " if b or h else ""
                lines.append(f"only in {name}: {only.pairs:,} pairs, first {where}query {q:,}, key {kv:,}")
        if self.picture:
            lines += ["", self.picture, "", "■ both, a or b alone, · neither"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from maskflash.visualize import notebook

        return notebook.of_answer("the same" if self else "not the same", str(self).splitlines())


def equivalent(a: MaskLike, b: MaskLike, q_len: int, kv_len: int, **call: Any) -> Comparison:
    """Whether two masks show the same pairs at these lengths: decided exactly, at the cost of their boundaries.

    Args:
        a: a mask or predicate.
        b: another.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        **call: batch, heads, q_offset, kv_offset and device as in `Mask.at`, and the masks' own arguments; those of one
            name are one argument.

    Returns:
        The answer, with a counterexample where it is no.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

    Example:
        >>> window = mask(lambda b, h, q, kv: abs(q - kv) <= 4)
        >>> bool(equivalent(window, lambda b, h, q, kv: q - 4 <= kv <= q + 4, 1000, 1000))
        True
        >>> equivalent(window, lambda b, h, q, kv: q - 4 <= kv < q + 4, 1000, 1000).counterexample
        (0, 0, 0, 4)
    """
    return _shows_nothing((mask(a) ^ mask(b)).at_call("equivalent", q_len, kv_len, call).problem)


def implies(a: MaskLike, b: MaskLike, q_len: int, kv_len: int, **call: Any) -> Comparison:
    """Whether every pair that `a` shows is one that `b` shows: "no token sees another document", say.

    The arguments and errors are those of `equivalent`; a counterexample is visible in a and hidden in b.

    Example:
        >>> packed = mask(lambda b, h, q, kv: q >= kv and q // 100 == kv // 100)
        >>> bool(implies(packed, lambda b, h, q, kv: q - kv < 100, 1000, 1000))
        True
    """
    return _shows_nothing((mask(a) & ~mask(b)).at_call("implies", q_len, kv_len, call).problem)


def compare(a: MaskLike, b: MaskLike, q_len: int, kv_len: int, **call: Any) -> Relation:
    """How two masks differ at these lengths: decided exactly, at the cost of their boundaries.

    The arguments and errors are those of `equivalent`.

    Example:
        >>> from maskflash import from_arguments, sliding_window
        >>> print(compare(from_arguments("transformers", sliding_window=2), sliding_window(2), 5, 5))
        a  transformers(sliding_window=2)
        b  sliding_window(2)
        <BLANKLINE>
        5 queries x 5 keys: b shows what a shows, and more
        only in b: 3 pairs, first query 2, key 0
        <BLANKLINE>
                key 0
        query 0 ■ · · · ·
              1 ■ ■ · · ·
              2 b ■ ■ · ·
              3 · b ■ ■ ·
              4 · · b ■ ■
        <BLANKLINE>
        ■ both, a or b alone, · neither
    """
    first, second = mask(a), mask(b)
    only_a, only_b, both = (
        joined.at_call("compare", q_len, kv_len, dict(call)).problem
        for joined in (first & ~second, second & ~first, first & second)
    )
    more_a, more_b = _surplus(only_a), _surplus(only_b)
    places = dict.fromkeys((_area(one.first, only_a), one.first[:2]) for one in (more_a, more_b) if one is not None)
    picture = "\n\n".join(_drawn((only_a, only_b, both), *place) for place in places)
    return Relation(first.name, second.name, q_len, kv_len, more_a, more_b, picture)


def _surplus(problem: Problem) -> Surplus | None:
    """What a mask shows; None for nothing."""
    column, start, stop = find_runs(problem)
    if not len(column):
        return None
    unit, kv = divmod(int(column[0]), problem.kv_len)
    copies = problem.batch * problem.heads // math.prod(problem.shape[:2])
    return Surplus(int((stop - start).sum()) * copies, (*divmod(unit, problem.shape[1]), int(start[0]), kv))


def _area(pair: Pair, problem: Problem) -> tuple[range, range]:
    """The rows and columns that are drawn around a pair."""
    lengths = problem.q_len, problem.kv_len
    if max(lengths) <= _WHOLE:
        return range(lengths[0]), range(lengths[1])
    q, kv = (
        range(max(at - _AROUND, 0), min(at + _AROUND + 1, length)) for at, length in zip(pair[2:], lengths, strict=True)
    )
    return q, kv


def _drawn(problems: tuple[Problem, ...], area: tuple[range, range], unit: tuple[int, int]) -> str:
    """Pairs of one batch row and head: · none, what only the first shows, what only the second does, what both do."""
    rows, columns = (torch.tensor(list(side)) for side in area)
    b, h = (torch.tensor(index) for index in unit)
    kinds = torch.zeros(len(rows), len(columns), dtype=torch.int64)
    for kind, problem in enumerate(problems, 1):
        kinds[problem.on_host().visible(b, h, rows[:, None], columns).expand_as(kinds)] = kind
    width = len("query ") + len(f"{area[0][-1]:,}")
    lines = [f"batch row {unit[0]}, head {unit[1]}"] if any(unit) else []
    lines.append(f"{'':{width}} key {area[1][0]:,}")
    for q, line in zip(area[0], kinds.tolist(), strict=True):
        number = f"{q:,}" if q != area[0][0] else f"query {q:>{width - len('query ')},}"
        lines.append(f"{number:>{width}} {' '.join(_MARKS[kind] for kind in line)}")
    return "\n".join(lines)


def _shows_nothing(problem: Problem) -> Comparison:
    """Whether a mask shows nothing; else the first pair of the first column that shows one."""
    changes = find_changes(problem)
    if not len(changes.column):
        return Comparison(True, None)
    unit, kv = divmod(int(changes.column[0]), problem.kv_len)
    return Comparison(False, (*divmod(unit, problem.shape[1]), int(changes.row[0]), kv))
