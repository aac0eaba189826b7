"""A spec and a part of its batch rows and heads -> the spec of that part: the same mask, seen from there.

Who computes the rows from 4 on does so under `mask(b + 4, ...)`: the mask's tables stay whole, its indices are those of
the whole call, and so are a score's and dropout's. Only what is listed by row or by head is cut: offsets and sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

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


def _from(firsts: dict[str, int], text: str, params: Sequence[int]) -> tuple[str, Sequence[int]]:
    """A function's text and params where b and h begin elsewhere than at 0."""
    shifts = {name: first for name, first in firsts.items() if first and name in expression(text).reads}
    return (shifted(text, tuple(shifts), len(params)), [*params, *shifts.values()]) if shifts else (text, params)


@lru_cache(maxsize=256)
def shifted(text: str, names: tuple[str, ...], slot: int) -> str:
    """A function's text with params, from this slot on, added to these indices."""
    expr, builder = expression(text), Builder()
    places: list[int] = []
    for node in expr.nodes:
        place = builder.add(
            node.op, *(places[arg] for arg in node.args), dtype=node.dtype, weak=node.weak, value=node.value
        )
        if node.op in names:
            param = builder.add("param", dtype=torch.int64, weak=True, value=slot + names.index(node.op))
            place = builder.add("add", place, param)
        places.append(place)
    return simplify(builder.finish(places[-1])).text
