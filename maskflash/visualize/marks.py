"""A mask -> what is marked in its picture: documents, and FlashMask's vectors, each as runs over rows or columns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import IntArray
from maskflash.masks.columns import ColumnIntervals

_NONE: Final = -1  # the document of tokens outside a table
_LARGEST: Final = 2**31 - 1


class Steps(NamedTuple):
    """Numbers over tokens, as stretches along which they stay or grow by `slope` from token to token: all (n,)."""

    start: IntArray
    value: IntArray
    slope: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """The documents that a mask compares.

    Attributes:
        name: what the user calls their table, or tables.
        shape: batch rows and heads that have documents of their own; 1 serves all.
        rows: the document of each query, for each of them; negative where there is none.
        columns: likewise of each key.
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[Steps, ...]
    columns: tuple[Steps, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """FlashMask's vectors.

    Attributes:
        shape: batch rows and heads that have vectors of their own.
        named: by name, one for each of them.
    """

    shape: tuple[int, int]
    named: dict[str, tuple[Steps, ...]]


def find_documents(problem: Problem) -> list[Documents]:
    """What the mask compares by == or != of one look-up by q and one by kv, such as `doc[b, q] == doc[b, kv]`.

    Numbers beyond 32 bits are replaced by their rank. Negative ones are taken for padding, as is what lies outside a
    table.
    """
    found = {}
    for node in problem.expr.nodes:
        if node.op in ("eq", "ne"):
            sides = [_looked_up(problem, arg) for arg in node.args]
            by_axis = {side.axis: side for side in sides if side is not None}
            if by_axis.keys() == {"q", "kv"}:
                rows, columns = by_axis["q"], by_axis["kv"]
                found[rows.slot, columns.slot] = _documents(problem, rows, columns)
    return list(found.values())


def find_vectors(columns: ColumnIntervals, q_len: int) -> Vectors:
    """The vectors of column intervals; rows beyond the last are clipped."""
    batch, heads, _ = columns.lts.shape
    named = {
        name: tuple(_steps(row.cpu().numpy().clip(0, q_len).astype(np.int64)) for row in vector.flatten(0, 1))
        for name, vector in columns.vectors().items()
    }
    return Vectors((batch, heads), named)


class _LookUp(NamedTuple):
    """A table that is looked up by q or kv, and by b and h at most.

    Attributes:
        axis: "q" or "kv".
        slot: of the table.
        own: whether it is looked up by b, and by h.
        table: (B, H, n), with 1 where it isn't looked up by b or h.
    """

    axis: str
    slot: int
    own: tuple[bool, bool]
    table: NDArray[Any]


def _looked_up(problem: Problem, position: int) -> _LookUp | None:
    """The look-up that a node is, casts aside."""
    nodes = problem.expr.nodes
    while nodes[position].op == "cast":
        position = nodes[position].args[0]
    node = nodes[position]
    axes = [nodes[arg].op for arg in node.args]
    token = [axis for axis in axes if axis in ("q", "kv")]
    if node.op != "lookup" or len(token) != 1 or not {*axes} <= {"b", "h", *token} or len({*axes}) < len(axes):
        return None
    slot = int(node.value or 0)
    table = problem.inputs.tables[slot]
    if table.dtype.is_floating_point or table.dtype == torch.bool:
        return None
    order = ("b", "h", *token)
    table = table.permute([axes.index(axis) for axis in order if axis in axes])
    for place, axis in enumerate(order):
        table = table if axis in axes else table.unsqueeze(place)
    return _LookUp(token[0], slot, ("b" in axes, "h" in axes), table.cpu().numpy())


def _documents(problem: Problem, rows: _LookUp, columns: _LookUp) -> Documents:
    batch, heads = (
        whole if rows.own[place] or columns.own[place] else 1 for place, whole in enumerate(problem.shape[:2])
    )
    units = list(itertools.product(range(batch), range(heads)))
    sides = [[_numbers(problem, looked_up, *unit) for unit in units] for looked_up in (rows, columns)]
    if any(abs(line).max(initial=0) > _LARGEST for line in itertools.chain(*sides)):
        known = np.unique(np.concatenate(list(itertools.chain(*sides))))
        sides = [[np.where(line == _NONE, _NONE, known.searchsorted(line)) for line in side] for side in sides]
    names = dict.fromkeys(problem.names[looked_up.slot] for looked_up in (rows, columns))
    by_row, by_column = (tuple(_steps(line, level=True) for line in side) for side in sides)
    return Documents(" = ".join(names), (batch, heads), by_row, by_column)


def _numbers(problem: Problem, looked_up: _LookUp, b: int, h: int) -> IntArray:
    """The document of each row, or column, of a batch row and head."""
    row = looked_up.axis == "q"
    line = np.full(problem.q_len if row else problem.kv_len, _NONE, dtype=np.int64)
    zero = torch.tensor(0)
    first = int(problem.indices(torch.tensor(b), zero, zero, zero)[looked_up.axis])
    place = tuple(at if own else 0 for at, own in zip((b, h), looked_up.own, strict=True))
    if place[0] < looked_up.table.shape[0] and place[1] < looked_up.table.shape[1]:
        own = looked_up.table[place]
        start, stop = max(0, -first), max(0, -first, min(len(line), len(own) - first))
        line[start:stop] = own[start + first : stop + first]
    return line


def _steps(values: IntArray, *, level: bool = False) -> Steps:
    """Numbers (n,) as stretches that stay or, unless they are to be level, grow by 1."""
    step = np.diff(values)
    grows = (step == 1) & (not level)
    goes_on = (step == 0) | grows
    # A stretch ends where numbers jump, or go on otherwise than they did.
    breaks = ~goes_on
    breaks[1:] |= goes_on[:-1] & (step[1:] != step[:-1])
    start = np.concatenate(([0], np.flatnonzero(breaks) + 1))[: len(values)]
    slope = np.zeros(len(start), dtype=np.int64)
    inner = np.flatnonzero(start + 1 < np.append(start[1:], len(values)))
    slope[inner] = step[start[inner]]
    return Steps(start, values[start], slope)
