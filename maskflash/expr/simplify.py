"""An expression -> an equal, smaller one, by a table of rules that are tried on each node, operands first.

Only constants of the structure are folded: a param's value may change from call to call, so nothing here looks at it.
Dropping an operand drops its faults too: a rule may drop only what cannot fault, or what is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch

from maskflash.expr.nodes import Builder, Expr, Node, Source
from maskflash.expr.ops import COMPARISONS, OPERATIONS

Pattern = str | bool | tuple[Any, ...]
"""A name, True or False, or an operation and the patterns of its operands."""


class Rewrite(NamedTuple):
    """What a node may be written as, in the words of the grammar in `nodes.py`.

    A name stands for the same node wherever it is.

    Attributes:
        pattern: the node.
        result: what is equal to it.
        only: whether it is, told of the node and of those that names stand for.
        unread: the names of operands that the pattern never reads; what else the result lacks must be without faults.
    """

    pattern: str
    result: str
    only: Callable[[Node, list[Node]], bool] = lambda node, named: True
    unread: str = ""


def _truths(node: Node, named: list[Node]) -> bool:
    return node.dtype == torch.bool


def _by_number(node: Node, named: list[Node]) -> bool:
    return node.dtype == torch.int64 and named[1].op == "const" and named[1].value != 0


def _no_float(node: Node, named: list[Node]) -> bool:
    """Floats may be NaN, which is neither less nor not less than anything, nor equal to itself."""
    return not any(other.dtype.is_floating_point for other in named)


def _of_its_kind(node: Node, named: list[Node]) -> bool:
    return (named[0].dtype, named[0].weak) == (node.dtype, node.weak)


def _turned(no: str) -> Iterator[Rewrite]:
    """Rules of a negation: truths are turned at once, comparisons become their opposites."""
    yield Rewrite(f"{no} True", "False", _truths)
    yield Rewrite(f"{no} False", "True", _truths)
    yield Rewrite(f"{no} not x", "x", _truths)
    for op in sorted(COMPARISONS):
        only = _truths if op in ("eq", "ne") else lambda node, named: _truths(node, named) and _no_float(node, named)
        yield Rewrite(f"{no} {op} x y", f"{OPERATIONS[op].opposite} x y", only)


def _settled(op: str, unread: str = "") -> Iterator[Rewrite]:
    """Rules of a connective that the truth of one operand settles; it may leave the second one unread then."""
    settling = OPERATIONS[op].settled
    yield Rewrite(f"{op} x x", "x", _truths)
    yield Rewrite(f"{op} {settling} x", f"{settling}", _truths, unread)
    yield Rewrite(f"{op} x {settling}", f"{settling}", _truths)
    yield Rewrite(f"{op} {not settling} x", "x", _truths)
    yield Rewrite(f"{op} x {not settling}", "x", _truths)


RULES: Final = (
    *_turned("not"),
    *_turned("bitnot"),
    *_settled("and", unread="x"),
    *_settled("or", unread="x"),
    *_settled("bitand"),
    *_settled("bitor"),
    Rewrite("bitxor x True", "not x", _truths),
    Rewrite("bitxor x False", "x", _truths),
    Rewrite("bitxor True x", "not x", _truths),
    Rewrite("bitxor False x", "x", _truths),
    Rewrite("select True x y", "x", unread="y"),
    Rewrite("select False x y", "y", unread="x"),
    Rewrite("select c x x", "x"),
    Rewrite("select not c x y", "select c y x"),
    Rewrite("select c x c", "and c x", _truths),
    Rewrite("select c c y", "or c y", _truths),
    Rewrite("select c True False", "c", _truths),
    Rewrite("select c False True", "not c", _truths),
    Rewrite("select c True y", "or c y", _truths),
    Rewrite("select c x False", "and c x", _truths),
    Rewrite("select c False y", "and not c y", _truths),
    Rewrite("select c x True", "or not c x", _truths),
    Rewrite("cast x", "x", _of_its_kind),
    Rewrite("cast True", "True", _truths),
    Rewrite("cast False", "False", _truths),
    Rewrite("sub x mod x n", "mul floordiv x n n", _by_number),  # bounds don't see that the two x are one
    *(Rewrite(f"{op} x x", "True", _no_float) for op in ("eq", "le", "ge")),
    *(Rewrite(f"{op} x x", "False", _no_float) for op in ("ne", "lt", "gt")),
)


def simplify(expr: Expr) -> Expr:
    """The expression rewritten to normal form; the mask it describes is the same, pair by pair."""
    normal = _Normal()
    places: list[int] = []
    for node, source in zip(expr.nodes, expr.sources or (None,) * len(expr.nodes), strict=True):
        places.append(normal.place(node, tuple([places[arg] for arg in node.args]), source))
    return normal.finish(places[-1])


class _Normal(Builder):
    """Grows an expression in normal form, and knows of each node whether it can fault."""

    def __init__(self) -> None:
        super().__init__()
        self._faultless: list[bool] = []

    def _is_faultless(self, place: int) -> bool:
        """Whether a node has a value for all operands, and so have they."""
        known = self._faultless
        for node in self.nodes[len(known) : place + 1]:  # a 0-dim table is looked up without an index
            known.append(not (OPERATIONS[node.op].faults and node.args) and all([known[arg] for arg in node.args]))
        return known[place]

    def place(self, node: Node, args: tuple[int, ...], source: Source | None) -> int:
        """The position of a node, or of what the first rule that fits it says that it equals."""
        for rule, pattern, result, dropped in _COMPILED.get(node.op, ()):
            names: dict[str, int] = {}
            if (
                self._fit(pattern, args, names)
                and all([self._is_faultless(names[name]) for name in dropped])
                and rule.only(node, [self.nodes[place] for place in names.values()])
            ):
                return self._of_kind(self._build(result, names, node, self.sources[args[0]]), node)
        return self.add(node.op, *args, dtype=node.dtype, weak=node.weak, value=node.value, source=source)

    def _fit(self, patterns: tuple[Pattern, ...], places: tuple[int, ...], names: dict[str, int]) -> bool:
        """Whether patterns fit nodes, noting what their names stand for."""
        for pattern, place in zip(patterns, places, strict=True):
            if isinstance(pattern, str):
                if names.setdefault(pattern, place) != place:
                    return False
                continue
            node = self.nodes[place]
            if isinstance(pattern, bool):
                if node.op != "const" or bool(node.value) is not pattern:
                    return False
            elif node.op != pattern[0] or not self._fit(pattern[1:], node.args, names):
                return False
        return True

    def _build(self, result: Pattern, names: dict[str, int], node: Node, source: Source | None) -> int:
        """The position of a rule's result; a negation in it is rewritten in turn, a comparison keeps its source."""
        if isinstance(result, bool):
            return self.const(result)
        if isinstance(result, str):
            return names[result]
        op, *operands = result
        args = tuple([self._build(operand, names, node, source) for operand in operands])
        if op == "not":
            return self.place(Node("not", args, torch.bool, self.nodes[args[0]].weak), args, None)
        if op == node.op:
            return self.add(op, *args, dtype=node.dtype, weak=node.weak)
        return self.add(op, *args, source=source if op in COMPARISONS else None)

    def _of_kind(self, place: int, node: Node) -> int:
        """An equal node of this one's dtype and weakness, on which its users' promotion rests; a truth's hardly."""
        found = self.nodes[place]
        if found.dtype == node.dtype and (found.weak == node.weak or node.dtype == torch.bool):
            return place
        if found.op == "const" and found.dtype == node.dtype:
            return self.add("const", dtype=node.dtype, weak=node.weak, value=found.value)
        return self.add("cast", place, dtype=node.dtype, weak=node.weak)


def _parsed(words: Iterator[str]) -> Pattern:
    word = next(words)
    if word in ("True", "False"):
        return word == "True"
    if word not in OPERATIONS:
        return word
    return word, *(_parsed(words) for _ in range(OPERATIONS[word].arity or 0))


def _compiled() -> dict[str, list[tuple[Rewrite, tuple[Pattern, ...], Pattern, tuple[str, ...]]]]:
    """By the operation of their pattern: rules, patterns of operands, results, and names whose faults are dropped."""
    found: dict[str, list[tuple[Rewrite, tuple[Pattern, ...], Pattern, tuple[str, ...]]]] = {}
    for rule in RULES:
        op, *operands = rule.pattern.split()
        pattern, result = _parsed(iter((op, *operands))), _parsed(iter(rule.result.split()))
        assert isinstance(pattern, tuple)
        names = (word for word in dict.fromkeys(operands) if word not in ("True", "False", *OPERATIONS))
        kept = (*rule.result.split(), rule.unread)
        found.setdefault(op, []).append((rule, pattern[1:], result, tuple(name for name in names if name not in kept)))
    return found


_COMPILED: Final = _compiled()
