"""An expression and the values of its slots -> a function of tensors that torch.compile reads: a mask_mod, a score_mod.

FlexAttention compiles such functions into its kernels. So an expression is written as Python, a statement a node:

    q >= kv and doc[q] == doc[kv]        def modify(b, h, q, kv):
                                             b, h, q, kv = (x.to(int64) for x in (b, h, q, kv))
                                             x0 = q
                                             x1 = kv
                                             x2 = ge(x0.to(int64), x1.to(int64))
                                             x3 = read(t0, [x0])
                                             ...
                                             return x6

Numbers, tables and offsets are tensors that the function closes over. So other numbers and other tables need no new
text, and what torch has compiled for one call serves the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.expr.evaluate import Inputs
from maskflash.expr.nodes import Expr, Node, operand_dtype, parse
from maskflash.expr.ops import OPERATIONS

Modifier = Callable[..., Tensor]


def modifier(
    expr: Expr, inputs: Inputs, q_offset: int | Tensor, kv_offset: int | Tensor, device: torch.device
) -> Modifier:
    """The function of an expression.

    Args:
        expr: a mask, or a score function.
        inputs: the values of its slots.
        q_offset: added to row numbers, an int or an integer tensor (B,).
        kv_offset: added to column numbers, likewise.
        device: where the function is called.

    Returns:
        f(b, h, q, kv) of a mask, f(score, b, h, q, kv) of a score function; of tensors, the indices of any integer
        dtype. It looks at no index first: a look-up out of range reads what lies at the edge.
    """
    moves = tuple("each" if isinstance(x, Tensor) else "all" if x else "" for x in (q_offset, kv_offset))
    offsets = [x if isinstance(x, Tensor) else _number(x, device) for x in (q_offset, kv_offset)]
    numbers = [_number(value, device) for value in inputs.params]
    made: Modifier = _maker(expr.text, *moves)(*offsets, numbers, list(inputs.tables))
    return made


def _number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device=device)


@lru_cache(maxsize=256)
def _maker(text: str, q_move: str, kv_move: str) -> Callable[..., Modifier]:
    """What makes the function of a text from offsets, numbers and tables."""
    names: dict[str, Any] = dict(_NAMES)
    exec(compile(written(parse(text), q_move, kv_move), f"<modifier {text}>", "exec"), names)
    maker: Callable[..., Modifier] = names["make"]
    return maker


def written(expr: Expr, q_move: str = "", kv_move: str = "") -> str:
    """The text of an expression's function, and of what makes it.

    Args:
        expr: a mask, or a score function.
        q_move: "" where rows have no offset, "all" where they share one, "each" where each batch row has its own.
        kv_move: likewise of columns.
    """
    is_score = any(node.op == "score" for node in expr.nodes)
    lines = ["b, h, q, kv = b.to(int64), h.to(int64), q.to(int64), kv.to(int64)"]
    for name, move in (("q", q_move), ("kv", kv_move)):
        if move:
            lines.append(f"{name} = {name} + {name}_offset{'[b]' if move == 'each' else ''}")
    lines += [f"x{position} = {_statement(node, expr)}" for position, node in enumerate(expr.nodes)]
    lines.append(f"return x{len(expr.nodes) - 1}{'' if is_score else '.to(bool)'}")
    given = ["score"] * is_score + ["b", "h", "q", "kv"]
    slots = [f"n{i} = numbers[{i}]" for i in range(expr.slots("param"))]
    slots += [f"t{i} = tables[{i}]" for i in range(expr.slots("lookup"))]
    head = ["def make(q_offset, kv_offset, numbers, tables):", *(f"    {slot}" for slot in slots)]
    body = [f"    def modify({', '.join(given)}):", *(f"        {line}" for line in lines), "    return modify"]
    return "\n".join([*head, *body, ""])


def _statement(node: Node, expr: Expr) -> str:
    """What a node computes, of the nodes before it: as `expr.evaluate.compute_node` does."""
    args = [f"x{arg}" for arg in node.args]
    match node.op:
        case "b" | "h" | "q" | "kv":
            return node.op
        case "score":
            return f"score.to({_dtype(node.dtype)})"
        case "const":
            value = f"float('{node.value}')" if isinstance(node.value, float) else node.value  # inf and nan too
            return f"q.new_full((), {value}, dtype={_dtype(node.dtype)})"
        case "param":
            return f"n{node.slot}.to({_dtype(node.dtype)})"
        case "lookup":
            return f"read(t{node.slot}, [{', '.join(args)}])"
        case "cast":
            return f"{args[0]}.to({_dtype(node.dtype)})"
        case "select":
            to = _dtype(node.dtype)
            return f"where({args[0]}.to(bool), {args[1]}.to({to}), {args[2]}.to({to}))"
    dtype = operand_dtype(node, [expr.nodes[arg] for arg in node.args])
    operands = [f"{arg}.to({_dtype(dtype)})" for arg in args]
    if OPERATIONS[node.op].faults and not dtype.is_floating_point:
        return f"op_{node.op}({operands[0]}, unfailing({operands[1]})).to({_dtype(dtype)})"
    return f"op_{node.op}({', '.join(operands)})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(table: Tensor, indices: list[Tensor]) -> Tensor:
    """A look-up without a look at the indices: analysis has found those that guards let through in range."""
    if 0 in table.shape:
        return table.new_zeros(())
    if not indices:
        return table
    whole = [index.to(torch.int64) for index in indices]
    wrapped = [torch.where(index < 0, index + size, index) for index, size in zip(whole, table.shape, strict=True)]
    return table[tuple(index.clamp(0, size - 1) for index, size in zip(wrapped, table.shape, strict=True))]


def _unfailing(divisor: Tensor) -> Tensor:
    """A divisor without zeros: analysis has found that no pair is decided by one."""
    return torch.where(divisor == 0, 1, divisor)


_DTYPES: Final = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64")
_NAMES: Final = {
    **{f"op_{name}": operation.compute for name, operation in OPERATIONS.items() if operation.compute is not None},
    **{name: getattr(torch, name) for name in _DTYPES},
    "where": torch.where,
    "read": _read,
    "unfailing": _unfailing,
}
