"""A score in a call -> what its kernels' text depends on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from maskflash.backends.triton.signature import ScoreKind, TableKind
from maskflash.expr.bounds import Reach, largest
from maskflash.expr.evaluate import Inputs
from maskflash.expr.nodes import Expr
from maskflash.scores.strength import BoundScore


def score_kind(score: BoundScore, extents: Mapping[str, Reach]) -> ScoreKind:
    """The kind of a score.

    Nothing of its tables is looked at, which a GPU would have to be waited for. So a 64-bit integer that is looked up
    counts as one that needs 64 bits, unless it is an index of another look-up, where hidden pairs alone have others.

    Args:
        score: the score.
        extents: for `b`, `h`, `q`, `kv` the first and the last index of the call.
    """
    expr, tables = score.expr, score.inputs.tables
    sizes = [size for table in tables for size in table.shape]
    numbers = Inputs(score.inputs.params, tuple(_ends(expr, slot, table) for slot, table in enumerate(tables)))
    found = largest(expr, numbers, extents)
    return ScoreKind(
        expr,
        tuple(map(TableKind.of, tables)),
        narrow=found is not None and max(found, *sizes, 0) < 2**31,
        near=all(_reach(table) < 2**31 for table in tables),
        q_offsets=isinstance(score.q_offset, Tensor),
        kv_offsets=isinstance(score.kv_offset, Tensor),
        negative_kv=extents["kv"][0] < 0,
    )


def _reach(table: Tensor) -> int:
    """How far apart, in elements, a table's places are; also if it were dense."""
    steps = zip(table.shape, table.stride(), strict=True)
    return max(table.numel(), sum((size - 1) * abs(step) for size, step in steps))


def _ends(expr: Expr, slot: int, table: Tensor) -> Tensor:
    """A table with the least and the greatest number that one in its place may hold, on the CPU."""
    if table.dtype != torch.int64 or _indexes_alone(expr, slot):
        return torch.zeros(2, dtype=table.dtype)
    info = torch.iinfo(torch.int64)
    return torch.tensor([info.min, info.max])


def _indexes_alone(expr: Expr, slot: int) -> bool:
    """Whether all that is read of a table are indices of other look-ups."""
    read = {position for position, node in enumerate(expr.nodes) if node.op == "lookup" and node.slot == slot}
    return all(node.op == "lookup" or read.isdisjoint(node.args) for node in expr.nodes)
