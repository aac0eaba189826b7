"""Lengths of what is packed into a sequence -> checked lists, and tables with an entry for each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Fits
from maskflash.ground import arguments, modes

Ints = Tensor | Sequence[int]
Lengths = Tensor | Sequence[int] | Sequence[Sequence[int]]
Align = Literal["bottom_right", "top_left"]
Questions = Sequence[tuple[int, Ints]]
Stretches = Tensor | Sequence[tuple[int, int]]


class Part(NamedTuple):
    """A question or an answer, in tokens from the start of the sequence; the last one excluded."""

    start: int
    stop: int
    document: int
    document_stop: int
    is_question: bool


class Packing(NamedTuple):
    """Lengths of the documents of queries and of keys, a list for each batch row, or one that serves all."""

    rows: list[list[int]]
    kv_rows: list[list[int]]
    unlike: bool  # the keys' were given too

    @property
    def documents(self) -> int:
        """Documents, in all batch rows."""
        return sum(map(len, self.rows))

    @property
    def fits(self) -> Fits:
        """The calls that they are for."""
        q_total, kv_total = (max(map(sum, rows)) for rows in (self.rows, self.kv_rows))
        return Fits(unless_1(len(self.rows)), None, q_total, kv_total if self.unlike else None)


def sizes(operation: str, by_position: Any, given: dict[str, Any], kv_given: dict[str, Any]) -> Packing:
    """Documents of queries and of keys, from a single argument for each.

    Args:
        operation: the preset.
        by_position: its first argument, lengths if it isn't something else by mistake.
        given: what was passed by name as "lengths" and "cu_seqlens".
        kv_given: what was passed as "kv_lengths" and "kv_cu_seqlens", which may be nothing.
    """
    if by_position is not None:
        name, rows = "lengths", _read(operation, "lengths", by_position)
        _refuse_ids(operation, rows)
    else:
        name, rows = _only(operation, given)
    _check(operation, name, rows)
    if all(value is None for value in kv_given.values()):
        return Packing(rows, rows, unlike=False)
    kv_name, kv_rows = _only(operation, kv_given)
    _check(operation, kv_name, kv_rows)
    counts, kv_counts = [len(row) for row in rows], [len(row) for row in kv_rows]
    if counts != kv_counts:
        raise ArgumentError(
            f"{operation}: {name} has {counts} documents per row and {kv_name} {kv_counts}; they must pair up"
        )
    return Packing(rows, kv_rows, unlike=True)


def unless_1(size: int) -> int | None:
    """The batch rows or heads that a table has and a call needs; 1 serves any number."""
    return None if size == 1 else size


def single(operation: str, name: str, lengths: Ints) -> list[int]:
    """Lengths that serve all batch rows."""
    found = arguments.int_list(operation, name, lengths, (1,))
    _within_limits(operation, name, found)
    return found


def reaches(operation: str, name: str, given: Any) -> Tensor:
    """(B,) numbers of tokens, one for each batch row: what was passed, by reference."""
    table = arguments.int_table(operation, name, given, (1,))
    with modes.off():
        lowest = 0 if table.numel() == 0 or arguments.without_data(table) else int(table.min())
    if lowest < 0:
        raise ArgumentError(f"{operation}: {name} holds {lowest}, expected at least 0")
    return table


def _only(operation: str, given: dict[str, Any]) -> tuple[str, list[list[int]]]:
    """The one argument that was given, by name, and the lengths that it says."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ArgumentError(
            f"{operation}: got {' and '.join(names) or 'none'}, expected exactly one of {' and '.join(given)}"
        )
    (name,) = names
    read = _from_starts if name.endswith("cu_seqlens") else _read
    return name, read(operation, name, given[name])


def _read(operation: str, name: str, lengths: Any) -> list[list[int]]:
    """Lengths as one list for each batch row; rows may differ in their number of documents."""
    nested = isinstance(lengths, Sequence) and len(lengths) > 0
    if nested and isinstance(lengths[0], Sequence | np.ndarray | Tensor) and not isinstance(lengths, str):
        return [arguments.int_list(operation, name, row, (1,)) for row in lengths]
    table = arguments.int_list(operation, name, lengths, (1, 2))
    return table if table and isinstance(table[0], list) else [table]


