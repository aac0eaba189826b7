"""What a mask's rows see -> a Plan: exact geometry once, then schedules of dense-kernel calls as needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows
from maskflash.analysis.rows import Evaluate, Strip, row_spans
from maskflash.analysis.seen import Seen
from maskflash.backends.cpu.calls import Band, Bits, Call, Intervals, Schedule, additive, chained, spread
from maskflash.backends.cpu.costs import TABLE_WORK, Costs, Pass, candidates
from maskflash.backends.cpu.cover import Segments, cost_of, cover, find_segments
from maskflash.backends.cpu.layers import Layers
from maskflash.backends.cpu.strips import StripMerger
from maskflash.ground.copies import lasting

_MANY_PAIRS: Final = 1 << 19  # in partial tiles: fewer are evaluated sooner than it is found what rows see
_MAX_STORED_BITS: Final = 256 << 20  # bytes of packed bits per plan; beyond it, the mask is evaluated per call
_MAX_KEPT_PAIRS: Final = 1 << 16  # of one call whose mask is kept
_MAX_KEPT_MASKS: Final = 16
_MAX_SHARED_BANDS: Final = 8  # matrices kept; two-sided bands share one only with bands of their own width


@dataclass(slots=True, eq=False)
class Plan:
    """How to run a block map on the CPU; reusable across calls, dtypes and head dims.

    Attributes:
        block_map: what it was made from.
        evaluate: the mask, for calls whose bits were too many to keep; None where all were kept.
        segments: regular rows, per (b, h) of the mask and layer: a row's further intervals are in further layers.
        strips: calls for irregular rows, per (b, h) of the mask.
    """

    block_map: BlockMap
    evaluate: Evaluate | None
    segments: dict[tuple[int, int], list[Segments]]
    strips: dict[tuple[int, int], list[Call]]
    _schedules: dict[tuple[Pass, bool, int], Schedule] = field(default_factory=dict)
    _chosen: dict[tuple[Pass, torch.dtype, int], Schedule] = field(default_factory=dict)
    _sole: dict[tuple[torch.dtype, int, int, int], Call | None] = field(default_factory=dict)
    _band_sizes: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)
    _masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    _bands: dict[tuple[tuple[int, int, int], torch.dtype], Tensor] = field(default_factory=dict)

    def schedule(self, pass_: Pass, dtype: torch.dtype, work: int) -> Schedule:
        """The cheapest calls for one pass, all in one dtype; half types are merged from float32 only.

        Args:
            pass_: "forward" or "backward".
            dtype: of q, k and v.
            work: heads x head dim that one call computes.
        """
        key = (pass_, dtype, work)
        found = self._chosen.get(key)
        if found is None:
            with lasting():
                found = self._chosen[key] = self._choose(pass_, dtype, work)
        return found

    def sole(self, dtype: torch.dtype, batch: int, heads: int, head_dim: int) -> Call | None:
        """The call that computes all rows of everything, if it is the cheapest way of both passes in this dtype."""
        key = (dtype, batch, heads, head_dim)
        if key not in self._sole:
            self._sole[key] = self._find_sole(dtype, self.work(batch, heads, head_dim))
        return self._sole[key]

    def _find_sole(self, dtype: torch.dtype, work: int) -> Call | None:
        forward, backward = self.schedule("forward", dtype, work), self.schedule("backward", dtype, work)
        if not (forward.native and backward.native) or backward.only(self.block_map.q_len) is None:
            return None
        return forward.only(self.block_map.q_len)

    def work(self, batch: int, heads: int, head_dim: int) -> int:
        """Heads x head dim of one call."""
        own_batch, own_heads = self.block_map.shape[:2]
        return (batch if own_batch == 1 else 1) * (heads if own_heads == 1 else 1) * head_dim

    def _choose(self, pass_: Pass, dtype: torch.dtype, work: int) -> Schedule:
        # Overheads matter to a factor of a few; schedules are shared between works of the same power of four.
        bucket = 4 ** max(round(np.log2(max(work, 1)) / 2), 0)
        options = [self._scheduled(pass_, costs, bucket, dtype) for costs in candidates(pass_, dtype)]
        # A native call rounds what it returns, so rows in several calls would be rounded several times.
        allowed = [s for s in options if not (dtype.itemsize == 2 and s.native and s.merges)]
        return min(allowed, key=lambda s: s.cost)

    def _scheduled(self, pass_: Pass, costs: Costs, work: int, dtype: torch.dtype) -> Schedule:
        # float32 costs hold for float64 and for widened half types: one schedule serves them all.
        key = (pass_, costs.native and dtype.itemsize == 2, work)
        if key not in self._schedules:
            costs = costs.for_work(work)
            chains = {
                unit: chained(_covered(layers, costs) + self.strips[unit], pass_, partial(cost_of, costs=costs))
                for unit, layers in self.segments.items()
            }
            cost = sum(chain.cost for of_unit in chains.values() for chain in of_unit)
            self._schedules[key] = Schedule(costs.native, chains, cost)
            self._size_bands(self._schedules[key].all_calls())
        found = self._schedules[key]
        return found if found.native == costs.native else replace(found, native=costs.native)

    def additive(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The call's mask as the kernel wants it: (R, S) of 0 and -inf, last stride 1; None where it needs none."""
        mask, columns = call.mask, len(call.columns)
        if isinstance(mask, Band):
            return self._band(mask, len(call.rows), columns, dtype)
        if isinstance(mask, Intervals):
            return self._kept(call, dtype, lambda: additive(mask.visible(columns), dtype))
        if isinstance(mask, Bits):
            if mask.packed is not None:
                packed = mask.packed
                return self._kept(call, dtype, lambda: spread(packed, columns, dtype))
            return additive(self._evaluated(mask, call), dtype)
        return None

    def _kept(self, call: Call, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The mask of a call small enough that making it again costs more than keeping it."""
        if call.pairs > _MAX_KEPT_PAIRS or len(self._masks) >= _MAX_KEPT_MASKS:
            return make()
        key = (id(call), dtype)  # calls live as long as the plan
        if key not in self._masks:
            with lasting():
                self._masks[key] = make()
        return self._masks[key]

    def _evaluated(self, mask: Bits, call: Call) -> Tensor:
        """The call's visible pairs: (R, S) bool."""
        assert self.evaluate is not None, "plan() keeps the mask of a plan that has bits to evaluate"
        q, kv = call.rows.tokens()[:, None], call.columns.tokens()
        visible = self.evaluate(torch.tensor(mask.b), torch.tensor(mask.h), q, kv)
        return visible.expand(len(call.rows), len(call.columns))

    def _size_bands(self, calls: Iterable[Call]) -> None:
        """Makes room in the shared matrices for the bands of new calls."""
        for call in calls:
            if isinstance(call.mask, Band):
                kind = call.mask.kind
                if len(self._band_sizes) < _MAX_SHARED_BANDS or kind in self._band_sizes:
                    rows, width = self._band_sizes.get(kind, (0, 0))
                    self._band_sizes[kind] = (max(rows, len(call.rows)), max(width, call.mask.width))

    def _band(self, band: Band, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A slice of the shared matrix of the band's kind."""
        if band.kind not in self._band_sizes:
            return band.matrix(rows, dtype)[:, :columns]
        height, width = self._band_sizes[band.kind]
        matrix = self._bands.get((band.kind, dtype))
        if matrix is None or matrix.shape != (height, width + height):
            with lasting():
                matrix = Band(band.start_step, band.stop_step, width).matrix(height, dtype)
            self._bands[band.kind, dtype] = matrix
        # Where only the right edge moves, a narrower band is the wide one seen from further right.
        left = width - band.width if band.start_step == 0 else 0
        return matrix[:rows, left : left + columns]

    @property
    def nbytes(self) -> int:
        """Bytes held: geometry, bits, and what schedules and shared masks were made so far."""
        calls = {id(c): c for calls in self.strips.values() for c in calls}
        calls.update((id(c), c) for s in self._schedules.values() for c in s.all_calls())
        return (
            sum(s.nbytes for layers in self.segments.values() for s in layers)
            + sum(c.nbytes for c in calls.values())
            + sum(m.nbytes for m in (*self._bands.values(), *self._masks.values()))
        )

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


def plan(seen: Seen) -> Plan:
    """Finds the exact geometry of a mask, ready to be scheduled.

    Args:
        seen: what its rows see, and the tiles; the mask is evaluated only where these don't tell.

    Returns:
        A plan that forward and backward take, for any dtype and head dim.
    """
    block_map, evaluate, rows = seen.block_map, seen.problem.visible, _rows(seen)
    segments: dict[tuple[int, int], list[Segments]] = {}
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


def _covered(layers: list[Segments], costs: Costs) -> list[Call]:
    """Calls that cover the layers, in their order: every layer after the first merges with what is there."""
    first, *further = (cover(segments, costs) for segments in layers)
    return first + [replace(call, merges=True) for calls in further for call in calls]
