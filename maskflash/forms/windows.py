"""What kernels with fixed masks take -> a mask: a window along a diagonal, of a whole call or of packed sequences.

visible = kv in the keys of q's sequence and at - left <= kv <= at + right

bottom_right: the last query is at the last key      top_left: the first query is at the first key

■ ■ ■ · · · · ·    queries 2 and 3, keys 4 each      ■ · · · · · · ·
■ ■ ■ ■ · · · ·    left=None, right=0                ■ ■ · · · · · ·
· · · · ■ ■ · ·                                      · · · · ■ · · ·
· · · · ■ ■ ■ ·                                      · · · · ■ ■ · ·
· · · · ■ ■ ■ ■                                      · · · · ■ ■ ■ ·
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Sizes
from maskflash.ground import modes
from maskflash.masks.mask import Mask
from maskflash.presets.documents import Align
from maskflash.trace.trace import Traced, trace

_Q_LEN: Final = "q_len of the call"  # of arguments that the call implies: no identifiers, so nobody can pass them
_KV_LEN: Final = "kv_len of the call"

Side = int | None
Only = tuple[int, int] | Literal["equal"] | None
Spans = tuple[Tensor, Tensor]


def as_flash_counts(left: Side, right: Side, longest: int) -> tuple[Side, Side]:
    """A window as flash-attention's kernels take it, for sequences of at most `longest` keys.

    A size of so many keys or more is none. Beside a size to the left, none to the right is `longest` keys; that hides
    keys only from queries that come farther before all of them.

    Source: Dao, flash-attention 2.8, csrc/flash_attn/flash_api.cpp: `set_params_fprop`, `mha_fwd`, `mha_varlen_fwd`.
    """
    left, right = (None if size is None or size >= longest else size for size in (left, right))
    return left, longest if right is None and left is not None else right


class _WindowMask(Mask):
    """A mask that counts the rows and columns of the tensors themselves, and knows what every row sees."""

    def spans(self, q_len: int, kv_len: int, batch: int) -> Spans:
        """The first key that each query sees, and one past the last, not after it where there is none.

        Returns:
            (batch or 1, q_len) int64 each, of keys from 0 to kv_len.
        """
        raise NotImplementedError

    def visible(self, b: Any, h: Any, q: Any, kv: Any, **values: Any) -> Any:
        """The mask, over what the call implies."""
        raise NotImplementedError

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """Whether the pair is visible; what the call implies must be known."""
        if any(name not in mask_args for name in self.implied_names):
            raise ArgumentTypeError(
                f"{self.name}: a predicate can't call it, since it depends on the call's lengths; combine the masks "
                "with & | ^ ~ instead"
            )
        return self.visible(b, h, q, kv, **mask_args)

    def _refuse_offsets(self, sizes: Sizes) -> None:
        sizes.refuse_offsets(
            f"{self.name} counts the rows and columns of the tensors themselves", "pass q and k from the first token on"
        )


class AlignedWindow(_WindowMask):
    """A window along the diagonal of each batch row, whatever the lengths of the call.

    Attributes:
        name: what messages call it; one that says all of its arguments.
        left: tokens before the key that a query is aligned with; None for all.
        right: tokens after it; None for all.
        align: "bottom_right" or "top_left".
        flash: whether sizes count as in flash-attention's kernels; see `as_flash_counts`.
        chunk: tokens of the chunks that keys are cut into, from the first one on; a query sees only that of the key
            that it is aligned with. None for no chunks.
        lengths: (q_len, kv_len) of the only calls that it is for, or "equal" for those in which these are equal; None
            for any.
    """

    def __init__(
        self,
        name: str,
        left: Side = None,
        right: Side = None,
        align: Align = "bottom_right",
        *,
        flash: bool = False,
        chunk: int | None = None,
        lengths: Only = None,
    ) -> None:
        self.left: Side = left
        self.right: Side = right
        self.align, self.lengths = align, lengths
        self.flash: bool = flash
        self.chunk: int | None = chunk
        self._low, self._high = f"first key of query 0 in {name}", f"last key of query 0 in {name}"
        self._at = f"key of query 0 in {name}"
        implied = [self._low] * (left is not None)
        implied += [self._high] * (right is not None or (flash and left is not None))
        implied += [self._at] * (chunk is not None)
        super().__init__(name, (), {}, tuple(implied), ("q_len", "kv_len"))

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """Where the window lies in such a call."""
        self._refuse_offsets(sizes)
        lengths = sizes.q_len, sizes.kv_len
        if self.lengths == "equal" and sizes.q_len != sizes.kv_len:
            raise ArgumentError(
                f"{sizes.operation}: {self.name} is for as many queries as keys, got (q_len, kv_len) {lengths}; its "
                "library has no other calls"
            )
        if self.lengths not in (None, "equal", lengths):
            raise ArgumentError(
                f"{sizes.operation}: {self.name} is for (q_len, kv_len) {self.lengths}, got {lengths}; make one of "
                "that size"
            )
        low, high = self._ends(*lengths)
        known = {self._low: low, self._high: high, self._at: self._shift(*lengths)}
        return {name: known[name] for name in self.implied_names}

    def spans(self, q_len: int, kv_len: int, batch: int) -> Spans:
        """What every row sees; see `_WindowMask`."""
        row = torch.arange(q_len)
        low, high = self._ends(q_len, kv_len)
        start, stop = row + low, row + high + 1
        if self.chunk is not None:
            first = (row + self._shift(q_len, kv_len)) // self.chunk * self.chunk
            start, stop = torch.maximum(start, first), torch.minimum(stop, first + self.chunk)
        return start.clamp(0, kv_len)[None], stop.clamp(0, kv_len)[None]

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """A comparison for each side that has an end, and one of chunks."""
        return trace(self.visible, dict.fromkeys(self.implied_names, 0))

    def visible(self, b: Any, h: Any, q: Any, kv: Any, **values: Any) -> Any:
        """The mask, over where the window lies."""
        seen: Any = True
        if self._low in values:
            seen = q + values[self._low] <= kv
        if self._high in values:
            seen = (kv <= q + values[self._high]) & seen
        if self.chunk is not None:
            seen = ((q + values[self._at]) // self.chunk == kv // self.chunk) & seen
        return seen

    def _ends(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """The first key and the last that query 0 would see if there were keys on both sides; all move by one a row."""
        left, right = as_flash_counts(self.left, self.right, kv_len) if self.flash else (self.left, self.right)
        at = self._shift(q_len, kv_len)
        return (-q_len if left is None else at - left), (kv_len if right is None else at + right)

    def _shift(self, q_len: int, kv_len: int) -> int:
        """The key that query 0 is aligned with."""
        return kv_len - q_len if self.align == "bottom_right" else 0

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(AlignedWindow, flash=self.flash, chunk=self.chunk, lengths=self.lengths)
        return make, (self.name, self.left, self.right, self.align)


class PackedWindows(_WindowMask):
    """Sequences packed end to end, with a window along the diagonal of each.

    Tokens are counted through the batch rows: query q of batch row b is token b * q_len + q. So one mask serves tokens
    that are packed in one batch row and those of a padded batch, seen as one row by `q.flatten(0, 1)` in (B, S, H, D).

    Attributes:
        name: what messages call it.
        q_lengths: (n,) int64, queries of each sequence, one after the other.
        kv_start: (n,) int64, first key of each sequence.
        kv_stop: (n,) int64, one past its last key.
        kv_total: the keys that a call must have.
        left: tokens before the key that a query is aligned with; None for all.
        right: tokens after it; None for all.
        align: "bottom_right" or "top_left".
    """

    def __init__(
        self,
        name: str,
        q_lengths: Tensor,
        kv_start: Tensor,
        kv_stop: Tensor,
        kv_total: int,
        left: Side = None,
        right: Side = None,
        align: Align = "bottom_right",
    ) -> None:
        super().__init__(name, (), {}, (_Q_LEN, _KV_LEN), ("batch", "q_len", "kv_len"))
        self.q_lengths, self.kv_start, self.kv_stop, self.kv_total = q_lengths, kv_start, kv_stop, kv_total
        self.left, self.right, self.align = left, right, align
        with modes.off():
            self.q_total = int(q_lengths.sum())
            self._tables = dict(zip(("start", "stop"), self._by_token(), strict=True))

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """The lengths, by which tokens are counted."""
        self._refuse_offsets(sizes)
        queries, keys = sizes.batch * sizes.q_len, sizes.batch * sizes.kv_len
        if queries != self.q_total:
            raise ArgumentError(
                f"{sizes.operation}: batch * q_len is {queries}, expected {self.q_total}, the queries of {self.name}"
            )
        if keys < self.kv_total:
            raise ArgumentError(
                f"{sizes.operation}: batch * kv_len is {keys}, expected at least {self.kv_total}, the keys of "
                f"{self.name}"
            )
        return {_Q_LEN: sizes.q_len, _KV_LEN: sizes.kv_len}

    def spans(self, q_len: int, kv_len: int, batch: int) -> Spans:
        """What every row sees; see `_WindowMask`."""
        before = torch.arange(batch)[:, None] * kv_len
        start, stop = ((x[: batch * q_len].view(batch, q_len) - before).clamp(0, kv_len) for x in self.held())
        return start, stop

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """Two look-ups and comparisons."""
        traced = trace(self.visible, {**self._tables, _Q_LEN: 1, _KV_LEN: 1})
        return replace(traced, tables=tuple(self._tables[name] for name in traced.names))

    def visible(self, b: Any, h: Any, q: Any, kv: Any, **values: Any) -> Any:
        """The mask, over the lengths of the call."""
        row, column = b * values[_Q_LEN] + q, b * values[_KV_LEN] + kv
        tables = {**self._tables, **values}
        return (tables["start"][row] <= column) & (column < tables["stop"][row])

    def held(self) -> tuple[Tensor, ...]:
        """The tables."""
        return tuple(self._tables.values())

    def _by_token(self) -> Spans:
        """For each query the first key that it sees, and one past the last: (max(q_total, 1),) int32."""
        starts = self.q_lengths.cumsum(0) - self.q_lengths
        ahead = (
            self.kv_stop - starts - self.q_lengths if self.align == "bottom_right" else self.kv_start - starts
        ).repeat_interleave(self.q_lengths)
        first, end = (x.repeat_interleave(self.q_lengths) for x in (self.kv_start, self.kv_stop))
        at = torch.arange(self.q_total) + ahead
        start = first if self.left is None else (at - self.left).clamp(first, end)
        stop = end if self.right is None else (at + self.right + 1).clamp(first, end)
        rest = torch.zeros(0 if self.q_total else 1, dtype=torch.int64)
        start, stop = (torch.cat((x, rest)).int() for x in (start, stop))
        return start, stop

    def __reduce__(self) -> tuple[Any, ...]:
        lengths = self.q_lengths, self.kv_start, self.kv_stop, self.kv_total
        return PackedWindows, (self.name, *lengths, self.left, self.right, self.align)
