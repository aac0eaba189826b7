"""Turns exact geometry (what each row sees) into a list of dense-kernel calls that covers it, at the least cost.

A call is rows x columns x mask. Rows that see nothing and columns that no row of the call sees are in no call, so
what they hold can't matter. Where the mask is a rectangle there is no mask; where each row's interval moves by one
token per row, a slice of one shared matrix masks any number of calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.spans import BoolArray, Evaluate, IntArray, RowSpans, Strip, row_spans
from maskflash.kernels.cpu_costs import Costs, Pass, candidates

_MAX_BAND_BYTES: Final = 64 << 20  # of one shared mask matrix
_MAX_STORED_BITS: Final = 256 << 20  # bytes of packed bits per plan; beyond it the mask is evaluated again per call
_MAX_MERGED_ROWS: Final = 256
_STRIP_ROWS: Final = 128  # rows of a call with irregular bits
_MAX_STRIP_CUTS: Final = 8  # strips that change more often are cut every _FINEST_CUT rows
_FINEST_CUT: Final = 32
_MAX_SHARED_WIDTHS: Final = 8  # two-sided bands share a matrix only with bands of their own width


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """Which tokens of a sequence: the slice start to stop, or the ascending int64 index where it has gaps."""

    start: int
    stop: int
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start if self.index is None else len(self.index)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """The picked tokens of x: a view where they are a slice, else a copy."""
        if self.index is None:
            return x.narrow(dim, self.start, self.stop - self.start)
        return x.index_select(dim, self.index)

    def tokens(self) -> Tensor:
        """The token numbers: (len,) int64."""
        return torch.arange(self.start, self.stop) if self.index is None else self.index

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return 0 if self.index is None else self.index.nbytes


@dataclass(frozen=True, slots=True)
class Band:
    """Row t of the call sees the columns start_step·t <= x < width + stop_step·t; the steps are 0 or 1, not both 0."""

    start_step: int
    stop_step: int
    width: int

    @property
    def kind(self) -> tuple[int, int, int]:
        """Bands of one kind are slices of one matrix; two edges that move fix its width, one edge doesn't."""
        return self.start_step, self.stop_step, self.width if self.start_step == self.stop_step else 0


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Row t of the call sees the columns start[t] <= x < stop[t]; both (R, 1) int32."""

    start: Tensor
    stop: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """Row t of the call sees the columns whose bit is set; packed (R, ceil(S/8)) uint8, highest bit first.

    Without packed bits the mask is evaluated again for (b, h) of the mask.
    """

    packed: Tensor | None
    b: int
    h: int


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One dense-kernel call; mask None means that every row sees every column."""

    rows: Pick
    columns: Pick
    mask: Band | Intervals | Bits | None

    @property
    def nbytes(self) -> int:
        """Bytes of the call's tensors."""
        mask = self.mask
        held = self.rows.nbytes + self.columns.nbytes
        if isinstance(mask, Intervals):
            held += mask.start.nbytes + mask.stop.nbytes
        if isinstance(mask, Bits) and mask.packed is not None:
            held += mask.packed.nbytes
        return held


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The calls of one pass.

    Attributes:
        native: compute in the tensors' own dtype, else in float32.
        calls: per (b, h) of the mask, its calls.
        cost: predicted, in pairs.
    """

    native: bool
    calls: dict[tuple[int, int], list[Call]]
    cost: float

    def all_calls(self) -> Iterable[Call]:
        """Every call, in order."""
        return (call for calls in self.calls.values() for call in calls)


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Runs of rows whose interval starts and ends each stay or each move one token per row.

    All (n,) int64: rows row to row + rows; the first sees start to stop; start_step and stop_step are 0 or 1.
    """

    row: IntArray
    rows: IntArray
    start: IntArray
    stop: IntArray
    start_step: IntArray
    stop_step: IntArray


