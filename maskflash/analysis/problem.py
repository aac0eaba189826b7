"""A mask expression, the values of its slots and the lengths of a call: the question that analysis answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import Runs
from maskflash.expr.bounds import Reach, bounds, largest
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
        kv_offset: added to column numbers, likewise.
        device: where they are, and where a map of it is wanted.
        names: what the user calls each table, for people.
    """

    expr: Expr
    inputs: Inputs
    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1
    block_size: tuple[int, int] = TILE
    q_offset: int | Tensor = 0
    kv_offset: int | Tensor = 0
    device: torch.device = _CPU
    names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, nQ, nKV) of the map."""
        per_row = bool(self.offsets)
        return (
            self.batch if per_row or "b" in self.expr.reads else 1,
            self.heads if "h" in self.expr.reads else 1,
            math.ceil(self.q_len / self.block_size[0]),
            math.ceil(self.kv_len / self.block_size[1]),
        )

    @property
    def offsets(self) -> list[Tensor]:
        """The offsets that differ from batch row to batch row."""
        return [offset for offset in (self.q_offset, self.kv_offset) if isinstance(offset, Tensor)]

    def on_host(self) -> Problem:
        """The same on the CPU, where it is analysed: one copy of what is elsewhere, which the host waits for."""
        if self.device == _CPU:
            return self
        count = len(self.inputs.tables)
        tensors = transfer.to_host([*self.inputs.tables, *self.offsets])
        arrived = iter(tensors[count:])
        q_offset, kv_offset = (
            next(arrived) if isinstance(offset, Tensor) else offset for offset in (self.q_offset, self.kv_offset)
        )
        inputs = Inputs(self.inputs.params, tuple(tensors[:count]))
        return replace(self, inputs=inputs, q_offset=q_offset, kv_offset=kv_offset, device=_CPU)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Whether pairs are visible: int64 indices that broadcast, counted from the call's first -> bool.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes. Whatever looks at
                pairs passes it on.
        """
        return evaluate(self.expr, self.inputs, self.indices(b, h, q, kv))

    def indices(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> dict[str, Tensor]:
        """Indices as the mask has them, with the offsets."""
        return {"b": b, "h": h, "q": _moved(q, self.q_offset, b), "kv": _moved(kv, self.kv_offset, b)}

    def along(self, axis: int) -> dict[str, Tensor]:
        """Indices of all rows (axis 0) or columns (axis 1), for what reads no others; they broadcast to (B, H, n)."""
        batch, heads = self.shape[:2]
        b, h = torch.arange(batch, device=self.device)[:, None, None], torch.arange(heads, device=self.device)[:, None]
        tokens = torch.arange((self.q_len, self.kv_len)[axis], device=self.device)
        nowhere = tokens.new_zeros(())
        return self.indices(b, h, *((tokens, nowhere) if axis == 0 else (nowhere, tokens)))

    def largest(self, expr: Expr | None = None) -> float:
        """A cap on the 64-bit integers of the mask, or of what is made of it, over all pairs, before any wrapping."""
        expr = self.expr if expr is None else expr
        found = largest(expr, self.inputs, self.extents)
        return bounds(expr, self.inputs, self.box()).largest if found is None else found

    def box(self) -> dict[str, Interval]:
        """The box of all pairs: the first and the last of each index, offsets included."""
        return {name: Interval(*torch.tensor(pair, device=self.device)) for name, pair in self.extents.items()}

    @property
    def extents(self) -> dict[str, Reach]:
        """For `b`, `h`, `q`, `kv` the first and the last index, offsets included."""
        ends = {name: (0, size - 1) for name, size in (("b", self.batch), ("h", self.heads))}
        ends["q"], ends["kv"] = _extent(self.q_offset, self.q_len), _extent(self.kv_offset, self.kv_len)
        return ends

    def block_map(self, rows: Runs, columns: Runs | None = None) -> BlockMap:
        """The map of runs along rows of tiles; those along columns follow from them, unless they are given."""
        columns = rows.transposed(*self.shape[2:]) if columns is None else columns
        return BlockMap(self.q_len, self.kv_len, self.block_size, self.shape, rows, columns)

    def turned(self) -> Problem:
        """The problem with the roles of rows and columns swapped."""
        return replace(
            self,
            expr=_turned(self.expr),
            q_len=self.kv_len,
            kv_len=self.q_len,
            block_size=self.block_size[::-1],
            q_offset=self.kv_offset,
            kv_offset=self.q_offset,
        )


def _moved(index: Tensor, offset: int | Tensor, b: Tensor) -> Tensor:
    """Rows or columns with the offset of their batch row."""
    if isinstance(offset, Tensor):
        return index + offset[b]
    return index + offset if offset else index


def _extent(offset: int | Tensor, length: int) -> tuple[int, int]:
    """The first and the last row, or column, that any batch row has."""
    low, high = torch.stack(torch.aminmax(offset)).tolist() if isinstance(offset, Tensor) else (offset, offset)
    return low, high + length - 1


@lru_cache(maxsize=256)
def _turned(expr: Expr) -> Expr:
    """The expression of q and kv swapped."""
    other = {"q": "kv", "kv": "q"}
    return Expr(tuple(replace(node, op=other.get(node.op, node.op)) for node in expr.nodes), expr.sources)
