"""A score's program, and the mask it is used under -> whether all that visible pairs look up is there.

A look-up that only hidden pairs would make is no error, so the score's program alone doesn't tell. That is found as
masks are:

    hidden(pair)  or  the indices of all look-ups of the pair are in their tables

is a mask in its own right, whose tiles must all be full. No pair is looked at where bounds or formulas tell. Few pairs
are all looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from maskflash.analysis.classify import classify
from maskflash.analysis.problem import Problem
from maskflash.errors import ArgumentError, MaskIndexError
from maskflash.expr.bounds import bounds
from maskflash.expr.evaluate import Inputs, compute, raise_if_reached
from maskflash.expr.nodes import Builder, Expr, Node
from maskflash.expr.ops import OPERATIONS
from maskflash.expr.simplify import simplify


def check(problem: Problem, score: Expr, inputs: Inputs) -> None:
    """Check what a score looks up wherever a mask shows the pair.

    Args:
        problem: the mask at the sizes of a call.
        score: the program.
        inputs: the values of its slots, on the problem's device.

    Raises:
        MaskIndexError: a visible pair looks up what a table doesn't have, or divides by zero.
        ArgumentError: an index depends on the score itself, so that nobody can tell.
    """
    inside = _inside(score)
    if inside is None or 0 in problem.shape:
        return
    whole = _with_sizes(inputs)
    asked = replace(problem, expr=inside, inputs=whole).on_host()
    verdict = bounds(asked.expr, asked.inputs, asked.box())
    if bool(verdict.always.all()) and not bool(verdict.faulty.any()):
        return
    under, together = _unless_hidden(problem, inside, whole)
    found = classify(replace(problem, expr=under, inputs=together)).block_map
    if found.counts["full"] < found.rows.lattice(found.shape[3]).numel():
        _fail(replace(problem, expr=under, inputs=together).on_host(), found.kinds(), score, inputs)


def check_pairs(pairs: Mapping[str, Tensor], visible: Tensor, score: Expr, inputs: Inputs) -> None:
    """Check what a score looks up for few pairs, by evaluating all of them.

    Args:
        pairs: `b`, `h`, `q` and `kv` as int64 tensors that broadcast.
        visible: bool, which of them are visible; it broadcasts with them.
        score: the program.
        inputs: the values of its slots, on the pairs' device.

    Raises:
        MaskIndexError: as `check`.
        ArgumentError: likewise.
    """
    inside = _inside(score)
    if inside is None:
        return
    there = compute(inside, _with_sizes(inputs), pairs)[0]
    if bool(there.all()):
        return
    wrong, *places = torch.broadcast_tensors(visible & ~there, *pairs.values())
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0])
        _fail_at({name: x[first] for name, x in zip(pairs, places, strict=True)}, score, inputs)


def _with_sizes(inputs: Inputs) -> Inputs:
    """The inputs of `_inside`, of those of the score."""
    sizes = tuple(size for table in inputs.tables for size in table.shape)
    return Inputs((*inputs.params, *sizes), inputs.tables)


def _fail(problem: Problem, kinds: torch.Tensor, score: Expr, inputs: Inputs) -> None:
    """Raise for the first visible pair, by tiles, whose look-ups are not all there."""
    b, h, i, j = (kinds < 2).nonzero()[0].tolist()
    rows, columns = problem.block_size
    q = torch.arange(i * rows, min((i + 1) * rows, problem.q_len))[:, None]
    kv = torch.arange(j * columns, min((j + 1) * columns, problem.kv_len))
    place = torch.tensor(b), torch.tensor(h)
    row, column = (~problem.visible(*place, q, kv)).nonzero()[0].tolist()
    _fail_at(problem.indices(*place, q[row], kv[column]), score, inputs)


def _fail_at(pairs: Mapping[str, Tensor], score: Expr, inputs: Inputs) -> None:
    """Raise for one pair, whose look-ups are not all there."""
    tables = tuple(table.detach().cpu() for table in inputs.tables)
    for value in (0.0, math.inf, -math.inf):  # conditions on the score guard nothing
        raise_if_reached(score, Inputs(inputs.params, tables), {**pairs, "score": torch.tensor(value)})
    at = ", ".join(f"{name}={int(index)}" for name, index in pairs.items())
    raise MaskIndexError(f"the score function reads an index that a table doesn't have at {at}")


def _unless_hidden(problem: Problem, inside: Expr, inputs: Inputs) -> tuple[Expr, Inputs]:
    """The mask of pairs that are hidden, or inside."""
    builder = Builder()
    visible = builder.append(problem.expr)
    moved = {"param": len(problem.inputs.params), "lookup": len(problem.inputs.tables)}

    def renamed(node: Node) -> Node:
        return replace(node, value=node.slot + moved[node.op]) if node.op in moved else node

    root = builder.add("or", builder.add("not", visible), builder.append(inside, renamed))
    params, tables = (
        (*one, *other)
        for one, other in ((problem.inputs.params, inputs.params), (problem.inputs.tables, inputs.tables))
    )
    return simplify(builder.finish(root)), Inputs(params, tables)


@lru_cache(maxsize=256)
def _inside(score: Expr) -> Expr | None:
    """The mask of pairs whose look-ups are all there; None where nothing can be amiss.

    The sizes of all tables, one after the other, are its params after those of the score.
    """
    writer = _Insides(score)
    found = writer.found()
    return None if found is None else simplify(writer.finish(found))


class _Insides(Builder):
    """Writes, for each node of a score, the truth of all being there that it is made of."""

    def __init__(self, score: Expr) -> None:
        super().__init__()
        self._score = score
        self._numbers = self._sizes()

    def _sizes(self) -> dict[tuple[int, int], int]:
        """The number of the param that holds the size of a table's axis."""
        ranks = {node.slot: len(node.args) for node in self._score.nodes if node.op == "lookup"}
        axes = [(slot, axis) for slot in sorted(ranks) for axis in range(ranks[slot])]
        return {axis: number for number, axis in enumerate(axes, self._score.slots("param"))}

    def found(self) -> int | None:
        """The truth of the whole."""
        nodes = self._score.nodes
        places: list[int | None] = []  # None: depends on the score
        sound: list[int | None] = []  # None: nothing can be amiss
        for position, node in enumerate(nodes):
            args = [places[arg] for arg in node.args]
            known = [arg for arg in args if arg is not None]
            whole = node.op != "score" and len(known) == len(args)
            source = self._score.source(position)
            sound.append(self._sound(node, args, [sound[arg] for arg in node.args]))
            places.append(
                self.add(node.op, *known, dtype=node.dtype, weak=node.weak, value=node.value, source=source)
                if whole
                else None
            )
        return sound[-1]

    def _sound(self, node: Node, args: list[int | None], parts: list[int | None]) -> int | None:
        first = args[0] if args else None
        if node.op == "select" and first is not None:
            true = self.const(True)
            ways = [true if part is None else part for part in parts[1:]]
            chosen = None if ways == [true, true] else self.add("select", first, *ways, dtype=torch.bool, weak=False)
            return self._all([parts[0], chosen])
        if node.op in ("and", "or") and first is not None and parts[1] is not None:
            skipped = self.add("not", first) if node.op == "and" else first
            return self._all([parts[0], self.add("or", skipped, parts[1])])
        found = self._all(parts)
        if node.op == "lookup":
            for axis, arg in enumerate(args):
                if arg is None:
                    raise ArgumentError(
                        "attention: the score function looks a table up at an index that depends on the score; "
                        "choose between look-ups by torch.where instead"
                    )
                size = self.add("param", dtype=torch.int64, weak=True, value=self._numbers[node.slot, axis])
                index = self.add("cast", arg, dtype=torch.int64, weak=False)
                low, high = self.add("ge", index, self.add("neg", size)), self.add("lt", index, size)
                found = self._all([found, self.add("and", low, high)])
        elif OPERATIONS[node.op].faults and not node.dtype.is_floating_point and args[1] is not None:
            found = self._all([found, self.add("ne", args[1], self.const(0))])
        return found

    def _all(self, parts: list[int | None]) -> int | None:
        """The truth of all of them, each looked at only where those before it hold."""
        places = [part for part in parts if part is not None]
        if not places:
            return None
        found = places[0]
        for place in places[1:]:
            found = self.add("and", found, place)
        return found
