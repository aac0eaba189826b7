r"""Tiles of a mask -> numbers, the same only for tiles with the same pairs: each kind of tile is evaluated once.

(q - kv) % 4 == 0 or doc[q] == doc[kv]

    q - kv             the rows of a line, the columns of a tile, and how far they are apart: the pairs of a tile
                       don't change if all rows and columns move by as much
    doc[q] == doc[kv]  likewise of what is looked up; where documents differ in a whole tile, not even how far

An expression is cut where rows and columns meet first. What these parts are in a tile decides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.problem import LARGEST_SUM, Problem
from maskflash.analysis.runs import IntArray
from maskflash.expr.evaluate import compute
from maskflash.expr.nodes import Expr
from maskflash.expr.ops import COMPARISONS

_ROWS, _COLUMNS, _BOTH = 1, 2, 3
_READS: Final = {"b": _ROWS, "h": _ROWS, "q": _ROWS, "kv": _COLUMNS}  # b and h are known of a row


class _Side:
    """What a part of the mask is along rows, or along columns, by lines: (batch * heads * lines, tokens of a line)."""

    def __init__(self, problem: Problem, root: int, axis: int) -> None:
        found, faults = compute(problem.expr.part(root), problem.inputs, problem.along(axis))
        batch, heads, *lines = problem.shape
        length, size = (problem.q_len, problem.kv_len)[axis], problem.block_size[axis]
        self.whole = found.dtype == torch.int64
        found = found.to(torch.float64).view(torch.int64) if found.is_floating_point() else found.to(torch.int64)
        at = torch.arange(lines[axis] * size).clamp(max=length - 1)
        parts = [x.expand(batch, heads, length)[..., at].reshape(-1, size) for x in (found, *faults)]
        if any(bool(fault.any()) for fault in faults):  # where it has no value is a part of what it is
            self.whole, parts[0] = False, torch.cat(parts, 1)
        self.values: IntArray = parts[0].numpy()

    @property
    def is_small(self) -> bool:
        """Whether differences are those of numbers without an end."""
        return self.whole and bool((np.abs(self.values.astype(np.float64)) < LARGEST_SUM / 2).all())

    def moved(self) -> tuple[IntArray, IntArray]:
        """The first value of each line, and what all are from there."""
        return self.values[:, 0], self.values - self.values[:, :1]


def find_alike(problem: Problem, tiles: Tensor) -> IntArray:
    """Number tiles so that those of a number have the same pairs.

    Args:
        problem: on the CPU.
        tiles: (n, 4) int64, b, h, line and column of each.

    Returns:
        (n,) int64, from 0 without a gap. Where a tile reaches a part without a value, all of its number do.
    """
    lines, columns = problem.shape[2:]
    b, h, i, j = tiles.numpy().T
    at = (b * problem.shape[1] + h) * lines + i, (b * problem.shape[1] + h) * columns + j
    beyond = [int(x % size > 0) for x, size in zip((problem.q_len, problem.kv_len), problem.block_size, strict=True)]
    found = _numbered(2 * beyond[0] * (i == lines - 1) + beyond[1] * (j == columns - 1))
    sides: dict[int, _Side] = {}
    reads = _reads(problem.expr)
    for parts, compares in _meetings(problem.expr, reads):
        for part in parts:
            if part not in sides:
                sides[part] = _Side(problem, part, int(reads[part] == _COLUMNS))
        where = [at[int(reads[part] == _COLUMNS)] for part in parts]
        here = [sides[part] for part in parts]
        if len(parts) == 2 and all(side.is_small for side in here):
            kinds = [_apart(here, where, compares=compares)]
        else:
            kinds = [_numbered_lines(side.values)[place] for side, place in zip(here, where, strict=True)]
        for kind in kinds:
            found = _numbered(found * (kind.max(initial=0) + 1) + kind)
    return found


def _reads(expr: Expr) -> list[int]:
    """Of each node whether it differs along rows, along columns, or both."""
    found: list[int] = []
    for node in expr.nodes:
        own = _READS.get(node.op, 0)
        for arg in node.args:
            own |= found[arg]
        found.append(own)
    return found


def _meetings(expr: Expr, reads: list[int]) -> Iterator[tuple[tuple[int, ...], bool]]:
    """The parts of an expression that read rows or columns alone, and whether those of a pair are only compared.

    A pair is what a difference or a comparison of two integers is of: it doesn't change where both grow by as much.
    """
    known, stack = {len(expr.nodes) - 1}, [len(expr.nodes) - 1]
    while stack:
        place = stack.pop()
        node = expr.nodes[place]
        if reads[place] != _BOTH:
            if reads[place]:
                yield (place,), False
            continue
        if sorted(reads[arg] for arg in node.args) == [_ROWS, _COLUMNS] and node.op in (*COMPARISONS, "sub"):
            yield node.args, node.op != "sub"
            continue
        fresh = set(node.args) - known
        known |= fresh
        stack += sorted(fresh)


def _apart(sides: list[_Side], where: list[IntArray], *, compares: bool) -> IntArray:
    """Kinds of tiles by what two sides are from their first values, and how far these are apart."""
    ((first, steps), (second, others)), (at, to) = (side.moved() for side in sides), where
    apart = second[to] - first[at]
    kind = _numbered_lines(steps)[at]
    kind = kind * len(others) + _numbered_lines(others)[to]
    if compares:  # where one side is larger in a whole tile, nothing else counts
        above = (steps.min(1)[at] - others.max(1)[to]) > apart
        below = (steps.max(1)[at] - others.min(1)[to]) < apart
        kind = np.where(above | below, -1, kind)
        apart = np.where(above | below, above, apart)
    distance = _numbered(apart)
    return _numbered((kind + 1) * (distance.max(initial=0) + 1) + distance)


def _numbered(values: IntArray) -> IntArray:
    found: IntArray = np.unique(values, return_inverse=True)[1].reshape(-1)
    return found


def _numbered_lines(values: Any) -> IntArray:
    """Equal lines have equal numbers."""
    whole = np.ascontiguousarray(values).view(np.dtype((np.void, values.itemsize * values.shape[1])))
    found: IntArray = np.unique(whole.reshape(-1), return_inverse=True)[1].reshape(-1)
    return found