def _from_starts(operation: str, name: str, cu_seqlens: Any) -> list[list[int]]:
    """Lengths of documents that are given by where they start."""
    starts = arguments.int_list(operation, name, cu_seqlens, (1,))
    lengths = [stop - start for start, stop in pairwise(starts)]
    if not starts or starts[0] != 0 or min(lengths, default=0) < 0:
        raise ArgumentError(
            f"{operation}: {name} is {_short(starts)}, expected 0, where each next document starts, and the total"
        )
    return [lengths]


def _refuse_ids(operation: str, rows: list[list[int]]) -> None:
    """An error where numbers may as well be the document of each token, or where documents start.

    What passes here, and is no lengths, adds up to more tokens than it has entries: so a call of its tokens refuses it.
    """
    several = all(len(row) > 1 for row in rows)
    lowest = min((number for row in rows for number in row), default=0)
    if lowest < 0:
        what = f"{lowest}, which is no length,"
    elif several and all(sum(row) <= len(row) for row in rows):
        what = f"{len(rows[0])} numbers that add up to {sum(rows[0])}"
    elif several and all(row[0] == 0 and row == sorted(row) for row in rows):
        what = f"numbers that ascend from 0 to {rows[0][-1]}"
    else:
        return
    raise ArgumentError(
        f"{operation}: got {what} by position, expected the lengths of documents; say which they are: lengths=..., "
        "ids=... (the document of each token) or cu_seqlens=... (where each starts, and the total)"
    )


def _check(operation: str, name: str, rows: list[list[int]]) -> None:
    for row in rows:
        _within_limits(operation, name, row)


def prefixes(operation: str, lengths: Ints, given: Ints) -> tuple[list[int], list[int]]:
    """Lengths of documents and of the prefix of each, which is no longer than its document."""
    documents, heads = single(operation, "lengths", lengths), single(operation, "prefixes", given)
    if len(documents) != len(heads):
        raise ArgumentError(f"{operation}: {len(documents)} lengths and {len(heads)} prefixes; they must pair up")
    for place, (length, prefix) in enumerate(zip(documents, heads, strict=True)):
        if prefix > length:
            raise ArgumentError(
                f"{operation}: prefixes[{place}] is {prefix}, expected at most its document's {length} tokens"
            )
    return documents, heads


def parts(operation: str, documents: Questions) -> list[Part]:
    """Questions and their answers, in the order of their tokens."""
    if not isinstance(documents, Sequence) or isinstance(documents, str):
        raise ArgumentTypeError(
            f"{operation}: documents is a {type(documents).__name__}, expected a list of "
            "(question length, [answer lengths])"
        )
    found: list[Part] = []
    start = 0
    for number, document in enumerate(documents):
        name = f"documents[{number}]"
        if not isinstance(document, Sequence) or isinstance(document, str) or len(document) != 2:
            raise ArgumentTypeError(
                f"{operation}: {name} is {document!r}, expected (question length, [answer lengths])"
            )
        question = arguments.integer(operation, f"the question of {name}", document[0])
        answers = single(operation, f"the answers of {name}", document[1])
        end = start + question + sum(answers)
        for place, length in enumerate((question, *answers)):
            found.append(Part(start, start + length, number, end, place == 0))
            start += length
    return found


