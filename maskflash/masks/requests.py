"""A mask of a batch of requests -> the same mask of a call with some of them, whose b looks up which they are."""

from __future__ import annotations

from typing import Any, Final

import torch

from maskflash.expr.nodes import Builder, Expr
from maskflash.functions.derived import Derived
from maskflash.functions.sizes import Sizes
from maskflash.masks.mask import Mask
from maskflash.trace.sources import Argument
from maskflash.trace.trace import Traced, compact

REQUESTS: Final = Argument("call.requests")
"""What the table of requests, (batch rows of the call,), is called among arguments: nobody can pass such a name."""


class OfRequests(Derived, Mask):
    """A mask of requests b, over batch rows that are some of them: `REQUESTS` says which."""

    def __init__(self, mask: Mask) -> None:
        super().__init__(f"{mask.name} of requests", mask, (REQUESTS,))

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The mask's trace, with its b looked up."""
        return of_some(self.trace_of(mask_args))

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """What follows from heads and offsets; whether tables have a row for each request is for callers to check."""
        return self.of.implied(sizes._replace(partial=True))


def of_some(traced: Traced) -> Traced:
    """A trace whose b is looked up."""
    expr = _looked_up(traced.expr, len(traced.tables))
    tables, names = (*traced.tables, REQUESTS), (*traced.names, "requests")
    return compact(expr, traced.params, tables, names, traced.specialised)


def _looked_up(expr: Expr, slot: int) -> Expr:
    """The expression with its b's element of a table in b's place."""
    builder, places = Builder(), list[int]()
    for position, node in enumerate(expr.nodes):
        args = [places[arg] for arg in node.args]
        copy = builder.add(
            node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=expr.source(position)
        )
        is_b = node.op == "b"
        places.append(builder.add("lookup", copy, dtype=torch.int64, value=slot) if is_b else copy)
    return builder.finish(places[-1])
