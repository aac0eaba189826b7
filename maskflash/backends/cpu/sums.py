"""Derivatives of a tile's values in what they look up -> the gradients of tables, in one order of summation.

A look-up's indices say over what is summed before anything is added to the table:

    table[h]           over the whole tile          table[q], table[kv]      over rows, over columns
    table[h, kv - q]   along diagonals              table[q, kv], others     nothing

What is left is added element by element on one core, in order. Sums along diagonals are kept for a whole call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.backends.cpu.programs import Pairs, diagonal_nodes, linear, part_of
from maskflash.expr.derivative import differentiate
from maskflash.expr.nodes import Expr

_MAX_DOUBLE: Final = 1 << 20  # elements of a table whose gradient is summed in float64


@dataclass(frozen=True, slots=True)
class LearnedLookup:
    """A look-up whose table wants a gradient.

    Attributes:
        slot: of the table.
        adjoint: position of the value's derivative in what it reads, in the program with derivatives; None for 1.
        indices: positions of its indices.
        diagonal: whether it is the same for all pairs of one kv - q, where tiles have diagonals.
        by_head: whether query heads read parts of the table of their own.
    """

    slot: int
    adjoint: int | None
    indices: tuple[int, ...]
    diagonal: bool
    by_head: bool

    @property
    def roots(self) -> tuple[int, ...]:
        """What of the program is needed in each tile."""
        adjoint = () if self.adjoint is None else (self.adjoint,)
        return adjoint if self.diagonal else (*adjoint, *self.indices)


@lru_cache(maxsize=256)
def readings(expr: Expr, wanted: tuple[bool, ...], *, by_diagonals: bool) -> tuple[LearnedLookup, ...]:
    """The look-ups of a score's program that want a gradient.

    Args:
        expr: without derivatives.
        wanted: for each of its tables.
        by_diagonals: whether tiles have diagonals.
    """
    derivatives = differentiate(expr)
    nodes = derivatives.expr.nodes
    diagonals = diagonal_nodes(derivatives.expr) if by_diagonals else frozenset[int]()
    return tuple(
        LearnedLookup(
            nodes[position].slot,
            None if is_one(derivatives.expr, adjoint) else adjoint,
            nodes[position].args,
            position in diagonals,
            any(nodes[arg].op == "h" for arg in nodes[position].args),
        )
        for position, adjoint in derivatives.lookups
        if wanted[nodes[position].slot]
    )


def is_one(expr: Expr, position: int) -> bool:
    """Whether a node is the number 1."""
    return expr.nodes[position].op == "const" and expr.nodes[position].value == 1.0


@dataclass(slots=True, eq=False)
class Sums:
    """Gradients of some tables, as far as one lane of work has summed them.

    Attributes:
        tables: by slot.
        total: dtype in which terms come.
    """

    tables: dict[int, Tensor]
    total: torch.dtype
    found: dict[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.found = {
            slot: torch.zeros(
                max(table.numel(), 1), dtype=torch.float64 if table.numel() <= _MAX_DOUBLE else self.total
            )
            for slot, table in self.tables.items()
        }

    def add(self, slot: int, indices: Sequence[Tensor], terms: Tensor) -> None:
        """Add what look-ups of one table get.

        Args:
            slot: of the table.
            indices: int64, of shapes that broadcast to that of terms.
            terms: (heads, rows, columns). Summed over the dimensions in which no index differs.
        """
        table, found = self.tables[slot], self.found[slot]
        if not table.numel():
            return
        strides = [1] * table.ndim
        for dim in range(table.ndim - 2, -1, -1):
            strides[dim] = strides[dim + 1] * table.shape[dim + 1]
        place = linear(indices, table.shape, strides) if indices else torch.zeros((), dtype=torch.int64)
        place = place.reshape((1,) * (3 - place.ndim) + place.shape)
        same = [dim for dim in range(3) if place.shape[dim] == 1 and terms.shape[dim] > 1]
        if same:  # of one dimension as terms come, which takes a tenth of the time
            terms = terms.sum(same.pop(), keepdim=True)
        terms = terms.to(found.dtype)
        if same:
            terms = terms.sum(same, keepdim=True)
        found.index_add_(0, place.expand(terms.shape).reshape(-1), terms.reshape(-1))

    def add_all(self, other: Sums) -> None:
        """Add all that another has found."""
        for slot, found in other.found.items():
            self.found[slot] += found

    def gradients(self) -> tuple[Tensor, ...]:
        """One for each table, of its shape and dtype, rounded once."""
        return tuple(
            self.found[slot][: table.numel()].view(table.shape).to(table.dtype) for slot, table in self.tables.items()
        )


class CallSums:
    """What a call's look-ups get, tile by tile.

    Args:
        sums: into which.
        read: its look-ups.
        pairs: its pairs.
        expr: the program with derivatives.
        total: dtype of terms.
    """

    def __init__(self, sums: Sums, read: Sequence[LearnedLookup], pairs: Pairs, expr: Expr, total: torch.dtype) -> None:
        self._sums, self._read, self._pairs, self._expr = sums, read, pairs, expr
        shape = (len(pairs.heads), 1, pairs.diagonals)
        self._along = [torch.zeros(shape, dtype=total) if reading.diagonal else None for reading in read]

    def add(self, rows: slice, columns: slice, ds: Tensor, dead: Tensor | None, roots: Iterator[Tensor]) -> None:
        """Add those of a tile.

        Args:
            rows: of the call.
            columns: of the call.
            ds: derivatives of the values, (heads, rows, columns), rows from the last to the first.
            dead: pairs that count for nothing, whatever their derivatives are; None for none.
            roots: the program's, those of each look-up in turn.
        """
        for reading, along in zip(self._read, self._along, strict=True):
            terms = ds
            if reading.adjoint is not None:
                terms = ds * next(roots)
                if dead is not None:
                    terms.masked_fill_(dead, 0.0)
            if along is None:
                self._sums.add(reading.slot, [next(roots).to(torch.int64) for _ in reading.indices], terms)
            else:
                found, first = along_diagonals(terms), self._pairs.first_diagonal(rows, columns)
                along[..., first : first + found.shape[2]] += found

    def finish(self) -> None:
        """Add what was summed along diagonals."""
        for reading, along in zip(self._read, self._along, strict=True):
            if along is not None:
                expr, places = part_of(self._expr, reading.indices)
                indices = [x.to(torch.int64) for x in self._pairs.of_diagonals(expr, places)]
                self._sums.add(reading.slot, indices, along)


def along_diagonals(terms: Tensor) -> Tensor:
    """Sums over a tile's pairs of one kv - q, its rows being from the last to the first.

    A step from row to row that is one shorter than a row makes columns of diagonals:

        a b c      a b c 0 0      a b c 0 .
        d e f  ->  d e f 0 0  ->  0 d e f .      whose sums are a, b + d, c + e + g, f + h, i
        g h i      g h i 0 0      0 0 g h i

    Args:
        terms: (heads, rows, columns).

    Returns:
        (heads, 1, rows + columns - 1).
    """
    heads, rows, columns = terms.shape
    width = rows + columns - 1
    padded = pad(terms, (0, rows - 1))
    return padded.as_strided((heads, rows, width), (rows * width, width - 1, 1)).sum(1, keepdim=True)
