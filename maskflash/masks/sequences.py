"""A mask of a batch of sequences -> the same mask of one row of packed tokens, which look theirs up."""

from __future__ import annotations

from typing import Any, Final

from maskflash.errors import UnsupportedMask
from maskflash.expr.sequences import TABLES, of_tokens
from maskflash.expr.simplify import simplify
from maskflash.functions.derived import Derived
from maskflash.functions.sizes import Sizes
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.combination import Combination
from maskflash.masks.dense import DenseMask
from maskflash.masks.mask import Mask
from maskflash.trace.sources import Argument
from maskflash.trace.trace import Traced, compact

ARGUMENTS: Final = tuple(Argument(f"call.{name}") for name in TABLES)
"""What the tables are called among arguments: nobody can pass such names."""


class InSequences(Derived, Mask):
    """A mask of sequences b, with q and kv inside them, over packed tokens: hidden where these are of two sequences.

    Its tables come with each call, as `ARGUMENTS`.

    Raises:
        UnsupportedMask: the mask is made for calls of one size.
    """

    def __init__(self, mask: Mask) -> None:
        for part in mask.joined() if isinstance(mask, Combination) else (mask,):
            if isinstance(part, (ColumnIntervals, DenseMask)):
                raise UnsupportedMask(
                    f"varlen_attention: {part.name} has a place for each row and column of a call, and sequences of "
                    "several lengths have none in common; write it as a predicate f(b, h, q, kv), which looks tables up"
                )
        super().__init__(f"{mask.name} in sequences", mask, ARGUMENTS)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The mask's trace, of packed tokens."""
        return of_packed_tokens(self.trace_of(mask_args), alone=True)

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """What follows from heads; whether tables have a row for each sequence is for the caller to check."""
        return self.of.implied(sizes._replace(partial=True))


def of_packed_tokens(traced: Traced, *, alone: bool) -> Traced:
    """A trace whose b, q and kv are looked up: see `of_tokens`."""
    expr = simplify(of_tokens(traced.expr, len(traced.tables), alone=alone))
    tables, names = (*traced.tables, *ARGUMENTS), (*traced.names, *TABLES)
    return compact(expr, traced.params, tables, names, traced.specialised)
