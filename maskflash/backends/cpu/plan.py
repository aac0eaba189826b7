"""What a mask's rows see -> a Plan: their exact geometry, once; schedules of calls of it, as needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows
from maskflash.analysis.rows import Evaluate, Strip, row_spans
from maskflash.analysis.runs import IntArray
from maskflash.analysis.seen import Seen
from maskflash.backends.cpu.calls import Bits, Call
from maskflash.backends.cpu.costs import TABLE_WORK, TILED, Costs, Pass, candidates
from maskflash.backends.cpu.cover import cost_of, cover_segments, find_segments
from maskflash.backends.cpu.layers import Layers
from maskflash.backends.cpu.matrices import Masks
from maskflash.backends.cpu.schedules import Schedule, chained
from maskflash.backends.cpu.strips import StripMerger
from maskflash.ground.copies import lasting

_MANY_PAIRS: Final = 1 << 19  # in partial tiles: fewer are evaluated sooner than it is found what rows see
_MAX_STORED_BITS: Final = 256 << 20  # bytes of packed bits per plan; beyond it, the mask is evaluated per call


@dataclass(slots=True, eq=False)
class Plan:
    """How to run a block map on the CPU; reusable across calls, dtypes and head dims.

    Attributes:
        block_map: what it was made from.
        evaluate: the mask, for calls whose bits were too many to keep; None where all were kept.
        segments: of regular rows, per (b, h) of the mask and layer: a row's further intervals are in further layers.
        strips: calls for irregular rows, per (b, h) of the mask.
    """

    block_map: BlockMap
    evaluate: Evaluate | None
    segments: dict[tuple[int, int], list[IntArray]]
    strips: dict[tuple[int, int], list[Call]]
    _masks: Masks = field(init=False)
    _schedules: dict[tuple[Pass, torch.dtype, int], Schedule] = field(default_factory=dict)
    _biased: dict[int, Schedule] = field(default_factory=dict)
    _tiled: dict[Pass, Schedule] = field(default_factory=dict)
    _read: dict[Pass, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _soles: dict[tuple[torch.dtype, int], Call | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._masks = Masks(self.evaluate)

    def schedule(self, pass_: Pass, dtype: torch.dtype, work: int) -> Schedule:
        """The cheapest calls for one pass, all in one dtype; found once for each power of four of work.

        Args:
            pass_: "forward" or "backward".
            dtype: of q, k and v.
            work: heads x head dim that one call computes.
        """
        power = _power(work)
        key = (pass_, dtype, power)
        found = self._schedules.get(key)
        if found is None:
            with lasting():
                options = [self._made(pass_, costs.for_work(4**power)) for costs in candidates(pass_, dtype)]
                # A native call rounds what it returns, so rows in several calls would be rounded several times.
                allowed = [s for s in options if not (dtype.itemsize == 2 and s.native and s.merges)]
                found = self._schedules[key] = min(allowed, key=lambda s: s.cost)
                self._masks.expect(found.all_calls())
        return found

    def biased(self, dtype: torch.dtype, work: int) -> Schedule:
        """The cheapest calls of forward in float32 or float64, each of which takes a bias."""
        power = _power(work)
        if power not in self._biased:
            with lasting():
                (costs,) = candidates("forward", dtype)
                self._biased[power] = self._made("forward", replace(costs.for_work(4**power), flag=False))
        return self._biased[power]

    def tiled(self, pass_: Pass) -> Schedule:
        """The calls of one pass by our own tiles, for any dtype and work."""
        if pass_ not in self._tiled:
            with lasting():
                self._tiled[pass_] = self._made(pass_, TILED)
        return self._tiled[pass_]

    def read(self, pass_: Pass) -> tuple[Tensor, Tensor]:
        """Which rows and which columns are in some call by our own tiles: others may hold anything.

        Returns:
            Bool (b, h, Sq) and (b, h, Skv), b and h those of the mask.
        """
        if pass_ not in self._read:
            with lasting():
                sides = [torch.zeros(*self.block_map.shape[:2], n, dtype=torch.bool) for n in self._lengths]
                for unit, chains in self.tiled(pass_).chains.items():
                    for call in (call for chain in chains for call in chain.calls):
                        for side, pick in zip(sides, (call.rows, call.columns), strict=True):
                            side[unit][pick.tokens()] = True
                self._read[pass_] = sides[0], sides[1]
        return self._read[pass_]

    def tile(self, call: Call, rows: slice, columns: slice) -> Tensor | None:
        """A part of the call's mask, see `Masks.tile`."""
        return self._masks.tile(call, rows, columns)

    def sole(self, dtype: torch.dtype, work: int) -> Call | None:
        """The call that computes all rows of everything, if it is the cheapest way of both passes in this dtype.

        Every small call asks for it, and one look-up is half the time of two schedules.
        """
        key = (dtype, _power(work))
        if key not in self._soles:
            forward, backward = self.schedule("forward", dtype, work), self.schedule("backward", dtype, work)
            whole = forward.native and backward.native and backward.only is not None
            self._soles[key] = forward.only if whole else None
        return self._soles[key]

    def work(self, batch: int, heads: int, head_dim: int) -> int:
        """Heads x head dim of one call."""
        own_batch, own_heads = self.block_map.shape[:2]
        return (batch if own_batch == 1 else 1) * (heads if own_heads == 1 else 1) * head_dim

    def additive(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The call's mask as the kernel wants it: (R, S) of 0 and -inf, last stride 1; None where it needs none."""
        return self._masks.additive(call, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held: geometry, bits, and what schedules and matrices were made so far."""
        geometry = sum(s.nbytes for layers in self.segments.values() for s in layers)
        calls = {id(c): c for of_unit in self.strips.values() for c in of_unit}
        calls.update((id(c), c) for s in self._schedules.values() for c in s.all_calls())
        read = sum(side.nbytes for sides in self._read.values() for side in sides)
        return geometry + sum(c.nbytes for c in calls.values()) + self._masks.nbytes + read

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.block_map.q_len, self.block_map.kv_len

    def describe(self, pass_: Pass, dtype: torch.dtype, work: int = 512) -> dict[str, int | str]:
        """What one pass does: calls, how many are masked or gathered, pairs covered, compute dtype."""
        schedule = self.schedule(pass_, dtype, work)
        calls = list(schedule.all_calls())
        return {
            "calls": len(calls),
            "masked": sum(c.mask is not None for c in calls),
            "gathered": sum(c.columns.index is not None or c.rows.index is not None for c in calls),
            "pairs": sum(c.pairs for c in calls),
            "compute": str(dtype if schedule.native else torch.float32).removeprefix("torch."),
        }

    def _made(self, pass_: Pass, costs: Costs) -> Schedule:
        chains = {
            unit: chained(_covered(layers, costs) + self.strips[unit], pass_, partial(cost_of, costs=costs))
            for unit, layers in self.segments.items()
        }
        return Schedule.of(costs.native, chains, self.block_map.q_len)


def _power(work: int) -> int:
    """Of four; works of about the same one share a schedule, since overheads matter to a factor of a few."""
    return round(math.log2(work) / 2) if work > 1 else 0


def _covered(layers: list[IntArray], costs: Costs) -> list[Call]:
    """Calls that cover the layers, in their order: every layer after the first merges with what is there."""
    first, *further = (cover_segments(segments, costs) for segments in layers)
    return first + [replace(call, merges=True) for calls in further for call in calls]


def plan(seen: Seen) -> Plan:
    """Finds the exact geometry of a mask, ready to be scheduled.

    Args:
        seen: what its rows see, and the tiles; the mask is evaluated only where these don't tell.

    Returns:
        A plan that forward and backward take, for any dtype and head dim.
    """
    block_map, evaluate, rows = seen.block_map, seen.problem.visible, _rows(seen)
    segments: dict[tuple[int, int], list[IntArray]] = {}
    strips: dict[tuple[int, int], list[Call]] = {}
    stored = 0
    # A mask with heads of its own is computed head by head: a guess is enough to plan strips by.
    work = TABLE_WORK if block_map.shape[1] == 1 else TABLE_WORK // 8
    for b in range(block_map.shape[0]):
        for h in range(block_map.shape[1]):
            layers = Layers(block_map.q_len)
            merger = StripMerger(b, h, block_map.kv_len, _MAX_STORED_BITS - stored, work)
            take = partial(_take, layers, merger)
            spans = row_spans(block_map, evaluate, b, h, take, layers.take_lines, rows)
            segments[b, h] = [find_segments(layer) for layer in layers.joined(spans)]
            strips[b, h] = merger.finish()
            stored += sum(call.nbytes for call in strips[b, h])
    masks = (call.mask for calls in strips.values() for call in calls)
    # A plan may outlive its mask's tensors: it holds on to the mask only where it will evaluate it again.
    again = any(isinstance(mask, Bits) and mask.packed is None for mask in masks)
    return Plan(block_map, evaluate if again else None, segments, strips)


def _rows(seen: Seen) -> Rows | None:
    """What rows see, if that is known or found sooner than by evaluating partial tiles."""
    known = seen.decided["pairs"] or seen.decided["intervals"]
    pairs = seen.block_map.counts["partial"] * math.prod(seen.block_map.block_size)
    return seen.rows() if known or pairs > _MANY_PAIRS else None


def _take(layers: Layers, merger: StripMerger, strip: Strip) -> None:
    """Hands a strip to the layers if its rows see few intervals, else to the merger."""
    if not layers.take(strip):
        merger.take(strip)
