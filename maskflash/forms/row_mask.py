"""What each query sees, as intervals of keys or as cuDNN's endpoints -> a mask that looks it up.

visible = start[q] <= kv < stop[q]                               where a row has one interval at most
visible = start[0, q] <= kv < stop[0, q] or start[1, q] <= ...   where rows have several, the last of some empty
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.forms.row_intervals import RowIntervals
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments, modes
from maskflash.masks.mask import Mask
from maskflash.trace.trace import Traced, trace

_TABLES: Final = ("start", "stop")
_ROWS: Final = "rows that see something"  # no identifier, so nobody can pass it


def from_row_intervals(intervals: Tensor | RowIntervals, kv_len: int | None = None, *, batch: int = 1) -> Mask:
    """What each query sees as a mask: it combines with & | ^ ~, and is pickled by its numbers.

    A query sees the keys [0, F[0]), [F[1], F[2]), [F[3], F[4]) and so on, as cuDNN's flexible attention reads it.

    Args:
        intervals: F, (Hmask, n, batch * q_len) integers, one batch row after the other: n odd, each row ascending from
            0 to kv_len; Hmask is 1 or the number of query heads. Or what `Mask.to_row_intervals` gives.
        kv_len: columns in tokens; RowIntervals have their own.
        batch: batch rows of F; RowIntervals have their own.

    Returns:
        A mask for calls of exactly these lengths, without offsets. One batch row, or one head, serves any number.

    Raises:
        ArgumentTypeError: neither RowIntervals nor a tensor of integers.
        ArgumentError: a shape that means nothing, or numbers that do not ascend from 0 to kv_len.

    Source: nvidia-cudnn-frontend 1.32, cudnn/flex_attention: `create_mask_plan`.

    Example:
        >>> ends = torch.tensor([[[1, 2, 1, 0], [1, 2, 2, 2], [1, 2, 4, 4]]])
        >>> from_row_intervals(ends, 4).dense(4, 4)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    if isinstance(intervals, RowIntervals):
        _check(intervals, kv_len, batch)
        return RowMask("from_row_intervals", intervals)
    return RowMask("from_row_intervals", _of_endpoints(intervals, kv_len, batch))


class RowMask(Mask):
    """Row intervals as a mask.

    Attributes:
        intervals: what each query sees.
        padded: whether longer calls are served too: their other rows and columns see nothing.
    """

    def __init__(self, name: str, intervals: RowIntervals, *, padded: bool = False) -> None:
        batch, heads = intervals.shape
        several = {"batch": batch > 1, "heads": heads > 1, "q_len": True, "kv_len": True}
        sizes = tuple(size for size, matters in several.items() if matters)
        super().__init__(f"{name}({len(intervals.start)} intervals)", (), {}, (_ROWS,) if padded else (), sizes)
        self.intervals = intervals
        self.padded = padded
        self._of = name
        with modes.off():
            most = max(int(intervals.count.max()) if len(intervals.count) else 0, 1)
            self._form = _RowForm(most, batch > 1, heads > 1, padded)
            ends = _tables(intervals, most, padded)
            self._tables = {key: self._form.squeezed(x) for key, x in zip(_TABLES, ends, strict=True)}

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """The number of rows, if the call fits the intervals."""
        sizes.refuse_offsets("intervals count the rows and columns of q and k", "shift the intervals instead")
        (batch, heads), own = self.intervals.shape, (self.intervals.q_len, self.intervals.kv_len)
        for name, got, want in zip(("q_len", "kv_len"), (sizes.q_len, sizes.kv_len), own, strict=True):
            if got < want or (got > want and not self.padded):
                least = "at least " if self.padded else ""
                raise ArgumentError(f"{sizes.operation}: {name} is {got}, expected {least}{want} as in {self.name}")
        for name, got, want in (("batch", sizes.batch, batch), ("heads", sizes.heads, heads)):
            if want not in (1, got):
                raise ArgumentError(
                    f"{sizes.operation}: {name} is {got}, expected {want} as in {self.name}; 1 there serves all"
                )
        return {_ROWS: own[0]} if self.padded else {}

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The comparisons with the tables; those of one form are traced once, whatever the numbers."""
        traced = _trace(self._form)
        return replace(traced, tables=tuple(self._tables[name] for name in traced.names))

    def held(self) -> tuple[Tensor, ...]:
        """The tables."""
        return tuple(self._tables.values())

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """Whether the pair is visible."""
        rows = self.intervals.q_len
        row = q * (q < rows) + rows * (q >= rows) if self.padded else q  # of numbers, tensors and symbols alike
        return self._form.visible(b, h, row, kv, self._tables)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._of, self.intervals, self.padded)


def _again(name: str, intervals: RowIntervals, padded: bool) -> RowMask:
    return RowMask(name, intervals, padded=padded)


class _RowForm(NamedTuple):
    """What their expression depends on; batch rows, heads and numbers are looked at only where there are several."""

    most: int
    batched: bool
    headed: bool
    padded: bool

    def squeezed(self, table: Tensor) -> Tensor:
        """A view of a table (B, H, most, rows) without the dimensions that nothing looks at."""
        several = self.batched, self.headed, self.most > 1
        return table[tuple(slice(None) if kept else 0 for kept in several)]

    def visible(self, b: Any, h: Any, row: Any, kv: Any, values: dict[str, Any]) -> Any:
        """The mask over tables of `squeezed` shape, of a row that they have."""
        unit = (*((b,) if self.batched else ()), *((h,) if self.headed else ()))
        places = [(*unit, *((number,) if self.most > 1 else ()), row) for number in range(self.most)]
        seen = None
        for place in places:
            within = (kv >= values["start"][place]) & (kv < values["stop"][place])
            seen = within if seen is None else seen | within
        return seen


@lru_cache(maxsize=64)
def _trace(form: _RowForm) -> Traced:
    """The expression of all masks of a form; its tables are named start and stop."""

    def visible(b: Any, h: Any, q: Any, kv: Any, **values: Any) -> Any:
        return form.visible(b, h, min(q, values[_ROWS]) if form.padded else q, kv, values)

    anything = form.squeezed(torch.zeros(1, 1, form.most, 1, dtype=torch.int32))
    return trace(visible, {**dict.fromkeys(_TABLES, anything), **({_ROWS: 0} if form.padded else {})})


def _tables(intervals: RowIntervals, most: int, padded: bool) -> Tensor:
    """Starts and stops of each row's intervals: (2, B, H, most, rows) int32; a row that sees nothing follows padded."""
    rows = intervals.q_len + padded
    found = torch.zeros(2, *intervals.shape, most, rows, dtype=torch.int32)
    owner = intervals.rows
    number = torch.arange(len(owner)) - intervals.offsets[owner]
    unit, q = owner // max(intervals.q_len, 1), owner % max(intervals.q_len, 1)
    place = (unit * most + number) * rows + q
    found.view(2, -1)[:, place] = torch.stack((intervals.start, intervals.stop)).int()
    return found


