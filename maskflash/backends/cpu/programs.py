"""A score's program -> its values tile by tile; what depends on kv - q alone is computed once per diagonal.

    kv - q of a tile            its diagonals                    the same as a view, rows from the last to the first
     5  6  7  8                                                   3  4  5  6
     4  5  6  7                 3  4  5  6  7  8                  4  5  6  7      strides (1, 1)
     3  4  5  6                                                   5  6  7  8

So a relative bias costs an addition per pair, whatever its buckets are. Tiles have their rows in that order throughout.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import add
from typing import Final

import torch
from torch import Tensor

from maskflash.expr.evaluate import Inputs, compute_several
from maskflash.expr.nodes import Builder, Expr, Node, Scalar
from maskflash.expr.ops import INDEX_VARIABLES
from maskflash.scores.strength import BoundScore

MOST_BOUNDED: Final = 1e30  # of all that hidden pairs compute: float32 holds that plus -inf, and what slopes make of it
_INTEGER: Final = 2.0**64  # no integer's absolute value is more
_WAVING: Final = frozenset(("tanh", "sigmoid", "erf", "sin", "cos", "atan"))
_ROUNDING: Final = frozenset(("cast", "neg", "abs", "floor", "ceil", "trunc", "round"))
_CONTINUOUS: Final = frozenset(
    ("add", "sub", "mul", "neg", "abs", "min", "max", "tanh", "sigmoid", "erf", "atan", "sin", "cos")
)
_MOST_PEELED: Final = 2.0**20  # a factor, or its inverse


@dataclass(frozen=True, slots=True)
class Program:
    """Several roots of an expression, in two parts.

    Attributes:
        diagonal: what depends on pairs by kv - q alone, and is used elsewhere; None for nothing.
        diagonals: its roots.
        expr: the rest. It reads the roots of `diagonal` as tables without an index, numbered after its own.
        roots: its roots, those that were asked for.
    """

    diagonal: Expr | None
    diagonals: tuple[int, ...]
    expr: Expr
    roots: tuple[int, ...]


@lru_cache(maxsize=256)
def program_of(expr: Expr, roots: tuple[int, ...], tables: int, *, by_diagonals: bool) -> Program:
    """Some roots of an expression, ready to be computed.

    Args:
        expr: a score's program, with or without its derivatives.
        roots: positions.
        tables: how many it has.
        by_diagonals: whether tiles are of neighbouring rows and columns, so that they have diagonals.
    """
    nodes = expr.nodes
    of_diagonals = diagonal_nodes(expr) if by_diagonals else frozenset()
    needed = _needed(expr, roots, of_diagonals)
    hoisted = sorted(needed & of_diagonals)
    read = {
        position: Node("lookup", (), nodes[position].dtype, nodes[position].weak, tables + number)
        for number, position in enumerate(hoisted)
    }
    rest, places = part_of(expr, roots, read)
    diagonal, diagonals = part_of(expr, hoisted) if hoisted else (None, ())
    return Program(diagonal, diagonals, rest, places)


@lru_cache(maxsize=256)
def diagonal_nodes(expr: Expr) -> frozenset[int]:
    """The nodes whose values differ between pairs of one b and h by kv - q alone, and do differ."""
    reads: list[str] = []  # "", "q", "kv", "diagonal" or "pair"
    moves: list[str] = []  # "q" or "kv" where it is that plus what is the same for all pairs, else ""
    for node in expr.nodes:
        args = [reads[arg] for arg in node.args]
        moving = [moves[arg] for arg in node.args]
        move = ""
        if node.op in ("q", "kv"):
            read = move = node.op
        elif node.op == "score":
            read = "pair"
        elif node.op == "sub" and set(moving) == {"q", "kv"} and not node.dtype.is_floating_point:
            read = "diagonal"
        else:
            different = set(args) - {""}
            read = different.pop() if len(different) == 1 else "pair" if different else ""
            if node.op in ("add", "sub") and not node.dtype.is_floating_point and args[-1] == "":
                move = moving[0]
            elif node.op == "add" and not node.dtype.is_floating_point and args[0] == "":
                move = moving[1]
        reads.append(read)
        moves.append(move)
    return frozenset(position for position, read in enumerate(reads) if read == "diagonal")


def part_of(expr: Expr, roots: Sequence[int], read: Mapping[int, Node] | None = None) -> tuple[Expr, tuple[int, ...]]:
    """The part of an expression that these roots need, and where they are in it; some nodes may be read instead."""
    read = read or {}
    builder, places = Builder(), dict[int, int]()
    for position in sorted(_needed(expr, roots, read)):
        node = read.get(position, expr.nodes[position])
        args = () if position in read else tuple(places[arg] for arg in node.args)
        places[position] = builder.add(node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value)
    return Expr(tuple(builder.nodes)), tuple(places[root] for root in roots)


def _needed(expr: Expr, roots: Sequence[int], ends: Container[int]) -> set[int]:
    """What roots are computed from, not looking below some nodes."""
    needed, stack = set[int](), list(roots)
    while stack:
        position = stack.pop()
        if position not in needed:
            needed.add(position)
            stack += () if position in ends else expr.nodes[position].args
    return needed


@lru_cache(maxsize=256)
def peeled(expr: Expr, params: tuple[Scalar, ...]) -> tuple[Expr, float]:
    """A program whose score is first scaled by numbers, without that; and the factor, which goes into q.

    That rounds otherwise than scaling the product does, so nothing is peeled off a program in which a rounding unit
    makes a step: floor, comparisons, a division by the score. The factor is within 2^±20.
    """
    factor = 1.0
    if not _is_continuous(expr):
        return expr, factor
    while True:
        places = [n for n, node in enumerate(expr.nodes) if node.op == "score"]
        users = [n for n, node in enumerate(expr.nodes) if places and places[0] in node.args]
        if len(places) != 1 or len(users) != 1:
            return expr, factor
        (place,), (user,) = places, users
        node, score = expr.nodes[user], expr.nodes[place]
        others = [expr.nodes[arg] for arg in node.args if arg != place]
        divides = node.op == "truediv" and node.args[0] == place
        if not (divides or node.op == "mul") or node.dtype != score.dtype or len(others) != 1:
            return expr, factor
        number = float(others[0].number(params)) if others[0].op in ("const", "param") else 0.0
        found = 0.0 if number == 0.0 else factor / number if divides else factor * number
        if not 1 / _MOST_PEELED <= abs(found) <= _MOST_PEELED:
            return expr, factor
        factor = found
        expr, _ = part_of(expr, (len(expr.nodes) - 1,), {user: score})


def _is_continuous(expr: Expr) -> bool:
    """Whether everything that reads the score changes little where the score does."""
    reads: list[bool] = []
    for node in expr.nodes:
        of = [reads[arg] for arg in node.args]
        reads.append(node.op == "score" or any(of))
        jumps = any(of) and node.op not in _CONTINUOUS
        if node.op == "truediv":
            jumps = of[1]
        elif node.op == "select":
            jumps = of[0]
        if jumps:
            return False
    return True


def is_bounded(expr: Expr, inputs: Inputs, place: float, score: float = 0.0) -> bool:
    """Whether all that hidden pairs compute is finite, so that adding -inf hides them: a cap on each node says so.

    Args:
        expr: a program, with derivatives where these are needed.
        inputs: the values of its slots.
        place: a cap on the absolute value of b, h, q and kv.
        score: a cap on the absolute value of any pair's product.
    """
    caps: list[float] = []
    for node in expr.nodes:
        if node.op in INDEX_VARIABLES:
            cap = place
        elif node.op == "score":
            cap = score
        elif node.op == "lookup":
            table = inputs.tables[node.slot]
            cap = _largest(table) if table.is_floating_point() else _INTEGER
        elif node.op in ("const", "param"):
            cap = abs(float(node.number(inputs.params)))
        else:
            cap = _cap(node, expr, inputs, [caps[arg] for arg in node.args])
        if not node.dtype.is_floating_point:  # shorter ones wrap before
            cap = min(cap, _INTEGER) if node.dtype == torch.int64 else max(min(cap, _INTEGER), 2.0**32)
        elif node.dtype.itemsize == 2:  # infinite beyond
            cap = cap if cap < torch.finfo(node.dtype).max else torch.inf
        if not cap < MOST_BOUNDED:  # nor NaN
            return False
        caps.append(cap)
    return True


def farthest(score: BoundScore, q: Tensor, k: Tensor) -> float:
    """A cap on the absolute value of b, h, q and kv of a call with q (B, Hq, Sq, D) and k (B, Hkv, Skv, D)."""
    given = score.q_offset, score.kv_offset
    offsets = (int(x.long().abs().max()) if isinstance(x, Tensor) else abs(x) for x in given)
    return float(max(q.shape[0], q.shape[1], *map(add, offsets, (q.shape[2], k.shape[2]))))


def _cap(node: Node, expr: Expr, inputs: Inputs, args: list[float]) -> float:
    """A cap on the absolute value of what is computed from others; inf where none is known."""
    if node.op in _WAVING:
        return 2.0
    if node.op in ("add", "sub"):
        return sum(args)
    if node.op == "mul":
        return args[0] * args[1]
    if node.op == "select":
        return max(args[1:])
    if node.op in ("min", "max"):
        return max(args)
    if node.op in _ROUNDING:
        return args[0] + 1
    if node.op == "truediv":
        by = expr.nodes[node.args[1]]
        number = abs(float(by.number(inputs.params))) if by.op in ("const", "param") else 0.0
        return args[0] / number if number > 1 / MOST_BOUNDED else torch.inf
    return torch.inf


def _largest(table: Tensor) -> float:
    """The largest absolute value in a table; NaN if there is one."""
    if not table.numel():
        return 0.0
    low, high = torch.aminmax(table)
    return max(abs(float(low)), abs(float(high)))


@dataclass(slots=True, eq=False)
class Pairs:
    """The pairs of some heads of one batch row, within the rows and columns of one call.

    Attributes:
        inputs: values of the program's slots.
        batch_row: b.
        heads: the query heads.
        rows: token numbers of the call's rows, with their offset.
        columns: likewise.
    """

    inputs: Inputs
    batch_row: int
    heads: range
    rows: Tensor
    columns: Tensor

    @property
    def lowest(self) -> int:
        """The least kv - q."""
        return int(self.columns[0]) - int(self.rows[-1])

    @property
    def diagonals(self) -> int:
        """How many there are."""
        return len(self.rows) + len(self.columns) - 1

    def first_diagonal(self, rows: slice, columns: slice) -> int:
        """Which one is that of a tile's last row and first column."""
        return len(self.rows) - int(rows.stop) + int(columns.start)

    def indices(self, q: Tensor, kv: Tensor) -> dict[str, Tensor]:
        """b, h, q and kv: (1, 1, 1), (heads, 1, 1), (1, rows, 1) and (1, 1, columns)."""
        h = torch.arange(self.heads.start, self.heads.stop)[:, None, None]
        return {"b": torch.full((1, 1, 1), self.batch_row), "h": h, "q": q[None, :, None], "kv": kv[None, None]}

    def of_diagonals(self, expr: Expr, roots: Sequence[int]) -> list[Tensor]:
        """What an expression is on each diagonal: (heads or 1, 1, diagonals or 1) each."""
        kv = torch.arange(self.lowest, self.lowest + self.diagonals)
        return compute_several(expr, self.inputs, self.indices(torch.zeros(1, dtype=torch.int64), kv), roots, look_up)[
            0
        ]


def look_up(table: Tensor, indices: list[Tensor]) -> tuple[Tensor, None]:
    """Reads a table without asking what the indices are: hidden pairs may have any, and read anything."""
    if not indices:
        return table, None
    if not table.numel():
        return table.new_zeros(()), None
    place, last = (
        linear(indices, table.shape, table.stride()),
        sum((size - 1) * stride for size, stride in zip(table.shape, table.stride(), strict=True)),
    )
    flat = table.as_strided((last + 1,), (1,), int(table.storage_offset()))
    return flat.index_select(0, place.reshape(-1)).view(place.shape), None


def linear(indices: Sequence[Tensor], shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Where elements lie in memory: indices into it, in bounds whatever they are; negative ones count from the end."""
    place: Tensor | None = None
    for index, size, stride in zip(indices, shape, strides, strict=True):
        inside = torch.where(index < 0, index + size, index).clamp_(0, size - 1) * stride
        place = inside if place is None else place + inside
    assert place is not None, "a table has dimensions"
    return place
