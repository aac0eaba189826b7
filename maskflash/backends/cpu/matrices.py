"""A call's mask -> the matrix that torch's kernel takes, of 0 where visible and -inf elsewhere, made or found again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.rows import Evaluate
from maskflash.backends.cpu.calls import Band, Bits, Call, Causal, Intervals
from maskflash.ground.copies import lasting

_MAX_KEPT_PAIRS: Final = 1 << 16  # of one call whose matrix is kept
_MAX_KEPT: Final = 16
_MAX_SHARED: Final = 8  # kinds of bands; those of two steps are of one kind only if they are of one width


@dataclass(slots=True)
class _Shared:
    """One matrix, in each dtype, of which every band of one kind is a slice: as high and wide as the largest of them.

    Where only the right edge moves, a narrower band is the wide one seen from further right:

        # # # . . .        # # . . .
        # # # # . .        # # # . .
        # # # # # .        # # # # .
        width 3            width 2, from column 1 on
    """

    rows: int = 0
    width: int = 0
    matrices: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def matrix(self, band: Band, dtype: torch.dtype) -> Tensor:
        found = self.matrices.get(dtype)
        if found is None or found.shape != (self.rows, self.width + self.rows):
            with lasting():
                found = band_matrix(Band(band.start_step, band.stop_step, self.width), self.rows, dtype)
            self.matrices[dtype] = found
        return found


@dataclass(slots=True, eq=False)
class Masks:
    """The matrices of a plan's calls: bands share one of their kind, those of a few small calls are kept.

    Attributes:
        evaluate: the mask, for calls whose bits were too many to keep.
    """

    evaluate: Evaluate | None
    _shared: dict[tuple[int, int, int], _Shared] = field(default_factory=dict)
    _kept: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def expect(self, calls: Iterable[Call]) -> None:
        """Makes room in the shared matrices for the bands of new calls."""
        for call in calls:
            if isinstance(call.mask, Band):
                kind = call.mask.kind
                if kind in self._shared or len(self._shared) < _MAX_SHARED:
                    shared = self._shared.setdefault(kind, _Shared())
                    shared.rows = max(shared.rows, len(call.rows))
                    shared.width = max(shared.width, call.mask.width)

    def additive(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The call's mask as the kernel wants it: (R, S) of 0 and -inf, last stride 1; None where it needs none."""
        mask, columns = call.mask, len(call.columns)
        if isinstance(mask, Band):
            return self._band(mask, len(call.rows), columns, dtype)
        if isinstance(mask, Intervals):
            return self._keep(call, dtype, lambda: additive(mask.visible(columns), dtype))
        if isinstance(mask, Bits):
            if mask.packed is not None:
                packed = mask.packed
                return self._keep(call, dtype, lambda: spread(packed, columns, dtype))
            return additive(self._evaluated(mask, call.rows.tokens(), call.columns.tokens()), dtype)
        return None

    def tile(self, call: Call, rows: slice, columns: slice) -> Tensor | None:
        """A part of the call's mask: float32 (rows, columns) of 0 and -inf; None where all of it is visible.

        The first of the columns is a multiple of 8 where the mask has bits.
        """
        mask = call.mask
        if mask is None:
            return None
        if not isinstance(mask, Bits):
            start, stop = ends(mask, rows)
            if int(start.max()) <= columns.start and int(stop.min()) >= columns.stop:
                return None
            x = torch.arange(columns.start, columns.stop, dtype=torch.int32)
            visible = (x >= start) & (x < stop)
        elif mask.packed is not None:
            bytes_ = slice(columns.start // 8, -(-columns.stop // 8))
            return spread(mask.packed[rows, bytes_], columns.stop - columns.start, torch.float32)
        else:
            visible = self._evaluated(mask, call.rows.tokens()[rows], call.columns.tokens()[columns])
        return additive(visible, torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that are kept."""
        shared = (matrix for shared in self._shared.values() for matrix in shared.matrices.values())
        return sum(matrix.nbytes for matrix in (*shared, *self._kept.values()))

    def _band(self, band: Band, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        shared = self._shared.get(band.kind)
        if shared is None:
            return band_matrix(band, rows, dtype)[:, :columns]
        left = shared.width - band.width if band.start_step == 0 else 0
        return shared.matrix(band, dtype)[:rows, left : left + columns]

    def _keep(self, call: Call, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The matrix of a call small enough that making it again costs more than keeping it."""
        if call.pairs > _MAX_KEPT_PAIRS or len(self._kept) >= _MAX_KEPT:
            return make()
        key = (id(call), dtype)  # calls live as long as the plan
        if key not in self._kept:
            with lasting():
                self._kept[key] = make()
        return self._kept[key]

    def _evaluated(self, mask: Bits, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of these tokens see which: (R, S) bool."""
        assert self.evaluate is not None, "plan() keeps the mask of a plan that has bits to evaluate"
        visible = self.evaluate(torch.tensor(mask.b), torch.tensor(mask.h), rows[:, None], columns)
        return visible.expand(len(rows), len(columns))


def reach(call: Call, rows: slice) -> tuple[int, int]:
    """The columns of a call from the first to one past the last that some of its rows see; all where it has bits."""
    mask, columns = call.mask, len(call.columns)
    if isinstance(mask, Causal):
        return 0, rows.stop
    if isinstance(mask, Band):
        return mask.start_step * rows.start, min(mask.width + mask.stop_step * (rows.stop - 1), columns)
    if isinstance(mask, Intervals):
        return int(mask.start[rows].min()), int(mask.stop[rows].max())
    return 0, columns


def ends(mask: Causal | Band | Intervals, rows: slice) -> tuple[Tensor, Tensor]:
    """The first column that each of these rows sees, and one past the last: (rows, 1) int32 each."""
    if isinstance(mask, Intervals):
        return mask.start[rows], mask.stop[rows]
    t = torch.arange(rows.start, rows.stop, dtype=torch.int32)[:, None]
    if isinstance(mask, Causal):
        return torch.zeros_like(t), t + 1
    return mask.start_step * t, mask.width + mask.stop_step * t


def band_matrix(band: Band, height: int, dtype: torch.dtype) -> Tensor:
    """The matrix of `height` rows of a band: (height, width + height)."""
    t = torch.arange(height, dtype=torch.int32)[:, None]
    x = torch.arange(band.width + height, dtype=torch.int32)
    return additive((x >= band.start_step * t) & (x < band.width + band.stop_step * t), dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it, from (R, S) bool: 0 where visible, -inf elsewhere, last stride 1."""
    return spread(torch.from_numpy(np.packbits(visible.numpy(), axis=1)), visible.shape[1], dtype)


def spread(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it, from packed bits: (R, columns) of 0 and -inf, last stride 1."""
    # Eight entries for each byte looked up at once: 5x faster than filling where a bool is False.
    rows = _bytes_as_masks(dtype).index_select(0, packed.reshape(-1).int())
    return rows.reshape(len(packed), -1)[:, :columns]


@cache
def _bytes_as_masks(dtype: torch.dtype) -> Tensor:
    """What each byte stands for: (256, 8) of 0 and -inf."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.zeros(256, 8, dtype=dtype).masked_fill_(torch.from_numpy(bits == 0), -torch.inf)
