"""Answers to conditions -> the ranges that they leave to b, h, q and kv, and what those say of other conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from maskflash.expr.nodes import Node
from maskflash.expr.ops import INDEX_VARIABLES, OPERATIONS

Range = tuple[float, float]

_ANYTHING: Final = (float("-inf"), float("inf"))
_FROM_ZERO: Final = (0.0, float("inf"))
_START: Final = {"b": _FROM_ZERO, "h": _FROM_ZERO, "q": _ANYTHING, "kv": _ANYTHING}  # q and kv have offsets


class Premises:
    """What is known on one path: conditions with their answers, and ranges of the index variables.

    Args:
        nodes: what conditions are positions of.
        number: the value of a constant node; None if it has no fixed value.
        ranges: what is known of the index variables before.
    """

    def __init__(
        self, nodes: list[Node], number: Callable[[Node], float | None], ranges: dict[str, Range] | None = None
    ) -> None:
        self.answers: dict[int, bool] = {}
        self.ranges: dict[str, tuple[float, float]] = {**_START, **(ranges or {})}
        self._nodes = nodes
        self._number = number

    def learn(self, condition: int, answer: bool) -> None:
        """Note an answer and all that follows: both sides of a true `and`, or of a false `or`."""
        todo = [(condition, answer)]
        while todo:
            position, truth = todo.pop()
            self.answers[position] = truth
            node = self._nodes[position]
            if (node.op == "and" and truth) or (node.op == "or" and not truth):
                todo += [(arg, truth) for arg in node.args]
            elif node.op == "not":
                todo.append((node.args[0], not truth))
            elif comparison := self._against_constant(node):
                name, op, number = comparison
                low, high = self.ranges[name]
                op = op if truth else OPERATIONS[op].opposite
                if op in ("gt", "ge", "eq"):
                    low = max(low, number + (op == "gt"))
                if op in ("lt", "le", "eq"):
                    high = min(high, number - (op == "lt"))
                self.ranges[name] = (low, high)

    def implied(self, position: int) -> bool | None:
        """What the ranges say of a condition; None where they leave it open."""
        node = self._nodes[position]
        if node.op in ("and", "or"):
            sides = [self.implied(arg) for arg in node.args]
            settled = OPERATIONS[node.op].settled
            if settled in sides:
                return settled
            return None if None in sides else not settled
        if node.op == "not":
            inner = self.implied(node.args[0])
            return None if inner is None else not inner
        if comparison := self._against_constant(node):
            name, op, number = comparison
            return _compared(op, *self.ranges[name], number)
        return None

    def contradict(self) -> bool:
        """Whether no pair with q >= 0 and kv >= 0 has these answers, as far as the ranges say."""
        pairs = Premises(self._nodes, self._number, self.ranges)
        for name in ("q", "kv"):
            low, high = self.ranges[name]
            pairs.ranges[name] = (max(low, 0.0), high)
        if any(low > high for low, high in pairs.ranges.values()):
            return True
        return not all(pairs.implied(condition) in (None, answer) for condition, answer in self.answers.items())

    def _against_constant(self, node: Node) -> tuple[str, str, float] | None:
        """(variable, comparison, number) if the node compares an index variable with a fixed integer."""
        op = node.op
        if not OPERATIONS[op].opposite:
            return None
        left, right = (self._nodes[arg] for arg in node.args)
        if right.op in INDEX_VARIABLES:
            left, right, op = right, left, OPERATIONS[op].mirrored
        number = self._number(right)
        if left.op not in INDEX_VARIABLES or number is None or right.dtype.is_floating_point:
            return None
        return left.op, op, number


def _compared(op: str, low: float, high: float, number: float) -> bool | None:
    """Whether `x op number` holds for every x from low to high, or for none (False); None if for some."""
    match op:
        case "lt":
            return True if high < number else False if low >= number else None
        case "le":
            return True if high <= number else False if low > number else None
        case "gt" | "ge" | "ne":
            opposite = _compared(OPERATIONS[op].opposite, low, high, number)
            return None if opposite is None else not opposite
    return False if number < low or number > high else None
