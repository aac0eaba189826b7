"""A problem -> what can be found out about it, each thing when it is first asked for, and once.

                 formula     pieces of columns     pieces of rows     groups
    rows         x                                 x                  x
    columns      x           x                                        x

Rows and columns are told by the first of these that there is.
"""

from __future__ import annotations

from functools import cached_property

from maskflash.analysis.intervals import Rows
from maskflash.analysis.problem import Problem
from maskflash.analysis.ways.columns import Pieces, find_pieces
from maskflash.analysis.ways.ends import cut, joined
from maskflash.analysis.ways.groups import Groups, find_groups
from maskflash.analysis.ways.lines import Formula, find_formula, rows_of
from maskflash.analysis.ways.pairs import Evaluated, evaluate_all


class Facts:
    """What is known of a problem on the CPU, while its tables stay as they are.

    Attributes:
        problem: what is asked.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @cached_property
    def pairs(self) -> Evaluated | None:
        """What all pairs say; None where they are many."""
        return evaluate_all(self.problem)

    @cached_property
    def formula(self) -> Formula | None:
        """The formulas of a mask that compares only q, kv and q - kv with numbers."""
        return find_formula(self.problem)

    @cached_property
    def pieces(self) -> Pieces | None:
        """How to cut columns, where they can be cut."""
        return find_pieces(self.problem)

    @cached_property
    def pieces_of_rows(self) -> Pieces | None:
        """How to cut rows, likewise: the columns of the problem turned over."""
        return find_pieces(self.problem.turned())

    @cached_property
    def groups(self) -> Groups | None:
        """The groups of rows and columns, where these are few."""
        return find_groups(self.problem)

    @cached_property
    def intervals(self) -> Rows | None:
        """What rows see, where the ends of joined comparisons tell: one interval each."""
        return None if self.pieces_of_rows is None else joined(self.pieces_of_rows)

    @cached_property
    def rows(self) -> Rows | None:
        """What rows see; None where only pairs tell."""
        if self.pairs is not None:
            return self.pairs.rows
        if self.formula is not None:
            return rows_of(self.formula.rows)
        if self.pieces_of_rows is not None:
            return self.intervals or cut(self.pieces_of_rows)
        return None if self.groups is None else self.groups.seen()

    @cached_property
    def columns(self) -> Rows | None:
        """By which rows columns are seen, as the rows of the problem turned over; None where only pairs tell."""
        if self.formula is not None:
            return rows_of(self.formula.columns)
        if self.pieces is not None:
            return joined(self.pieces) or cut(self.pieces)
        return None if self.groups is None else self.groups.turned().seen()
