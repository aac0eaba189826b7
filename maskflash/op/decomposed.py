"""A program with our op -> the same of torch's own operations, over all pairs: for runtimes that know no other.

    maskflash::forward(q, k, v, tables, ..., "doc[b, q] == doc[b, kv]")   ->   arange, index, eq, matmul, where, softmax

It costs what a dense mask costs, and needs no maskflash where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskflash.backends.reference import reference
from maskflash.errors import BackendError
from maskflash.expr.evaluate import Inputs, compute
from maskflash.functions.slots import expression
from maskflash.op.spec import Spec


def dense_decompositions() -> dict[Any, Callable[..., Any]]:
    """What replaces our op in an exported program where only torch's own operations are known, as in ONNX.

    Every pair is computed, so a program of 8,192 tokens needs what 8,192² scores need. Gradients aren't decomposed:
    export for inference. A look-up out of range reads the nearest element, where the op raises `MaskIndexError`.

    Returns:
        A table for `torch.export.ExportedProgram.run_decompositions`.

    Raises:
        BackendError: while the table is used, if a call has a score function or dropout.

    Example:
        >>> import maskflash as mf
        >>> class Layer(torch.nn.Module):
        ...     attn = mf.compile(mf.causal())
        ...     def forward(self, q):
        ...         return self.attn(q, q, q)
        >>> program = torch.export.export(Layer(), (torch.randn(1, 2, 9, 4),))
        >>> plain = program.run_decompositions(mf.dense_decompositions())
        >>> any("maskflash" in str(node.target) for node in plain.graph.nodes)
        False
    """
    return {torch.ops.maskflash.forward.default: _dense}


def _dense(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The op's out and lse, over all pairs."""
    spec = Spec.from_op(*args)
    if spec.score or spec.dropout_p:
        what = "a score function" if spec.score else "dropout"
        raise BackendError(
            f"dense_decompositions: the program has a call with {what}, expected a mask and sinks alone; compute that "
            "call with torch's own operations"
        )
    expr = expression(spec.expr)
    visible, _ = compute(expr, Inputs(expr.decoded(spec.params), tuple(spec.tables)), _pairs(q, k, spec), _nearest)
    exact = torch.promote_types(q.dtype, torch.float32)
    sinks = None if spec.sinks is None else spec.sinks.to(exact)
    out, lse = reference(q.to(exact), k.to(exact), v.to(exact), visible.to(torch.bool), spec.scale, sinks)
    return out.to(q.dtype), lse / math.log(2) if spec.backend == "triton" else lse


def _pairs(q: Tensor, k: Tensor, spec: Spec) -> dict[str, Tensor]:
    """Each index along its own dimension of (B, Hq, Sq, Skv)."""

    def along(axis: int, size: int) -> Tensor:
        return torch.arange(size, device=q.device).view([-1 if axis == place else 1 for place in range(4)])

    def moved(index: Tensor, number: int, numbers: Tensor | None) -> Tensor:
        return index + (number if numbers is None else numbers.to(torch.int64).view(-1, 1, 1, 1))

    batch, heads, q_len, _ = q.shape
    return {
        "b": along(0, batch),
        "h": along(1, heads),
        "q": moved(along(2, q_len), spec.q_offset, spec.q_offsets),
        "kv": moved(along(3, k.shape[2]), spec.kv_offset, spec.kv_offsets),
    }


def _nearest(table: Tensor, indices: list[Tensor]) -> tuple[Tensor, None]:
    """What a table holds at indices, negative ones from its end, without a look at their values."""
    wrapped = [
        torch.where(index < 0, index + size, index).clamp(0, size - 1)
        for index, size in zip(indices, table.shape, strict=True)
    ]
    # An index without dimensions would be read as a number, and its value looked at.
    wrapped = [index if index.ndim else index.view(1, 1, 1, 1) for index in wrapped]
    return (table[tuple(wrapped)] if wrapped else table), None
