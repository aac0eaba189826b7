"""An additive score, and a call -> the matrix that torch's kernel adds to the products, -inf where the mask hides.

A bias that differs between pairs by kv - q alone is a vector over the diagonals. Under a mask whose edges are diagonals
too, the matrix is a view of that vector, if the keys come from the last to the first: nothing of its size is made.

    bias of kv - q          keys reversed         view of  8 7 6 5 4 3, strides (1, 1)
     5  6  7  8              8  7  6  5
     4  5  6  7              7  6  5  4
     3  4  5  6              6  5  4  3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from maskflash.backends.cpu.calls import Band, Blocks, Call, Causal
from maskflash.backends.cpu.plan import Plan
from maskflash.backends.cpu.programs import diagonal_nodes, farthest, is_bounded, look_up
from maskflash.expr.evaluate import compute_several
from maskflash.expr.nodes import Expr
from maskflash.scores.strength import BoundScore

_MATRIX: Final = 1 << 22  # elements of a matrix that is made


def indices(score: BoundScore, batch: int, heads: int, lengths: tuple[int, int]) -> dict[str, Tensor]:
    """b, h, q and kv of all rows and columns: (B, 1, 1), (1, Hq, 1), (B or 1, 1, Sq) and (B or 1, 1, Skv)."""
    places = {"b": torch.arange(batch)[:, None, None], "h": torch.arange(heads)[:, None]}
    for name, offset, length in zip(("q", "kv"), (score.q_offset, score.kv_offset), lengths, strict=True):
        shift = offset.to(torch.int64)[:, None, None] if isinstance(offset, Tensor) else offset
        places[name] = torch.arange(length) + shift
    return places


def value_of(expr: Expr, score: BoundScore, given: dict[str, Tensor]) -> Tensor:
    """What an expression without the score is for these pairs."""
    (value,), _ = compute_several(expr, score.inputs, given, (len(expr.nodes) - 1,), look_up)
    return value


@dataclass(slots=True, eq=False)
class Biases:
    """Matrices of a plan's calls under one bias.

    Attributes:
        plan: whose calls.
        expr: the bias.
        score: whose bias it is.
        kv_len: all columns.
        diagonal: whether the bias is of diagonals alone.
        bounded: whether it is finite for hidden pairs.
        hides: whether it may hide all pairs of a row.
    """

    plan: Plan
    expr: Expr
    score: BoundScore
    kv_len: int
    diagonal: bool
    bounded: bool
    hides: bool

    @staticmethod
    def of(plan: Plan, expr: Expr, score: BoundScore, q: Tensor, k: Tensor) -> Biases:
        """Those of a bias, for q (B, Hq, Sq, D) and k (B, Hkv, Skv, D)."""
        kv_len = k.shape[2]
        diagonal = len(expr.nodes) - 1 in diagonal_nodes(expr) or expr.reads <= {"b", "h"}
        bounded = is_bounded(expr, score.inputs, farthest(score, q, k))
        return Biases(plan, expr, score, kv_len, diagonal, bounded, not bounded)

    def along(self, batch: int, heads: int, q_len: int) -> Tensor:
        """The bias for each kv - q, from the largest on: (B, Hq, Sq + Skv - 1); of no diagonals where it has none."""
        if not self.diagonal:
            return torch.empty(batch, heads, 0)
        many = q_len + self.kv_len - 1
        given = indices(self.score, batch, heads, (1, many))
        given["kv"] = given["kv"].flip(-1) - (q_len - 1)
        return value_of(self.expr, self.score, given).expand(batch, heads, many)

    def places(self, batch: int, heads: int) -> tuple[Tensor, ...]:
        """The numbers b and h, and offsets that are tensors: (B, Hq, 1) each."""
        given = indices(self.score, batch, heads, (1, 1))
        offsets = [given[name] for name in ("q", "kv") if given[name].ndim > 1]
        return tuple(x.expand(batch, heads, 1) for x in (given["b"], given["h"], *offsets))

    def is_view(self, call: Call) -> bool:
        """Whether the call's matrix is a view, for keys from the last to the first."""
        dense = call.rows.index is None and call.columns.index is None
        return self.diagonal and dense and (call.mask is None or isinstance(call.mask, (Band, Causal)))

    def view(self, call: Call, vector: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix of a call, for keys from the last to the first: (N, G, R, S).

        Args:
            call: one for which `is_view` holds.
            vector: (N, G, diagonals), see `along`.
            dtype: of the matrix.
        """
        rows, columns = len(call.rows), len(call.columns)
        first, many = self.kv_len - call.columns.stop + call.rows.start, rows + columns - 1
        part = vector[..., first : first + many].to(dtype)
        mask = Band(0, 1, 1) if isinstance(call.mask, Causal) else call.mask
        if isinstance(mask, Band):
            ahead = torch.arange(columns - 1, columns - 1 - many, -1)  # column - row in the call
            hidden = (ahead < 0) & (mask.start_step == 1)
            hidden |= (ahead >= mask.width) & (mask.stop_step == 1)
            part = part.masked_fill(hidden, -torch.inf)
        part = part.contiguous()
        return part.as_strided((*part.shape[:2], rows, columns), (part.stride(0), part.stride(1), 1, 1))

    def matrix(self, call: Call, some: slice, places: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix of some rows of a call that is not of blocks: (N or 1, G or 1, R, S).

        Args:
            call: the call.
            some: of its rows.
            places: those of its heads, (N, G, 1) each.
            dtype: of the matrix.
        """
        b, h, *tensors = (x[..., None] for x in places)
        q, kv = call.rows.tokens()[some][:, None], call.columns.tokens()
        given = {"b": b, "h": h}
        for name, offset, tokens in (("q", self.score.q_offset, q), ("kv", self.score.kv_offset, kv)):
            given[name] = tokens + (tensors.pop(0) if isinstance(offset, Tensor) else offset)
        value = value_of(self.expr, self.score, given).to(dtype)
        value = value[(None,) * (4 - value.ndim)]
        value = value.expand(*value.shape[:2], len(q), len(kv))
        hidden = self.plan.tile(call, some, slice(0, len(kv)))
        if hidden is not None:
            value = value + hidden if self.bounded else value.masked_fill(hidden < 0, -torch.inf)
        return value if value.stride(3) == 1 else value.contiguous()


def parts(call: Call, heads: int) -> Iterator[tuple[Call, slice]]:
    """A call, or each of its blocks, and some of its rows: as many as let a matrix for these heads be small."""
    if isinstance(call.rows, Blocks) and isinstance(call.columns, Blocks):
        for rows, columns in zip(call.rows.each(), call.columns.each(), strict=True):
            yield from parts(replace(call, rows=rows, columns=columns), heads)
        return
    step = max(_MATRIX // (heads * len(call.columns)), 64)
    for low in range(0, len(call.rows), step):
        yield call, slice(low, min(low + step, len(call.rows)))
