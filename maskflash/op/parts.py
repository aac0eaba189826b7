"""A spec and a part of its batch rows and heads, or of its tokens -> the spec of that part: the mask, seen from there.

Who computes the rows from 4 on does so under `mask(b + 4, ...)`: the mask's tables stay whole, its indices are those of
the whole call, and so are a score's and dropout's. Only what is listed by row or by head is cut: offsets and sinks.
Tokens one after the other are moved by offsets. Others look up where they are: `mask(b, h, at[q], at[kv])`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from maskflash.expr.nodes import Builder
from maskflash.expr.simplify import simplify
from maskflash.functions.slots import expression
from maskflash.op.spec import Spec


def part(spec: Spec, rows: range, heads: range) -> Spec:
    """The spec of some batch rows and query heads of a call.

    Args:
        spec: of the whole call.
        rows: batch rows, one after the other.
        heads: query heads, likewise.
    """
    firsts = {"b": rows.start, "h": heads.start}
    text, params = _from(firsts, spec.expr, spec.params)
    spec = spec._replace(expr=text, params=params)
    if spec.score:
        text, params = _from(firsts, spec.score, spec.score_params)
        spec = spec._replace(score=text, score_params=params)
    if spec.seed is not None:
        spec = spec._replace(seed=torch.cat((spec.seed, spec.seed.new_tensor([rows.start, heads.start]))))
    q_offsets, kv_offsets = (x if x is None else x[rows.start : rows.stop] for x in (spec.q_offsets, spec.kv_offsets))
    sinks = None if spec.sinks is None else spec.sinks[heads.start : heads.stop]
    return spec._replace(q_offsets=q_offsets, kv_offsets=kv_offsets, sinks=sinks)


class Tokens(NamedTuple):
    """Some tokens of a sequence.

    Attributes:
        at: int64 (tokens,), where they are, ascending.
        first: the first of tokens that are one after the other; None where they aren't.
    """

    at: Tensor
    first: int | None

    @staticmethod
    def of(ranges: Sequence[tuple[int, int]], device: torch.device) -> Tokens:
        """Those of ranges (start, stop) that ascend and don't touch."""
        at = [torch.arange(start, stop) for start, stop in ranges] or [torch.arange(0)]
        return Tokens(torch.cat(at).to(device), None if len(ranges) > 1 else ranges[0][0] if ranges else 0)


def of_tokens(spec: Spec, rows: Tokens, columns: Tokens) -> Spec:
    """The spec of some queries and some keys of a call that has no offsets."""
    looked_up = {name: of.at for name, of in (("q", rows), ("kv", columns)) if of.first is None}
    spec = spec._replace(q_offset=rows.first or 0, kv_offset=columns.first or 0)
    if not looked_up:
        return spec
    text, tables = _looking_up(looked_up, spec.expr, spec.tables)
    spec = spec._replace(expr=text, tables=tables)
    if spec.score:
        text, tables = _looking_up(looked_up, spec.score, spec.score_tables)
        learned = [*spec.learned, *[False] * (len(tables) - len(spec.learned))]
        spec = spec._replace(score=text, score_tables=tables, learned=learned)
    if spec.seed is not None:
        begins = spec.seed if len(spec.seed) == 3 else torch.cat((spec.seed, spec.seed.new_zeros(2)))
        spec = spec._replace(seed=torch.cat((begins, rows.at, columns.at)))
    return spec


def _looking_up(at: dict[str, Tensor], text: str, tables: Sequence[Tensor]) -> tuple[str, Sequence[Tensor]]:
    """A function's text and tables where q or kv look up where they are."""
    read = [name for name in at if name in expression(text).reads]
    return (
        (looking_up(text, tuple(read), len(tables)), [*tables, *[at[name] for name in read]])
        if read
        else (text, tables)
    )


def _from(firsts: dict[str, int], text: str, params: Sequence[int]) -> tuple[str, Sequence[int]]:
    """A function's text and params where b and h begin elsewhere than at 0."""
    shifts = {name: first for name, first in firsts.items() if first and name in expression(text).reads}
    return (shifted(text, tuple(shifts), len(params)), [*params, *shifts.values()]) if shifts else (text, params)


@lru_cache(maxsize=256)
def shifted(text: str, names: tuple[str, ...], slot: int) -> str:
    """A function's text with params, from this slot on, added to these indices."""

    def move(builder: Builder, index: int, name: str) -> int:
        param = builder.add("param", dtype=torch.int64, weak=True, value=slot + names.index(name))
        return builder.add("add", index, param)

    return _moved(text, names, move)


@lru_cache(maxsize=256)
def looking_up(text: str, names: tuple[str, ...], slot: int) -> str:
    """A function's text in which these indices are looked up in tables, from this slot on."""

    def move(builder: Builder, index: int, name: str) -> int:
        return builder.add("lookup", index, dtype=torch.int64, value=slot + names.index(name))

    return _moved(text, names, move)


def _moved(text: str, names: tuple[str, ...], move: Callable[[Builder, int, str], int]) -> str:
    """A function's text in which something else stands for these indices."""
    expr, builder = expression(text), Builder()
    places: list[int] = []
    for node in expr.nodes:
        place = builder.add(
            node.op, *(places[arg] for arg in node.args), dtype=node.dtype, weak=node.weak, value=node.value
        )
        places.append(move(builder, place, node.op) if node.op in names else place)
    return simplify(builder.finish(places[-1])).text
