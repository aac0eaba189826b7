"""Traced masks and connectives -> the trace of their combination; slots for the same value become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskflash.expr.nodes import Builder, Node
from maskflash.expr.simplify import simplify
from maskflash.trace.sources import Argument, View
from maskflash.trace.trace import Traced, compact

Join = tuple[str, tuple[int, ...]]
"""A connective, "bitand", "bitor", "bitxor" (both sides are always reached) or "not", and its operands' places."""


def combine(steps: Sequence[Traced | Join]) -> Traced:
    """The trace of masks joined by connectives.

    Args:
        steps: masks, and joins of what precedes them; the last is the whole.
    """
    builder = Builder()
    slots: dict[str, list[Any]] = {"param": [], "lookup": []}
    places: dict[object, int] = {}
    names: dict[str, int] = {}  # of tables so far, and the last number that was put behind each

    def place(part: Traced) -> int:
        def rename(node: Node) -> Node:
            if node.op not in slots:
                return node
            values = part.params if node.op == "param" else part.tables
            value, known = values[node.slot], slots[node.op]
            slot = places.setdefault((node.op, _identity(value)), len(known))
            if slot == len(known):
                known.append(value)
                if node.op == "lookup":
                    _name(part.names[node.slot], names)
            return Node(node.op, node.args, node.dtype, node.weak, slot)

        return builder.append(part.expr, rename)

    roots: list[int] = []
    for step in steps:
        if isinstance(step, Traced):
            roots.append(place(step))
        else:
            op, operands = step
            roots.append(builder.add(op, *(roots[operand] for operand in operands), dtype=torch.bool, weak=False))
    specialised = frozenset().union(*(step.specialised for step in steps if isinstance(step, Traced)))
    return compact(simplify(builder.finish(roots[-1])), slots["param"], slots["lookup"], list(names), specialised)


def _name(name: str, names: dict[str, int]) -> None:
    """Note a table by its name, or, where another table has it, by the name and a number."""
    if name in names:
        number = names[name] + 1
        while f"{name}_{number}" in names:
            number += 1
        names[name] = number
        name = f"{name}_{number}"
    names[name] = 1


def _identity(value: object) -> object:
    """What two slots share that always hold one value: a tensor or an argument. Equal ints may part ways later."""
    if isinstance(value, Argument | View):
        return value
    return id(value) if isinstance(value, Tensor) else object()
