"""An expression of pairs of one sequence -> the same of pairs of packed tokens, which look up where they stand.

    token        0  1  2  3  4  5  6  7        two sequences, of three tokens and of five
    sequence     0  0  0  1  1  1  1  1        b
    place        0  1  2  0  1  2  3  4        q, or kv: inside the sequence
    along        0  1  2  3  4  5  6  7        its place, and where its sequence begins along all: it ascends

Analysis is quick where rows' values ascend from the first token to the last, and places begin anew with each sequence.
Where q and kv are of one sequence, q - kv is the difference of what they are along all, and so `q >= kv` is. What
compares kv with something of the row compares what it is along all with that and the sequence's beginning. What is
compared is capped first, beyond all places, so that no sum wraps that didn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch

from maskflash.expr.nodes import Builder, Expr, Node, operand_dtype
from maskflash.expr.ops import COMPARISONS

Side = Literal["q", "kv"]

TABLES: Final = ("seq_q", "place_q", "along_q", "seq_kv", "place_kv", "along_kv")
"""What tokens look up, int64 (tokens,), those of queries and those of keys: numbered in this order."""

_FARTHEST: Final = {"kv": 2**32, "q": 2**61}  # beyond all places, of which queries' have offsets
_SUMS: Final = ("add", "sub", "neg")


def of_tokens(expr: Expr, first: int, *, alone: bool) -> Expr:
    """The value of a function of (b, h, q, kv) at packed tokens q and kv, which are of one sequence.

    Args:
        expr: the function.
        first: the slot of the first of `TABLES`; the others follow.
        alone: the value is only asked for where both are of one sequence, which is part of it then: "and".
    """
    builder = _Tokens(expr, first, alone)
    root = builder.root()
    if alone:
        same = builder.add("eq", builder.of("seq", "q"), builder.of("seq", "kv"))
        root = builder.add("and", same, root, dtype=torch.bool, weak=False)
    return builder.finish(root)


class _Tokens(Builder):
    """Grows the expression, of each node for either side: which token's sequence b is; and plain, or along all."""

    def __init__(self, expr: Expr, first: int, alone: bool) -> None:
        super().__init__()
        self._expr = expr
        self._first = first
        self._alone = alone
        self._reads: list[frozenset[str]] = []
        self._sums: list[tuple[int, int]] = []  # how often q and kv are added
        self._places: dict[tuple[Side, bool], list[int]] = {
            (side, along): [] for side in ("q", "kv") for along in (False, True)
        }

    def of(self, what: str, side: Side) -> int:
        """What a token of a side looks up."""
        slot = self._first + TABLES.index(f"{what}_{side}")
        return self.add("lookup", self.add(side, dtype=torch.int64), dtype=torch.int64, value=slot)

    def root(self) -> int:
        """The position of the whole."""
        for position, node in enumerate(self._expr.nodes):
            reads = frozenset({node.op} & {"q", "kv"}).union(*(self._reads[arg] for arg in node.args))
            self._reads.append(reads)
            self._sums.append(self._summed(node))
            for (side, along), places in self._places.items():
                places.append(self._version(position, node, side, along))
        return self._places["q", False][-1]

    def _summed(self, node: Node) -> tuple[int, int]:
        if node.op in ("q", "kv"):
            return int(node.op == "q"), int(node.op == "kv")
        if not _is_sum(node):
            return 0, 0
        (q, kv), *others = (self._sums[arg] for arg in node.args)
        if node.op == "neg":
            return -q, -kv
        sign = 1 if node.op == "add" else -1
        return q + sign * others[0][0], kv + sign * others[0][1]

    def _version(self, position: int, node: Node, side: Side, along: bool) -> int:
        """A node, of which what reads neither q nor kv is of a side, plain or along all."""
        if node.op == "b":
            return self.of("seq", side)
        if node.op in ("q", "kv"):
            return self.of("along" if along else "place", "q" if node.op == "q" else "kv")
        is_sum = _is_sum(node)
        if not (is_sum and along):
            along = False
            if len(self._reads[position]) == 1:
                side = "q" if "q" in self._reads[position] else "kv"
        q, kv = self._sums[position]
        if is_sum and q == -kv != 0:
            along = True
        if node.op in COMPARISONS and (found := self._compared(position, node)) is not None:
            return found
        return self._copied(position, node, [self._places[side, along][arg] for arg in node.args])

    def _compared(self, position: int, node: Node) -> int | None:
        """A comparison of q with kv, or of one of them with what doesn't read it; None of anything else."""
        operands = [self._expr.nodes[arg] for arg in node.args]
        ops = {operand.op for operand in operands}
        if operand_dtype(node, operands) != torch.int64:
            return None
        if ops == {"q", "kv"}:
            return self._copied(position, node, [self._places["q", True][arg] for arg in node.args])
        if not self._alone:
            return None
        for here, there in ((0, 1), (1, 0)):
            reads = self._reads[node.args[there]]
            if operands[here].op == "kv" and "kv" not in reads:
                side: Side = "q"  # of the row is also what reads neither
            elif operands[here].op == "q" and reads == {"kv"}:
                side = "kv"
            else:
                continue
            args = [self._places["q", True][node.args[here]]] * 2
            args[there] = self._shifted(self._places[side, False][node.args[there]], side)
            return self._copied(position, node, args)
        return None

    def _shifted(self, place: int, side: Side) -> int:
        """A number of a side's token, capped, and where its sequence begins along all."""
        most = _FARTHEST["kv" if side == "q" else "q"]
        place = self.add("cast", place, dtype=torch.int64, weak=False)
        place = self.add("max", self.add("min", place, self.const(most)), self.const(-most))
        return self.add("add", place, self.add("sub", self.of("along", side), self.of("place", side)))

    def _copied(self, position: int, node: Node, args: Sequence[int]) -> int:
        source = self._expr.source(position)
        return self.add(node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=source)


def _is_sum(node: Node) -> bool:
    return node.op in _SUMS and node.dtype == torch.int64
