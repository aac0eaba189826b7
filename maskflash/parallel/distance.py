"""A mask -> whether it stays as it is where q and kv move together: then the distance q - kv decides every pair.

(q - kv) % 4 == 0 and q - kv < 64    yes: q - kv stays, where q and kv both grow by 1
q >= kv and doc[q] == doc[kv]        no: a table is read at q
"""

from __future__ import annotations

import torch

from maskflash.expr.nodes import Expr, Node, operand_dtype
from maskflash.expr.ops import COMPARISONS


def only_distance_counts(expr: Expr) -> bool:
    """Whether a pair's truth depends on b, h and q - kv alone, as long as its integers don't overflow."""
    steps: list[int] = []  # by how much each node grows where q and kv grow by 1
    for node in expr.nodes:
        step = _step(node, [steps[arg] for arg in node.args], [expr.nodes[arg] for arg in node.args])
        if step is None:
            return False
        steps.append(step)
    return steps[-1] == 0


def _step(node: Node, steps: list[int], args: list[Node]) -> int | None:
    """By how much a node grows where its operands do by theirs; None where that isn't one number."""
    if node.op in ("q", "kv"):
        return 1
    if not any(steps):
        return 0
    counted = [operand_dtype(node, args), *(arg.dtype for arg, step in zip(args, steps, strict=True) if step)]
    if any(dtype != torch.int64 for dtype in counted):
        return None
    if node.op in COMPARISONS:
        return 0 if steps[0] == steps[1] else None
    match node.op, steps:
        case "cast", [x]:
            return x
        case "neg", [x]:
            return -x
        case "add", [x, y]:
            return x + y
        case "sub", [x, y]:
            return x - y
        case "min" | "max", [x, y] if x == y:
            return x
        case "select", [0, x, y] if x == y:
            return x
    return None
