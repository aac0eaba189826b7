"""Two masks -> whether they are the same, or one within the other; else a pair that shows they are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maskflash.analysis.changes import find_changes
from maskflash.analysis.problem import Problem
from maskflash.masks.predicate import MaskLike, mask

Pair = tuple[int, int, int, int]


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


def _shows_nothing(problem: Problem) -> Comparison:
    """Whether a mask shows nothing; else the first pair of the first column that shows one."""
    changes = find_changes(problem)
    if not len(changes.column):
        return Comparison(True, None)
    unit, kv = divmod(int(changes.column[0]), problem.kv_len)
    return Comparison(False, (*divmod(unit, problem.shape[1]), int(changes.row[0]), kv))