def _check(intervals: RowIntervals, kv_len: int | None, batch: int) -> None:
    """Refuse sizes besides those that intervals have, and intervals that are no rows' own."""
    given = ("kv_len", kv_len, intervals.kv_len), ("batch", None if batch == 1 else batch, intervals.batch)
    for name, got, want in given:
        if got is not None and got != want:
            raise ArgumentError(
                f"from_row_intervals: {name} is {got}, expected {want} as in the RowIntervals; leave it out"
            )
    offsets, start, stop = intervals.offsets, intervals.start, intervals.stop
    rows = intervals.shape[0] * intervals.shape[1] * intervals.q_len
    fits = len(offsets) == rows + 1 and len(start) == len(stop) == offsets[-1] and offsets[0] == 0
    if fits and bool((intervals.count >= 0).all()):
        owner = intervals.rows
        apart = (owner[1:] != owner[:-1]) | (start[1:] > stop[:-1])
        if bool(((start >= 0) & (start < stop) & (stop <= intervals.kv_len)).all() & apart.all()):
            return
    raise ArgumentError(
        f"from_row_intervals: the {len(start)} intervals are not apart and ascending in each of {rows} rows, within "
        f"{intervals.kv_len} keys; see RowIntervals"
    )


def _of_endpoints(ends: Tensor, kv_len: int | None, batch: int) -> RowIntervals:
    """Endpoints as cuDNN takes them -> row intervals; those that touch are one."""
    call = "from_row_intervals"
    if kv_len is None:
        raise ArgumentTypeError(
            f"{call}: kv_len is missing; a tensor of endpoints does not say how many keys there are"
        )
    kv_len = arguments.length(call, "kv_len", kv_len)
    batch = arguments.length(call, "batch", batch, low=1)
    table = arguments.int_table(call, "intervals", ends, (3,))
    heads, n, columns = table.shape
    if n % 2 == 0 or heads == 0:
        raise ArgumentError(
            f"{call}: intervals has shape {tuple(table.shape)}, expected (heads, an odd number of endpoints, batch * "
            "q_len) with a head at least"
        )
    if columns % batch:
        raise ArgumentError(f"{call}: intervals has {columns} columns, expected a multiple of the {batch} batch rows")
    if arguments.without_data(table):
        raise ArgumentError(f"{call}: intervals has no data, expected numbers, which are read now")
    with modes.off():
        table = table.detach().to("cpu", torch.int64)
        before = torch.cat((torch.zeros_like(table[:, :1]), table[:, :-1]), 1)
        wrong = (table < before) | (table > kv_len)
        if bool(wrong.any()):
            h, column = wrong.any(1).nonzero()[0].tolist()
            raise ArgumentError(
                f"{call}: the endpoints of head {h} in column {column} are {_short(table[h, :, column].tolist())}, "
                f"expected numbers that ascend from 0 to {kv_len}, the number of keys"
            )
        # (heads, n, batch * q_len) -> (batch, heads, q_len, intervals)
        start, stop = (
            x.reshape(heads, n // 2 + 1, batch, columns // batch).permute(2, 0, 3, 1)
            for x in (before[:, ::2], table[:, ::2])
        )
        some = start < stop
        row = some.flatten(0, 2).nonzero()[:, 0]
        return united(row, start[some], stop[some], (columns // batch, kv_len), (batch, heads))


def united(row: Tensor, start: Tensor, stop: Tensor, lengths: tuple[int, int], shape: tuple[int, int]) -> RowIntervals:
    """Disjoint intervals, in ascending order of their rows and keys; those that touch are one."""
    touches = (row[1:] == row[:-1]) & (start[1:] == stop[:-1])
    edge = torch.ones(min(len(row), 1), dtype=torch.bool)
    first, last = torch.cat((edge, ~touches)), torch.cat((~touches, edge))
    count = torch.bincount(row[first], minlength=shape[0] * shape[1] * lengths[0])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
    return RowIntervals(*lengths, shape, offsets, start[first], stop[last], shape[0])


def _short(values: list[int]) -> str:
    return f"{values[:6]}"[:-1] + (", ...]" if len(values) > 6 else "]")
