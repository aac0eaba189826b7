"""An expression -> text as one would write it in Python: whole, or each of its nodes."""

from __future__ import annotations

from typing import Final

from maskflash.expr.nodes import Expr, Node
from maskflash.expr.ops import OPERATIONS

_LONGEST: Final = 100  # characters of an operand: a longer one is named, or left out


def format_expr(expr: Expr, params: tuple[object, ...] = (), tables: tuple[str, ...] = ()) -> str:
    """The expression as one would write it in Python; nodes used more than once are named on lines of their own."""
    uses = [0] * len(expr.nodes)
    for node in expr.nodes:
        for arg in node.args:
            uses[arg] += 1
    lines: list[str] = []
    texts: list[str] = []
    for position, node in enumerate(expr.nodes):
        text = _format_node(node, [texts[arg] for arg in node.args], params, tables)
        shared = uses[position] > 1 and node.args
        if shared or (len(text) > _LONGEST and position + 1 < len(expr.nodes)):
            lines.append(f"t{position} = {_unwrap(text)}")
            text = f"t{position}"
        texts.append(text)
    return "\n".join([*lines, _unwrap(texts[-1])])


def format_nodes(expr: Expr, params: tuple[object, ...] = (), tables: tuple[str, ...] = ()) -> list[str]:
    """The text of every node by itself; operands that are too long for it are an ellipsis."""
    texts: list[str] = []
    for node in expr.nodes:
        operands = (texts[arg] for arg in node.args)
        texts.append(
            _format_node(node, [text if len(text) <= _LONGEST else "..." for text in operands], params, tables)
        )
    return list(map(_unwrap, texts))


def _format_node(node: Node, args: list[str], params: tuple[object, ...], tables: tuple[str, ...]) -> str:
    if node.op in ("add", "sub") and args[1] == "0":  # a window of 0, say
        return args[0]
    if symbol := OPERATIONS[node.op].symbol:
        return f"({args[0]} {symbol} {args[1]})"
    match node.op:
        case "const":
            return str(node.value)
        case "param":
            return str(params[node.slot]) if params else f"p{node.value}"
        case "lookup":
            name = tables[node.slot] if tables else f"table{node.value}"
            return f"{name}[{', '.join(map(_unwrap, args))}]" if args else name
        case "select":
            condition = args[0] if " if " in args[0] else _unwrap(args[0])
            return f"({args[1]} if {condition} else {args[2]})"
        case "not":
            return f"(not {args[0]})"
        case "neg":
            return f"-{args[0]}"
        case "cast":
            return f"{str(node.dtype).removeprefix('torch.')}({_unwrap(args[0])})"
    return f"{node.op}({', '.join(map(_unwrap, args))})" if args else node.op


def _unwrap(text: str) -> str:
    """Drop one pair of outer parentheses, if it is a pair."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and place + 1 < len(text):
            return text
    return text[1:-1]
