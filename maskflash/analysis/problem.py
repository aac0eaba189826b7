"""A mask expression, the values of its slots and the lengths of a call: the question that analysis answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from maskflash.expr.bounds import bounds, largest
from maskflash.expr.evaluate import Inputs, evaluate
from maskflash.expr.intervals import Interval
from maskflash.expr.nodes import Expr
from maskflash.ground import transfer

TILE: Final = (128, 128)  # (bq, bkv) in tokens, where nobody asks for another
LARGEST_SUM: Final = 2.0**62  # where all its integers stay below it, a mask's comparisons may be rearranged
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What is to be classified.

    Attributes:
        expr: the mask.
        inputs: values of its params and tables, these on `device`.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        batch: batch rows; the map has one where neither the mask nor the offset looks at them.
        heads: query heads; likewise.
        block_size: (bq, bkv) in tokens.
        q_offset: added to row numbers, an int or an integer tensor (batch,).
        device: where they are, and where a map of it is wanted.
        names: what the user calls each table, for people.
        kv_offset: added to column numbers, an int or an integer tensor (batch,).
    """

    expr: Expr
    inputs: Inputs
    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1
    block_size: tuple[int, int] = TILE
    q_offset: int | Tensor = 0
    device: torch.device = _CPU
    names: tuple[str, ...] = ()
    kv_offset: int | Tensor = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, nQ, nKV) of the map."""
        per_row = isinstance(self.q_offset, Tensor)
        return (
            self.batch if per_row or "b" in self.expr.reads else 1,
            self.heads if "h" in self.expr.reads else 1,
            math.ceil(self.q_len / self.block_size[0]),
            math.ceil(self.kv_len / self.block_size[1]),
        )

    def on_host(self) -> Problem:
        """The same on the CPU, where it is analysed: one copy of what is elsewhere, which the host waits for."""
        if self.device == _CPU:
            return self
        offsets = [self.q_offset] if isinstance(self.q_offset, Tensor) else []
        tensors = transfer.to_host([*self.inputs.tables, *offsets])
        offset = tensors.pop() if offsets else self.q_offset
        return replace(self, inputs=Inputs(self.inputs.params, tuple(tensors)), q_offset=offset, device=_CPU)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Whether pairs are visible: int64 indices that broadcast, q counted from the call's first row -> bool."""
        return evaluate(self.expr, self.inputs, {"b": b, "h": h, "q": q + self.offset_of(b), "kv": kv})

    def largest(self, expr: Expr | None = None) -> float:
        """A cap on the 64-bit integers of the mask, or of what is made of it, over all pairs, before any wrapping."""
        expr = self.expr if expr is None else expr
        offset = self.q_offset
        low, high = torch.stack(torch.aminmax(offset)).tolist() if isinstance(offset, Tensor) else (offset, offset)
        ends = {name: (0, size - 1) for name, size in (("b", self.batch), ("h", self.heads), ("kv", self.kv_len))}
        ends["q"] = low, high + self.q_len - 1
        found = largest(expr, self.inputs, ends)
        if found is not None:
            return found
        boxes = {name: Interval(*torch.tensor(pair, device=self.device)) for name, pair in ends.items()}
        return bounds(expr, self.inputs, boxes).largest

    def turned(self) -> Problem | None:
        """The problem with the roles of rows and columns swapped; None where rows have an offset."""
        if isinstance(self.q_offset, Tensor) or self.q_offset:
            return None
        rows, columns = self.block_size
        expr = _turned(self.expr)
        return replace(self, expr=expr, q_len=self.kv_len, kv_len=self.q_len, block_size=(columns, rows))

    def offset_of(self, b: Tensor) -> int | Tensor:
        """The offset of each batch row in b."""
        return self.q_offset[b] if isinstance(self.q_offset, Tensor) else self.q_offset


@lru_cache(maxsize=256)
def _turned(expr: Expr) -> Expr:
    """The expression of q and kv swapped."""
    other = {"q": "kv", "kv": "q"}
    return Expr(tuple(replace(node, op=other.get(node.op, node.op)) for node in expr.nodes), expr.sources)