@dataclass(slots=True, eq=False)
class Plan:
    """How to run a block map on the CPU; reusable across calls, dtypes and head dims.

    Attributes:
        block_map: what it was made from.
        evaluate: the mask, for calls whose bits were too many to keep.
        segments: regular rows, per (b, h) of the mask.
        strips: calls for irregular rows, per (b, h) of the mask.
    """

    block_map: BlockMap
    evaluate: Evaluate
    segments: dict[tuple[int, int], Segments]
    strips: dict[tuple[int, int], list[Call]]
    _schedules: dict[tuple[Pass, bool, int], Schedule] = field(default_factory=dict)
    _band_sizes: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)
    _bands: dict[tuple[tuple[int, int, int], torch.dtype], Tensor] = field(default_factory=dict)

    def schedule(self, pass_: Pass, dtype: torch.dtype, work: int, *, widen: bool = False) -> Schedule:
        """The cheapest calls for one pass.

        Args:
            pass_: "forward" or "backward".
            dtype: of q, k and v.
            work: heads x head dim that one call computes.
            widen: rule out computing half types in their own dtype.
        """
        # Overheads matter to a factor of a few; schedules are shared between works of the same power of four.
        bucket = 4 ** max(round(np.log2(max(work, 1)) / 2), 0)
        options = [c for c in candidates(pass_, dtype) if not (widen and c.native and dtype.itemsize == 2)]
        return min((self._scheduled(pass_, costs, bucket, dtype) for costs in options), key=lambda s: s.cost)

    def _scheduled(self, pass_: Pass, costs: Costs, work: int, dtype: torch.dtype) -> Schedule:
        # float32 costs hold for float64 and for widened half types: one schedule serves them all.
        key = (pass_, costs.native and dtype.itemsize == 2, work)
        if key not in self._schedules:
            costs = costs.for_work(work)
            calls = {
                unit: _cover(segments, costs) + self.strips[unit] for unit, segments in self.segments.items()
            }
            cost = sum(costs.of(len(c.rows), len(c.columns)) for unit in calls.values() for c in unit)
            self._schedules[key] = Schedule(costs.native, calls, cost)
            self._size_bands(self._schedules[key].all_calls())
        found = self._schedules[key]
        return found if found.native == costs.native else Schedule(costs.native, found.calls, found.cost)

    def additive(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The call's mask as the kernel wants it: (R, S) of 0 and -inf, last stride 1; None where all is visible."""
        mask = call.mask
        if mask is None:
            return None
        if isinstance(mask, Band):
            return self._band(mask, len(call.rows), len(call.columns), dtype)
        if isinstance(mask, Intervals):
            x = torch.arange(len(call.columns), dtype=torch.int32)
            visible = (x >= mask.start) & (x < mask.stop)
        elif mask.packed is not None:
            bits = np.unpackbits(mask.packed.numpy(), axis=1, count=len(call.columns))
            visible = torch.from_numpy(bits.view(np.bool_))
        else:
            q, kv = call.rows.tokens()[:, None], call.columns.tokens()
            visible = self.evaluate(torch.tensor(mask.b), torch.tensor(mask.h), q, kv)
            visible = visible.expand(len(call.rows), len(call.columns))
        return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)

    def _size_bands(self, calls: Iterable[Call]) -> None:
        """Makes room in the shared matrices for the bands of new calls."""
        for call in calls:
            if isinstance(call.mask, Band):
                kind = call.mask.kind
                if len(self._band_sizes) < _MAX_SHARED_WIDTHS or kind in self._band_sizes:
                    rows, width = self._band_sizes.get(kind, (0, 0))
                    self._band_sizes[kind] = (max(rows, len(call.rows)), max(width, call.mask.width))

    def _band(self, band: Band, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A slice of the shared matrix of the band's kind."""
        if band.kind not in self._band_sizes:
            return _band_matrix(band, rows, band.width, dtype)[:, :columns]
        size = self._band_sizes[band.kind]
        matrix = self._bands.get((band.kind, dtype))
        if matrix is None or (matrix.shape[0], matrix.shape[1] - matrix.shape[0]) != size:
            matrix = self._bands[band.kind, dtype] = _band_matrix(band, *size, dtype)
        # Where only the right edge moves, a narrower band is the wide one seen from further right.
        left = size[1] - band.width if band.start_step == 0 else 0
        return matrix[:rows, left : left + columns]

    @property
    def nbytes(self) -> int:
        """Bytes held: geometry, bits, and what schedules and shared masks were made so far."""
        held = sum(
            x.nbytes
            for s in self.segments.values()
            for x in (s.row, s.rows, s.start, s.stop, s.start_step, s.stop_step)
        )
        calls = {id(c): c for calls in self.strips.values() for c in calls}
        calls.update((id(c), c) for s in self._schedules.values() for c in s.all_calls())
        return held + sum(c.nbytes for c in calls.values()) + sum(b.nbytes for b in self._bands.values())

    def describe(self, pass_: Pass, dtype: torch.dtype, work: int = 512) -> dict[str, int | str]:
        """What one pass does: number of calls, how many of them are masked or gathered, pairs computed, compute dtype."""
        schedule = self.schedule(pass_, dtype, work)
        calls = list(schedule.all_calls())
        return {
            "calls": len(calls),
            "masked": sum(c.mask is not None for c in calls),
            "gathered": sum(c.columns.index is not None or c.rows.index is not None for c in calls),
            "pairs": sum(len(c.rows) * len(c.columns) for c in calls),
            "compute": str(dtype if schedule.native else torch.float32).removeprefix("torch."),
        }


def plan(block_map: BlockMap, evaluate: Evaluate) -> Plan:
    """Finds the exact geometry of a mask, ready to be scheduled.

    Args:
        block_map: the mask's tiles.
        evaluate: evaluate(b, h, q, kv) -> bool of the broadcast shape; int64 indices, q without its offset,
            b and h below block_map.shape[:2]. Called on pairs of partial tiles inside the lengths.

    Returns:
        A plan that forward and backward take, for any dtype and head dim.
    """
    segments: dict[tuple[int, int], Segments] = {}
    strips: dict[tuple[int, int], list[Call]] = {}
    stored = 0
    for b in range(block_map.shape[0]):
        for h in range(block_map.shape[1]):
            merger = _StripMerger(b, h, block_map.kv_len, _MAX_STORED_BITS - stored)
            segments[b, h] = _segments(row_spans(block_map, evaluate, b, h, merger.take))
            strips[b, h] = merger.finish()
            stored += sum(call.nbytes for call in strips[b, h])
    return Plan(block_map, evaluate, segments, strips)


def _segments(spans: RowSpans) -> Segments:
    """Cuts the rows where the way their intervals move changes; rows that see nothing belong to no segment."""
    start, stop = spans.start, spans.stop
    q_len = len(start)
    sees = stop > start
    start_step = np.diff(start, prepend=-9)
    stop_step = np.diff(stop, prepend=-9)
    joins = sees & (start_step >= 0) & (start_step <= 1) & (stop_step >= 0) & (stop_step <= 1)
    joins[1:] &= sees[:-1]
    kind = np.where(joins, 2 * start_step + stop_step, -1)
    before = np.concatenate(([-1], kind[:-1]))[:q_len]
    first = sees & (~joins | ((before >= 0) & (kind != before)))
    row = np.flatnonzero(first)
    # A segment ends where the next begins or where a row sees nothing.
    ends = np.flatnonzero(np.concatenate((first | ~sees, [True])))
    rows = ends[np.searchsorted(ends, row, side="right")] - row
    inner = np.where(rows > 1, row + 1, row)
    step = np.where(rows > 1, kind[inner], 0)
    return Segments(row, rows, start[row], stop[row], step // 2, step % 2)


# --- regular rows ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Group:
    """Neighbouring pieces on their way into one call: rows and column runs, both ascending and disjoint."""

    pieces: list[tuple[int, int, int, int, int, int]]  # row, rows, start, stop, start_step, stop_step
    rows: int
    runs: list[tuple[int, int]]
    columns: int
    cost: float


def _cover(segments: Segments, costs: Costs) -> list[Call]:
    """Calls that cover the segments: long segments are chopped, short neighbours share a masked call."""
    calls: list[Call] = []
    group: _Group | None = None
    columns = (segments.row, segments.rows, segments.start, segments.stop, segments.start_step, segments.stop_step)
    for row, rows, start, stop, start_step, stop_step in zip(*(c.tolist() for c in columns), strict=True):
        pieces = _piece_count(rows, stop - start, start_step, stop_step, costs)
        for n in range(pieces):
            low, high = rows * n // pieces, rows * (n + 1) // pieces
            piece = (row + low, high - low, start + start_step * low, stop + stop_step * low, start_step, stop_step)
            run = (piece[2], piece[3] + stop_step * (high - low - 1))
            single = _Group([piece], high - low, [run], run[1] - run[0], costs.of(high - low, run[1] - run[0]))
            if pieces > 1 or high - low >= _MAX_MERGED_ROWS:
                merged = None
            else:
                merged = _merged(group, single, costs)
            if merged is None and group is not None:
                calls.append(_call(group))
            group = merged or single
    return calls if group is None else [*calls, _call(group)]


def _piece_count(rows: int, width: int, start_step: int, stop_step: int, costs: Costs) -> int:
    """Into how many equal calls to chop a segment: few calls and long rows against the corners masked away."""
    if start_step == stop_step == 0 or rows <= 32:
        return 1
    best, best_cost = 1, float("inf")
    for pieces in _piece_choices(rows):
        height = -(-rows // pieces)
        reach = width + (rows if start_step < stop_step else height)
        if pieces < rows and height > 64 and height * reach * 4 > _MAX_BAND_BYTES:
            continue
        # Mean number of columns of a call: what its rows see, plus the corners.
        corner = (height - 1) * (0.5 if start_step != stop_step else 1.0)
        columns = width + (stop_step - start_step) * rows / 2 + corner
        cost = pieces * (costs.call + costs.column * columns) + rows * columns / costs.rate(height)
        if cost < best_cost:
            best, best_cost = pieces, cost
    return best


def _piece_choices(rows: int) -> list[int]:
    """Piece counts that give pieces of about 32, 48, 64, 96, ... 1024 rows, and a single one."""
    heights = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    return sorted({-(-rows // height) for height in heights})


def _merged(group: _Group | None, single: _Group, costs: Costs) -> _Group | None:
    """Both groups as one call, or None if two are cheaper."""
    if group is None or group.rows + single.rows > _MAX_MERGED_ROWS:
        return None
    runs = _union(group.runs, single.runs[0])
    columns = sum(stop - start for start, stop in runs)
    rows = group.rows + single.rows
    cost = costs.of(rows, columns)
    if cost >= group.cost + single.cost:
        return None
    return _Group([*group.pieces, *single.pieces], rows, runs, columns, cost)


def _union(runs: list[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    """Ascending disjoint runs with one more added; touching runs join."""
    start, stop = new
    before = [r for r in runs if r[1] < start]
    after = [r for r in runs if r[0] > stop]
    for low, high in runs[len(before) : len(runs) - len(after)]:
        start, stop = min(start, low), max(stop, high)
    return [*before, (start, stop), *after]


def _call(group: _Group) -> Call:
    """One call for a group: unmasked or a band if it is one piece, else masked by each row's interval."""
    columns = _pick_runs(group.runs)
    if len(group.pieces) == 1:
        row, rows, start, stop, start_step, stop_step = group.pieces[0]
        band = None if start_step == stop_step == 0 else Band(start_step, stop_step, stop - start)
        return Call(Pick(row, row + rows), columns, band)
    row = np.concatenate([p[0] + np.arange(p[1]) for p in group.pieces])
    start = np.concatenate([p[2] + p[4] * np.arange(p[1]) for p in group.pieces])
    stop = np.concatenate([p[3] + p[5] * np.arange(p[1]) for p in group.pieces])
    # An interval lies inside one run, so positions among the picked columns differ from tokens by that run's shift.
    run_start = np.array([r[0] for r in group.runs])
    run_stop = np.array([r[1] for r in group.runs])
    packed_start = np.concatenate(([0], (run_stop - run_start).cumsum()[:-1]))
    owner = np.searchsorted(run_start, start, side="right") - 1
    shift = (packed_start - run_start)[owner]
    start, stop = start + shift, stop + shift
    if (start == 0).all() and (stop == group.columns).all():
        return Call(_pick(row), columns, None)
    mask = Intervals(*(torch.from_numpy(x.astype(np.int32))[:, None] for x in (start, stop)))
    return Call(_pick(row), columns, mask)


def _pick_runs(runs: list[tuple[int, int]]) -> Pick:
    if len(runs) == 1:
        return Pick(*runs[0])
    return Pick(runs[0][0], runs[-1][1], torch.cat([torch.arange(*run) for run in runs]))


def _pick(index: IntArray) -> Pick:
    """The ascending tokens `index`, as a slice if they have no gap."""
    start, stop = int(index[0]), int(index[-1]) + 1
    return Pick(start, stop) if stop - start == len(index) else Pick(start, stop, torch.from_numpy(index))


def _band_matrix(band: Band, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """(height, width + height) of 0 and -inf: row t shows start_step·t <= x < width + stop_step·t."""
    t = torch.arange(height, dtype=torch.int32)[:, None]
    x = torch.arange(width + height, dtype=torch.int32)
    hidden = (x < band.start_step * t) | (x >= width + band.stop_step * t)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


# --- irregular rows ----------------------------------------------------------------------------------------------


_STRIP_COSTS: Final = candidates("forward", torch.float32)[0]


@dataclass(slots=True)
class _Piece:
    """Rows of a strip on their way into a call, without those that see nothing."""

    rows: IntArray
    left: int
    bits: BoolArray


@dataclass(slots=True)
class _StripMerger:
    """Turns strips into calls over just the columns that some row sees; joins pieces where that is cheaper.

    Attributes:
        b: batch row of the mask.
        h: head of the mask.
        kv_len: columns of the mask, in tokens.
        budget: bytes of packed bits left to keep.
    """

    b: int
    h: int
    kv_len: int
    budget: int
    calls: list[Call] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    rows: int = 0
    seen: BoolArray | None = None  # (kv_len,), the columns of the pending pieces
    cost: float = 0.0

    def take(self, strip: Strip) -> None:
        """Adds a strip, cut where what its rows see changes abruptly."""
        for low, high in _steady(strip.bits):
            bits = strip.bits[low:high]
            some = bits.any(axis=1)
            if some.any():
                self._add(_Piece(strip.top + low + np.flatnonzero(some), strip.left, bits[some]))

    def _add(self, piece: _Piece) -> None:
        seen = np.zeros(self.kv_len, dtype=np.bool_)
        seen[piece.left : piece.left + piece.bits.shape[1]] = piece.bits.any(axis=0)
        cost = _STRIP_COSTS.of(len(piece.rows), np.count_nonzero(seen))
        if self.seen is not None:
            rows, union = self.rows + len(piece.rows), self.seen | seen
            together = _STRIP_COSTS.of(rows, np.count_nonzero(union))
            if rows <= _STRIP_ROWS and together < self.cost + cost:
                self.pieces.append(piece)
                self.rows, self.seen, self.cost = rows, union, together
                return
            self._flush()
        self.pieces, self.rows, self.seen, self.cost = [piece], len(piece.rows), seen, cost

    def finish(self) -> list[Call]:
        """The calls of all strips taken."""
        self._flush()
        return self.calls

    def _flush(self) -> None:
        if self.seen is None:
            return
        columns = np.flatnonzero(self.seen)
        bits = np.zeros((self.rows, len(columns)), dtype=np.bool_)
        top = 0
        for piece in self.pieces:
            low, high = np.searchsorted(columns, (piece.left, piece.left + piece.bits.shape[1]))
            bits[top : top + len(piece.rows), low:high] = piece.bits[:, columns[low:high] - piece.left]
            top += len(piece.rows)
        rows = np.concatenate([piece.rows for piece in self.pieces])
        self.calls.append(Call(_pick(rows), _pick(columns), self._mask(bits)))
        self.pieces, self.seen = [], None

    def _mask(self, bits: BoolArray) -> Bits | None:
        if bits.all():
            return None
        packed = np.packbits(bits, axis=1)
        if packed.nbytes > self.budget:
            return Bits(None, self.b, self.h)
        self.budget -= packed.nbytes
        return Bits(torch.from_numpy(packed), self.b, self.h)


def _steady(bits: BoolArray) -> list[tuple[int, int]]:
    """Runs of rows in which first, last and number of visible columns change by at most one from row to row."""
    rows = len(bits)
    shape = np.stack((bits.argmax(axis=1), bits[:, ::-1].argmax(axis=1), np.count_nonzero(bits, axis=1)))
    cuts = np.flatnonzero((np.abs(np.diff(shape, axis=1)) > 1).any(axis=0)) + 1
    if len(cuts) > _MAX_STRIP_CUTS:
        cuts = np.arange(_FINEST_CUT, rows, _FINEST_CUT)
    cuts = np.union1d(cuts, np.arange(_STRIP_ROWS, rows, _STRIP_ROWS))
    edges = [0, *cuts.tolist(), rows]
    return list(zip(edges[:-1], edges[1:], strict=True))
