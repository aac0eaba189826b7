"""Values of two branches -> one value, chosen by the condition that told them apart."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskflash.expr.nodes import Node
from maskflash.expr.paths import CannotMerge
from maskflash.expr.symbols import Symbol, is_bool, position
from maskflash.expr.tracer import Tracer

_WIDE = frozenset((torch.int32, torch.int64))


def explore(tracer: Tracer, run: Callable[[], Any]) -> Any:
    """`run()` with its own branches merged into one value."""
    return tracer.paths.explore(run, lambda *args: merge(tracer, *args), tracer.mark, tracer.rewind)


def merge(tracer: Tracer, condition: int, x: Any, y: Any) -> Any:
    """X where the condition holds, else y; CannotMerge if no expression says exactly that.

    A merged value must behave later as each of the two would: numbers of different kinds stay apart, except wide
    integers, which differ only where they overflow.
    """
    if x is y or (isinstance(x, Symbol) and isinstance(y, Symbol) and x.position == y.position):
        return x
    if isinstance(x, tuple) and type(x) is type(y) is tuple and len(x) == len(y):
        return tuple(merge(tracer, condition, a, b) for a, b in zip(x, y, strict=True))
    if not (_is_number(x) and _is_number(y)):
        raise CannotMerge
    args = [position(tracer, value, place) for place, value in enumerate((x, y))]
    kinds = [tracer.builder.nodes[arg] for arg in args]
    dtype = common_dtype(*kinds)
    if dtype is None:
        raise CannotMerge
    weak = kinds[0].weak and kinds[1].weak
    return Symbol(tracer, tracer.record("select", condition, *args, dtype=dtype, weak=weak))


def common_dtype(x: Node, y: Node) -> torch.dtype | None:
    """The dtype in which two values are what they were apart; None if there is none."""
    if x.dtype == y.dtype and (x.weak == y.weak or x.dtype == torch.bool):
        return x.dtype
    return torch.promote_types(x.dtype, y.dtype) if {x.dtype, y.dtype} <= _WIDE else None


def _is_number(value: object) -> bool:
    single = isinstance(value, Tensor) and value.ndim == 0
    return isinstance(value, (Symbol, numbers.Real)) or is_bool(value) or single
