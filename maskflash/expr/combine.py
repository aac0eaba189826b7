"""Traced masks and a connective -> the trace of their combination; slots for the same value become one."""

from __future__ import annotations

from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from maskflash.expr.nodes import Builder, Node
from maskflash.expr.simplify import simplify
from maskflash.expr.trace import Traced, compact
from maskflash.expr.tracer import Argument, View


def combine(op: str, parts: tuple[Traced, ...]) -> Traced:
    """The trace of `op` over masks.

    Args:
        op: "bitand", "bitor", "bitxor" (both sides are always reached) or "not".
        parts: two masks, or one for "not".
    """
    builder = Builder()
    slots: dict[str, list[Any]] = {"param": [], "lookup": []}
    places: dict[object, int] = {}
    names: list[str] = []

    def place(part: Traced) -> int:
        def rename(node: Node) -> Node:
            if node.op not in slots:
                return node
            values = part.params if node.op == "param" else part.tables
            value, known = values[int(node.value or 0)], slots[node.op]
            slot = places.setdefault((node.op, _identity(value)), len(known))
            if slot == len(known):
                known.append(value)
                if node.op == "lookup":
                    names.append(_unused(part.names[int(node.value or 0)], names))
            return Node(node.op, node.args, node.dtype, node.weak, slot)

        return builder.append(part.expr, rename)

    root = builder.add(op, *(place(part) for part in parts), dtype=torch.bool, weak=False)
    specialised = frozenset().union(*(part.specialised for part in parts))
    return compact(simplify(builder.finish(root)), slots["param"], slots["lookup"], names, specialised)


def _unused(name: str, names: list[str]) -> str:
    """The name, or, where another table has it, the name and a number."""
    numbered = (f"{name}_{n}" for n in count(2))
    return next(new for new in chain([name], numbered) if new not in names)


def _identity(value: object) -> object:
    """What two slots share that always hold one value: a tensor or an argument. Equal ints may part ways later."""
    if isinstance(value, Argument | View):
        return value
    return id(value) if isinstance(value, Tensor) else object()
