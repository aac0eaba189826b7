"""Values of two branches -> one value, chosen by the condition that told them apart."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from maskflash.expr.nodes import Node
from maskflash.trace.paths import NEVER, Apart, CannotMerge, RaisesInBranch, TooManyPaths, Unrepeatable
from maskflash.trace.symbols import Symbol, is_bool, position
from maskflash.trace.tracer import Tracer, drop_private

_WIDE = frozenset((torch.int32, torch.int64))


def explore(tracer: Tracer, run: Callable[[], Any], code: CodeType, conditional: bool) -> Any:
    """`run()`, which runs `code`, with its own branches merged into one value.

    Args:
        tracer: the trace.
        run: what to run, once for each way through it.
        code: what a trace that is begun anew knows it by.
        conditional: whether Python itself would run it for some pairs only.

    Raises:
        CannotMerge: run it where its conditions are asked, so that they split what comes after it too.
        Apart: the same, but what was done meanwhile can't be undone.
    """
    if code in tracer.apart:
        raise CannotMerge

    def watched() -> Any:
        outer, tracer.written = tracer.written, {}
        try:
            value = _run(tracer, run, conditional)
        except RaisesInBranch as raised:  # the code that called may catch it
            raise (Apart(code) if tracer.written else CannotMerge) from raised.__cause__
        finally:
            written, tracer.written = tracer.written, outer
        drop_private(written)
        if written and (conditional or tracer.paths.branching()):
            raise Apart(code)
        for write in written.values():
            tracer.note_write(write)
        return value

    try:
        return tracer.paths.explore(watched, lambda c, x, y: merge(tracer, c, x, y, code), tracer.mark, tracer.rewind)
    except (Apart, TooManyPaths, Unrepeatable) as problem:
        tracer.stop(problem)


def explore_all(tracer: Tracer, run: Callable[[], Any]) -> Any:
    """The value of a whole predicate over all its branches.

    Raises:
        MaskTraceError: some branch changes what outlives the predicate, which would then hold for all pairs.
    """

    def watched() -> Any:
        tracer.written = {}
        value = _run(tracer, run, conditional=False)
        if tracer.paths.branching():
            drop_private(tracer.written)
            for write in tracer.written.values():
                if write.branching:
                    tracer.fail_write(write)
        return value

    return tracer.paths.explore(watched, lambda *args: merge(tracer, *args), tracer.mark, tracer.rewind)


def _run(tracer: Tracer, run: Callable[[], Any], conditional: bool) -> Any:
    """`run()`, or NEVER; a refusal that the user's code caught is raised after all."""
    try:
        value = run()
        if tracer.failure is not None:
            raise tracer.failure
    except RecursionError:
        raise
    except Exception as error:
        if tracer.paths.impossible():
            tracer.failure = None
            return NEVER
        if tracer.failure is not None:
            raise tracer.failure from None
        if conditional or tracer.paths.branching():
            raise RaisesInBranch from error
        raise
    return value


def merge(tracer: Tracer, condition: int, x: Any, y: Any, code: CodeType | None = None) -> Any:
    """X where the condition holds, else y; CannotMerge if no expression says exactly that.

    A merged value must behave later as each of the two would. Integers of different kinds are merged in the hope that
    nothing later tells them apart: where something does, the trace begins anew, with the branches of `code` apart.
    """
    if x is y or (isinstance(x, Symbol) and isinstance(y, Symbol) and x.position == y.position):
        return x
    if type(x) is type(y) is tuple and len(x) == len(y):
        return tuple(merge(tracer, condition, a, b, code) for a, b in zip(x, y, strict=True))
    if not (_is_number(x) and _is_number(y)):
        raise CannotMerge
    args = [position(tracer, value, place) for place, value in enumerate((x, y))]
    return joined(tracer, "select", args, code, condition)


def joined(tracer: Tracer, op: str, args: list[int], code: CodeType | None, *condition: int) -> Symbol:
    """A node that is one of two, as it is; CannotMerge if no dtype holds both."""
    kinds = [tracer.builder.nodes[arg] for arg in args]
    dtype = common_dtype(tracer, *kinds)
    if dtype is None:
        raise CannotMerge
    weak = kinds[0].weak and kinds[1].weak
    place = tracer.record(op, *condition, *args, dtype=dtype, weak=weak)
    if not dtype.is_floating_point:
        tracer.either(place, args, code)
    return Symbol(tracer, place)


def common_dtype(tracer: Tracer, x: Node, y: Node) -> torch.dtype | None:
    """The dtype that holds the values of two kinds; None if there is none, or theirs are better kept apart."""
    if tracer.role.scores:  # as in torch.where, a number is of the kind of what stands beside it
        for number, other in ((x, y), (y, x)):
            if number.weak and number.dtype != torch.bool and other.dtype.is_floating_point:
                return other.dtype
    if x.dtype == y.dtype and (x.weak == y.weak or not x.dtype.is_floating_point):
        return x.dtype
    return torch.promote_types(x.dtype, y.dtype) if {x.dtype, y.dtype} <= _WIDE else None


def _is_number(value: object) -> bool:
    if isinstance(value, Symbol):
        return True
    single = isinstance(value, Tensor) and value.ndim == 0
    return isinstance(value, numbers.Real) or is_bool(value) or single
