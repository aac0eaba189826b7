"""A problem whose mask joins conditions that other ways decide -> its map: theirs joined, and few pairs looked at.

    near[cell[q], cell[kv]]   and   q >= kv
            ▒ █ ·                    ▒ · ·           ? · ·
            █ ▒ ▒                    █ ▒ ·    ->     █ ? ·
            · ▒ █                    █ █ ▒           · ▒ ▒

What one condition hides whole is hidden, and where all but one see everything, that one decides. Only where two of them
are partial (?), which is along the boundaries of both, pairs are sampled or evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.analysis.ways.separate import one_sided
from maskflash.analysis.ways.tiles import Tiles
from maskflash.errors import MaskIndexError
from maskflash.expr.nodes import Builder, Expr

Decide = Callable[[Problem], BlockMap | None]
_Kinds = npt.NDArray[np.int8]

_OPEN: Final = 3  # what the parts don't tell
_MOST_TILES: Final = 1 << 26  # each has an entry here
_MOST_PARTS: Final = 16
_NOT: Final = ("not", "bitnot")
_AND: Final = ("and", "bitand")
_OR: Final = ("or", "bitor")
_DEEPEST: Final = 4  # `and` inside `or` inside `and` ...
_HIDES: Final = np.array([FULL, PARTIAL, SKIP, _OPEN], dtype=np.int8)  # what `not` makes of each kind
_BOTH: Final = np.array(  # what `and` makes of two
    [
        [SKIP, SKIP, SKIP, SKIP],
        [SKIP, _OPEN, PARTIAL, _OPEN],
        [SKIP, PARTIAL, FULL, _OPEN],
        [SKIP, _OPEN, _OPEN, _OPEN],
    ],
    dtype=np.int8,
)


def join_parts(problem: Problem, decide: Decide) -> BlockMap | None:
    """The map of a problem whose mask is conditions joined by `and`, `or` and `not`.

    Args:
        problem: what is asked, on the CPU.
        decide: finds the map of a condition; None where it can't.

    Returns:
        The map; None where some condition has none, or may fail where another would have guarded it.
    """
    if math.prod(problem.shape) > _MOST_TILES:
        return None
    try:
        known = _joined(problem, decide, _DEEPEST)
    except MaskIndexError:  # whether a guard holds is a question about pairs
        return None
    if known is None:
        return None
    left = Tiles(problem)
    left.look(torch.from_numpy(np.argwhere(known == _OPEN)))
    kinds = np.where(known == _OPEN, left.block_map().kinds().numpy(), known)
    return BlockMap.from_kinds(torch.from_numpy(kinds), problem.q_len, problem.kv_len, problem.block_size)


def _joined(problem: Problem, decide: Decide, depth: int) -> _Kinds | None:
    """The kinds of a problem's tiles, as far as its parts tell; None where some part doesn't."""
    found = _operands(problem.expr)
    if found is None or depth == 0 or len(found[0]) > _MOST_PARTS:
        return None
    operands, negated = found
    lines = [operand for operand in operands if _reads_an_index(operand[0])]
    others = [operand for operand in operands if operand not in lines]
    known: list[_Kinds] = []
    for bundle in filter(None, (lines, others)):
        # Together they may have a formula, or groups, which tell more than one by one.
        whole = len(bundle) < len(operands) and decide(replace(problem, expr=_conjunction(bundle)))
        if whole:
            known.append(whole.kinds().numpy())
            continue
        for part, hides in bundle:
            kinds = _of_part(replace(problem, expr=part), decide, depth)
            if kinds is None:
                return None
            known.append(_HIDES[kinds] if hides else kinds)
    kinds = reduce(lambda x, y: _BOTH[x, y], known)
    return np.broadcast_to(_HIDES[kinds] if negated else kinds, problem.shape)


def _reads_an_index(expr: Expr) -> bool:
    """Whether rows or columns meet as they are in a condition: then no two are alike."""
    return any(part.nodes[-1].op in ("q", "kv") for side in one_sided(expr) for part in side)


def _of_part(problem: Problem, decide: Decide, depth: int) -> _Kinds | None:
    found = decide(problem)
    return _joined(problem, decide, depth - 1) if found is None else found.kinds().numpy()


def _operands(expr: Expr) -> tuple[list[tuple[Expr, bool]], bool] | None:
    """Conditions, each with whether it is negated, and whether the expression is their `and` or its opposite.

    `x or y` is the opposite of `not x and not y`. None where conditions aren't joined.
    """
    nodes = expr.nodes
    root, opposite = len(nodes) - 1, False
    while nodes[root].op in _NOT:
        root, opposite = nodes[root].args[0], not opposite
    if nodes[root].op not in (*_AND, *_OR):
        return None
    opposite ^= nodes[root].op in _OR
    leaves: dict[tuple[int, bool], None] = {}
    stack = [(root, nodes[root].op in _OR)]
    while stack:
        position, negated = stack.pop()
        node = nodes[position]
        truths = node.dtype == torch.bool and all(nodes[arg].dtype == torch.bool for arg in node.args)
        if truths and node.op in (*_NOT, *(_OR if negated else _AND)):
            stack += [(arg, negated ^ (node.op in _NOT)) for arg in reversed(node.args)]
        elif position == root:
            return None
        else:
            leaves[position, negated] = None
    return [(expr.part(position), negated) for position, negated in leaves], opposite


def _conjunction(operands: list[tuple[Expr, bool]]) -> Expr:
    """All of these conditions, as one expression."""
    builder = Builder()
    places = [(builder.append(part), negated) for part, negated in operands]
    truths = [builder.add("not", place) if negated else place for place, negated in places]
    return builder.finish(reduce(lambda x, y: builder.add("and", x, y), truths))
