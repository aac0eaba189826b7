"""A problem -> what its rows see, and its block map: exactly the brute-force one, by the cheapest way that applies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.facts import Facts
from maskflash.analysis.problem import Problem
from maskflash.analysis.seen import DECIDERS, Seen
from maskflash.analysis.ways.coverage import cover
from maskflash.analysis.ways.ends import map_of_intervals
from maskflash.analysis.ways.meets import find_meets
from maskflash.analysis.ways.parts import join_parts
from maskflash.analysis.ways.tiles import Tiles
from maskflash.ground import arguments

Way = Callable[[Facts], Seen | None]
"""Finds what rows see; None where it doesn't apply."""

_MANY_TILES: Final = 1 << 16  # from here on, bounding costs more than cutting the columns
_PAIRS_FOR_A_PIECE: Final = 16  # evaluated for what a piece of a column costs
_NOBODY: Final = dict.fromkeys(DECIDERS, 0)


def by_pairs(facts: Facts) -> Seen | None:
    """All pairs of few rows, or of none."""
    problem = facts.problem
    if 0 in problem.shape:
        kinds = torch.zeros(problem.shape, dtype=torch.int8)
        return _whole("pairs", facts, BlockMap.from_kinds(kinds, problem.q_len, problem.kv_len, problem.block_size))
    return None if facts.pairs is None else _whole("pairs", facts, facts.pairs.block_map)


def by_lines(facts: Facts) -> Seen | None:
    """Formulas, where the mask compares only q, kv and q - kv with numbers."""
    return None if facts.formula is None else _whole("formula", facts, facts.formula.block_map())


def by_ends(facts: Facts) -> Seen | None:
    """The ends of each row's interval, where the mask is comparisons joined by `and`."""
    block_map = None if facts.intervals is None else map_of_intervals(facts.problem, facts.intervals)
    return None if block_map is None else _whole("intervals", facts, block_map)


def by_groups(facts: Facts) -> Seen | None:
    """Pairs of groups of rows and of columns, where these are few."""
    return None if facts.groups is None else _whole("groups", facts, facts.groups.block_map())


def by_columns(facts: Facts) -> Seen | None:
    """Columns cut into pieces, or else rows, where the mask compares rows with columns."""
    if facts.pieces is not None:
        return _whole("columns", facts, cover(facts.pieces))
    if facts.pieces_of_rows is not None:
        return _whole("columns", facts, cover(facts.pieces_of_rows).turned())
    return None


CONDITION_WAYS: Final[tuple[Way, ...]] = (by_lines, by_ends, by_groups, by_columns)
"""How a condition among others is decided: without a look at its tiles."""


def by_parts(facts: Facts, ways: Sequence[Way] = CONDITION_WAYS) -> Seen | None:
    """Conditions joined by `and`, `or` and `not`, each decided by its own way."""

    def decide(condition: Problem) -> BlockMap | None:
        found = _first(Facts(condition), ways)
        return None if found is None else found.block_map

    block_map = join_parts(facts.problem, decide)
    return None if block_map is None else _whole("parts", facts, block_map)


def by_tiles(facts: Facts, otherwise: Sequence[Way] = (by_columns, by_parts)) -> Seen | None:
    """Tiles, coarse to fine.

    Args:
        facts: of what is asked.
        otherwise: ways of which the first that applies is taken where tiles, or the pairs to evaluate, are many.
    """
    problem = facts.problem
    batch, heads = problem.shape[:2]
    other = cache(lambda: _first(facts, otherwise))
    if math.prod(problem.shape) > _MANY_TILES and (found := other()):
        return found
    most = _PAIRS_FOR_A_PIECE * batch * heads * problem.kv_len
    tiles = Tiles(problem)
    tiles.meets = find_meets(problem, tiles.undecided)
    if not tiles.settle(lambda pairs: pairs <= most or other() is None):
        return other()
    evaluated = torch.cat([torch.zeros(0, 4, dtype=torch.int64), *tiles.evaluated])
    counts = {"samples": tiles.by_samples, "elements": len(evaluated)}
    counts["bounds"] = math.prod(problem.shape) - sum(counts.values())
    return Seen(facts, tiles.block_map(), _NOBODY | counts, evaluated)


WAYS: Final[tuple[Way, ...]] = (by_pairs, by_lines, by_ends, by_groups, by_tiles)
"""Cheapest first. The last one always applies: it takes columns and parts where these cost less."""


def classify(problem: Problem, ways: Sequence[Way] = WAYS) -> Seen:
    """Find what rows see, and the kind of every tile.

    Args:
        problem: what is asked; it is analysed on the CPU, wherever it is.
        ways: to take, the first that applies.

    Returns:
        What was found, with a map equal to evaluating every pair.

    Raises:
        MaskIndexError: a pair inside the lengths reads out of range, or divides by zero, and no guard excludes it.
    """
    return see(Facts(problem.on_host()), ways)


def see(facts: Facts, ways: Sequence[Way] = WAYS) -> Seen:
    """The same of a problem of which some facts may be known."""
    for name in ("q_offset", "kv_offset"):
        if isinstance(offset := getattr(facts.problem, name), Tensor):
            arguments.offsets_in_range("attention", offset, name)
    found = _first(facts, ways)
    assert found is not None, "the last way always applies"
    return found


def _first(facts: Facts, ways: Sequence[Way]) -> Seen | None:
    """What the first way that applies finds."""
    for way in ways:
        if (found := way(facts)) is not None:
            return found
    return None


def _whole(decider: str, facts: Facts, block_map: BlockMap) -> Seen:
    """A map that one means decided all of."""
    return Seen(facts, block_map, _NOBODY | {decider: math.prod(block_map.shape)})