def segments(operation: str, name: str, given: Stretches) -> list[tuple[int, int]]:
    """Segments as (start, stop) in ascending order, the empty ones left out; no two overlap."""
    table = arguments.int_table(operation, name, given, (1, 2))
    if table.numel() == 0:
        return []
    if table.ndim != 2 or table.shape[1] != 2:
        raise ArgumentError(
            f"{operation}: {name} has shape {tuple(table.shape)}, expected a (start, length) for each segment"
        )
    found: list[tuple[int, int]] = []
    for start, length in sorted(arguments.int_list(operation, name, table, (2,))):
        if start < 0 or length < 0:
            raise ArgumentError(f"{operation}: {name} holds ({start}, {length}), expected starts and lengths from 0")
        if length and found and start < found[-1][1]:
            raise ArgumentError(
                f"{operation}: {name} overlap at token {start}, expected disjoint ones; give their union as one"
            )
        if length:
            found.append((start, start + length))
    _within_limits(operation, name, [stop for _, stop in found[-1:]])
    return found


def evictions(operation: str, given: Any) -> Tensor:
    """(B, H, S) integers, a view of what was passed; B and H of 1 serve all."""
    table = arguments.int_table(operation, "evicted_at", given, (1, 2, 3))
    with modes.off():
        return table[None, None] if table.ndim == 1 else table[:, None] if table.ndim == 2 else table


def by_token(values: Sequence[int], lengths: Sequence[int], tokens: int, rest: int) -> Tensor:
    """(tokens,) int32: each value as often as its length says, in order; `rest` after the last.

    Args:
        values: one for each stretch of tokens.
        lengths: tokens of each stretch.
        tokens: how many entries to make; stretches that go beyond are cut.
        rest: value of the entries after all stretches.
    """
    with modes.off():
        given = torch.tensor(values, dtype=torch.int32).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        table = torch.full((tokens,), rest, dtype=torch.int32)
        table[: len(given)] = given[:tokens]
        return table


def numbers(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The document of each token, (B, longest total) int32, -1 after a row's last, and each row's total, (B,) int64."""
    longest = max(*map(sum, lists), 1)
    with modes.off():
        totals = torch.tensor([sum(row) for row in lists], dtype=torch.int64)
        return torch.stack([by_token(range(len(row)), row, longest, -1) for row in lists]), totals


def diagonals(sizes: Packing, align: Align, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    """The first key that each query sees of its document, and one past the last: (B, longest total) int32, ascending.

    A query sees from `left` keys before the one that it is aligned with to `right` after it; None is without end.
    """
    tokens = max(*(sum(row) for row in sizes.rows), 1)
    with modes.off():
        found = [_diagonal(*row, tokens, align, left, right) for row in zip(sizes.rows, sizes.kv_rows, strict=True)]
        start, stop = (torch.stack(parts) for parts in zip(*found, strict=True))
    return start, stop


def _diagonal(
    row: list[int], kv_row: list[int], tokens: int, align: Align, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    lengths, kv_lengths = torch.tensor(row, dtype=torch.int64), torch.tensor(kv_row, dtype=torch.int64)
    ends, kv_ends = lengths.cumsum(0), kv_lengths.cumsum(0)
    starts, kv_starts = ends - lengths, kv_ends - kv_lengths
    ahead = kv_ends - ends if align == "bottom_right" else kv_starts - starts
    first, end, ahead = (x.repeat_interleave(lengths) for x in (kv_starts, kv_ends, ahead))
    at = torch.arange(len(ahead)) + ahead
    start = first if left is None else (at - left).clamp(first, end)
    stop = end if right is None else (at + right + 1).clamp(first, end)
    rest = tokens - len(at)  # sees nothing; to ascend, its ends are at the end
    start, stop = (pad(x, (0, rest), value=sum(kv_row)).int() for x in (start, stop))
    return start, stop


def _within_limits(operation: str, name: str, lengths: list[int]) -> None:
    lowest, total = min(lengths, default=0), sum(lengths)
    if lowest < 0:
        raise ArgumentError(f"{operation}: {name} holds {lowest}, expected lengths of at least 0")
    if total > arguments.MOST_TOKENS:
        raise ArgumentError(f"{operation}: {name} reaches {total:,} tokens, expected at most {arguments.MOST_TOKENS:,}")


def _short(values: list[int]) -> str:
    return f"{values[:6]}"[:-1] + (", ...]" if len(values) > 6 else "]")
