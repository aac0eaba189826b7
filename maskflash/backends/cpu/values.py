"""A score's program and a call's pairs -> its values tile by tile, in memory that is used again.

What is the same for all pairs of a job is computed once, what depends on kv - q once per diagonal. The rest is computed
node by node, where it can into the memory of an operand that nobody needs any more:

    score / cap    into the score's memory
    tanh           into the same
    cap *          into the same
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.backends.cpu.programs import Pairs, Program, look_up, part_of
from maskflash.expr.evaluate import compute_node, compute_several
from maskflash.expr.nodes import Node
from maskflash.expr.ops import OPERATIONS

_INTO: Final = frozenset(
    (
        *("add", "sub", "mul", "truediv", "neg", "abs", "min", "max", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log"),
        *("log2", "log1p", "tanh", "sigmoid", "erf", "sin", "cos", "tan", "atan", "pow", "floor", "ceil", "round"),
    )
)
"""Operations that torch can compute into given memory."""


class Values:
    """A program on the pairs of a call, tile by tile.

    Args:
        pairs: the pairs.
        program: what is computed.
    """

    def __init__(self, pairs: Pairs, program: Program) -> None:
        self.pairs: Pairs = pairs
        self._program = program
        nodes, tables = program.expr.nodes, len(pairs.inputs.tables)
        self._diagonals: list[Tensor] = []
        if program.diagonal is not None:
            found = pairs.of_diagonals(program.diagonal, program.diagonals)
            self._diagonals = [x.expand(-1, -1, pairs.diagonals).contiguous() for x in found]
        moves: list[bool] = []
        for node in nodes:
            diagonal = node.op == "lookup" and node.slot >= tables
            moves.append(node.op in ("q", "kv", "score") or diagonal or any(moves[arg] for arg in node.args))
        self._steps = [position for position, moving in enumerate(moves) if moving]
        fixed = [position for position, moving in enumerate(moves) if not moving]
        self._fixed: list[Tensor | None] = [None] * len(nodes)
        if fixed:
            expr, places = part_of(program.expr, fixed)
            nowhere = torch.zeros(1, dtype=torch.int64)
            known_, _ = compute_several(expr, pairs.inputs, pairs.indices(nowhere, nowhere), places, look_up)
            for position, value in zip(fixed, known_, strict=True):
                self._fixed[position] = value
        # What an operation computes with, of its dtype already where it is fixed.
        self._operands: dict[int, list[tuple[int, Tensor | None]]] = {}
        for position in self._steps:
            node = nodes[position]
            if node.op in _INTO:
                known = [self._fixed[arg] for arg in node.args]
                ready = [None if x is None else x.to(node.dtype) for x in known]
                self._operands[position] = list(zip(node.args, ready, strict=True))
        self._spare: list[Tensor] = []
        self._lent: list[Tensor] = []

    def of(self, rows: slice, columns: slice, score: Tensor) -> list[Tensor]:
        """The program's roots on a tile, in shapes that broadcast to it, rows from the last to the first.

        They hold until the next tile.

        Args:
            rows: of the call.
            columns: of the call.
            score: (heads, rows, columns), rows from the last to the first; its memory may be used for others.
        """
        nodes, roots = self._program.expr.nodes, self._program.roots
        last_use = self._program.expr.last_use
        self._spare = [x for x in (*self._spare, *self._lent) if x.data_ptr() != score.data_ptr()]
        self._lent = []
        values = list(self._fixed)
        own: dict[int, Tensor] = {}  # values whose memory may be used again
        for position in self._steps:
            node = nodes[position]
            if node.op in _INTO and node.dtype == score.dtype:
                values[position] = self._into(position, values, own, score.shape)
            else:
                values[position] = self._value(node, values, rows, columns, score)
            if node.op == "score" and node.dtype == score.dtype:
                own[position] = score.view(-1)
            for arg in node.args:
                if node.op == "cast" and arg in own:  # perhaps the same memory
                    self._lent.append(own.pop(arg))
                elif last_use[arg] == position and arg in own and arg not in roots:
                    self._spare.append(own.pop(arg))
        self._lent += own.values()
        return [x for x in (values[root] for root in roots) if x is not None]

    def _into(self, position: int, values: list[Tensor | None], own: dict[int, Tensor], shape: torch.Size) -> Tensor:
        """The value of an operation, in memory that is there if it is as large as a tile."""
        expr = self._program.expr
        node = expr.nodes[position]
        operands: list[Tensor] = []
        for arg, ready in self._operands[position]:
            x = values[arg] if ready is None else ready
            assert x is not None, "operands come first"
            operands.append(x if x.dtype == node.dtype else x.to(node.dtype))
        compute: Callable[..., Tensor] | None = OPERATIONS[node.op].compute
        assert compute is not None, "all of them are torch's functions"
        if all(x.shape != shape for x in operands):
            return compute(*operands)
        for arg in node.args:
            if arg in own and expr.last_use[arg] == position and arg not in self._program.roots:
                memory = own.pop(arg)
                break
        else:
            memory = self._spare.pop() if self._spare else torch.empty(0, dtype=node.dtype)
            if memory.numel() < shape.numel():
                memory = torch.empty(shape.numel(), dtype=node.dtype)
        own[position] = memory
        return compute(*operands, out=memory[: shape.numel()].view(shape))

    def _value(self, node: Node, values: list[Tensor | None], rows: slice, columns: slice, score: Tensor) -> Tensor:
        pairs = self.pairs
        if node.op == "score":
            return score.to(node.dtype)
        if node.op == "q":
            return pairs.rows[rows].flip(0)[None, :, None]
        if node.op == "kv":
            return pairs.columns[columns][None, None]
        tables = len(pairs.inputs.tables)
        if node.op == "lookup" and node.slot >= tables:
            along, (_, height, width) = self._diagonals[node.slot - tables], score.shape
            first = int(along.storage_offset()) + pairs.first_diagonal(rows, columns)
            return along.as_strided((along.shape[0], height, width), (along.shape[2], 1, 1), first)
        return compute_node(node, self._program.expr, values, pairs.inputs, _NO_PAIRS, look_up)[0]


_NO_PAIRS: Final[dict[str, Any]] = {}
