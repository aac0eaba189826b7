"""The sizes that a call has -> checked numbers, and whether they are those that a mask's tables were made for."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments, transfer

_BOUND: Final = {"b": "batch", "h": "heads", "q": "q_len", "kv": "kv_len"}  # what each index stays below


class Sizes(NamedTuple):
    """What a function may know of the call it serves, already checked.

    Attributes:
        q_len: rows in tokens.
        kv_len: columns in tokens.
        batch: batch rows.
        heads: query heads.
        device: where it runs.
        q_offset: added to row numbers, an int or an integer tensor (batch,).
        kv_offset: added to column numbers, likewise.
        operation: what messages call it.
        partial: whether sizes that nobody gave reach just so far as the index that was asked about.
    """

    q_len: int
    kv_len: int
    batch: int
    heads: int
    device: torch.device
    q_offset: int | Tensor = 0
    kv_offset: int | Tensor = 0
    operation: str = "attention"
    partial: bool = False

    @staticmethod
    def of(q: Tensor, k: Tensor, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0) -> Sizes:
        """The sizes of an attention call with these tensors; the offsets are checked already."""
        batch, heads, q_len, _ = q.shape
        return Sizes(q_len, k.shape[2], batch, heads, q.device, q_offset, kv_offset)

    @staticmethod
    def checked(
        operation: str,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        partial: bool = False,
    ) -> Sizes:
        """Sizes as a caller passed them.

        Raises:
            ArgumentError: a number out of range, or a device that torch doesn't have here.
            ArgumentTypeError: a size that is no int, an offset that holds no integers.
        """
        given = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads}
        q_len, kv_len, batch, heads = (arguments.length(operation, name, value) for name, value in given.items())
        on = transfer.numbered(arguments.device(operation, device))
        rows = _offset(operation, "q_offset", q_offset, batch, on)
        columns = _offset(operation, "kv_offset", kv_offset, batch, on)
        return Sizes(q_len, kv_len, batch, heads, on, rows, columns, operation, partial)

    @staticmethod
    def around(operation: str, index: dict[str, int], given: dict[str, int | None], **rest: Any) -> Sizes:
        """Sizes that hold an index; those that nobody gave (None) reach just so far.

        Args:
            operation: what messages call it.
            index: of some of b, h, q, kv.
            given: batch, heads, q_len, kv_len.
            **rest: q_offset, kv_offset and device, as in `checked`.
        """
        sizes = dict(given)
        for offset in rest.values():
            if isinstance(offset, Tensor) and sizes["batch"] is None and offset.numel() > 1:
                sizes["batch"] = offset.numel()
        for name, size in _BOUND.items():
            if sizes[size] is None:
                sizes[size] = arguments.integer(operation, name, index.get(name, 0)) + 1
        partial = any(size is None for size in given.values())
        return Sizes.checked(operation, **sizes, **rest, partial=partial)  # type: ignore[arg-type]

    @property
    def offsets(self) -> tuple[tuple[str, int | Tensor], ...]:
        """Both offsets by name."""
        return ("q_offset", self.q_offset), ("kv_offset", self.kv_offset)

    @property
    def offset_tensors(self) -> list[tuple[str, Tensor]]:
        """Those that differ from batch row to batch row."""
        return [(name, value) for name, value in self.offsets if isinstance(value, Tensor)]

    def check_index(self, **index: int) -> None:
        """Refuse an index (of some of b, h, q, kv) that is not below its size."""
        for name, value in index.items():
            size = _BOUND[name]
            if arguments.integer(self.operation, name, value) >= getattr(self, size):
                raise ArgumentError(
                    f"{self.operation}: {name} is {value}, expected less than {size}, {getattr(self, size)}"
                )

    def refuse_offsets(self, whose: str, fix: str) -> None:
        """An error where rows or columns are numbered from elsewhere than 0."""
        for name, value in self.offsets:
            if isinstance(value, Tensor) or value != 0:
                got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else value
                raise ArgumentError(f"{self.operation}: {name} is {got}, expected 0: {whose}; {fix}")


def _offset(operation: str, name: str, value: int | Tensor, batch: int, device: torch.device) -> int | Tensor:
    offset = arguments.offset(operation, name, value, batch)
    if not isinstance(offset, Tensor):
        return offset
    arguments.offsets_in_range(operation, offset, name)
    return offset.to(device)


class Fits(NamedTuple):
    """What a mask's tables are made for; None where any will do.

    Attributes:
        batch: batch rows.
        heads: query heads.
        q_total: tokens of the queries' documents.
        kv_total: tokens of the keys' documents.
    """

    batch: int | None = None
    heads: int | None = None
    q_total: int | None = None
    kv_total: int | None = None

    def check(self, name: str, sizes: Sizes) -> None:
        """Refuse a call that the tables weren't made for.

        Documents may end before the sequence does. They may go on after it only where an offset says that the call is a
        part of something longer.
        """
        for what, held, size in (("batch", self.batch, sizes.batch), ("heads", self.heads, sizes.heads)):
            if held is not None and (held < size if sizes.partial else held != size):
                raise ArgumentError(
                    f"{sizes.operation}: {what} is {size}, expected {held} as in the tables of {name}; one that is to "
                    "serve all has size 1 there"
                )
        if self.q_total is None or sizes.partial:
            return
        if any(isinstance(offset, Tensor) or offset != 0 for _, offset in sizes.offsets):
            return
        if self.kv_total is None:
            if self.q_total > sizes.q_len and self.q_total > sizes.kv_len:
                _refuse_total(name, sizes, "", self.q_total, f"{sizes.q_len} queries and {sizes.kv_len} keys")
        elif self.q_total > sizes.q_len:
            _refuse_total(name, sizes, " of the queries", self.q_total, f"{sizes.q_len} queries")
        elif self.kv_total > sizes.kv_len:
            _refuse_total(name, sizes, " of the keys", self.kv_total, f"{sizes.kv_len} keys")


def _refuse_total(name: str, sizes: Sizes, whose: str, total: int, there: str) -> NoReturn:
    raise ArgumentError(
        f"{sizes.operation}: the documents{whose} of {name} add up to {total} tokens, expected at most what the call "
        f"has, {there}; check the lengths: where tokens' ids or starts are meant, pass them by these names. "
        "If the rest is still to come, give k and v room for it"
    )
