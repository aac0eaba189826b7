"""Lengths of what is packed into a sequence -> checked lists, and tables with an entry for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskflash import arguments
from maskflash.errors import ArgumentError, ArgumentTypeError

Ints = Tensor | Sequence[int]
Lengths = Tensor | Sequence[int] | Sequence[Sequence[int]]
Questions = Sequence[tuple[int, Ints]]
Segments = Tensor | Sequence[tuple[int, int]]


class Part(NamedTuple):
    """A question or an answer, in tokens from the start of the sequence; the last one excluded."""

    start: int
    stop: int
    document: int
    document_stop: int
    is_question: bool


def rows(name: str, lengths: Lengths) -> list[list[int]]:
    """The lengths of `document` as one list for each batch row; a single list serves all rows."""
    nested = isinstance(lengths, Sequence) and len(lengths) > 0 and isinstance(lengths[0], Sequence | Tensor)
    if nested:  # rows may differ in their number of documents
        found = [arguments.int_table("document", name, row, (1,)).tolist() for row in lengths]
    else:
        table = arguments.int_table("document", name, lengths, (1, 2)).tolist()
        found = table if table and isinstance(table[0], list) else [table]
    for row in found:
        _at_least_0("document", name, row)
    return found


def single(operation: str, name: str, lengths: Ints) -> list[int]:
    """Lengths that serve all batch rows."""
    found: list[int] = arguments.int_table(operation, name, lengths, (1,)).tolist()
    _at_least_0(operation, name, found)
    return found


def from_starts(cu_seqlens: Any) -> list[int]:
    """Lengths of documents that are given by where they start."""
    starts = arguments.int_table("document", "cu_seqlens", cu_seqlens, (1,)).long()
    lengths: list[int] = starts.diff().tolist()
    if len(starts) == 0 or starts[0] != 0 or min(lengths, default=0) < 0:
        raise ArgumentError(
            f"document: cu_seqlens is {_short(starts)}, expected 0, where each next document starts, and the total"
        )
    return lengths


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


def segments(operation: str, given: Segments) -> list[tuple[int, int]]:
    """Segments as (start, stop) in ascending order, the empty ones left out; no two overlap."""
    table = arguments.int_table(operation, "segments", given, (1, 2))
    if table.numel() == 0:
        return []
    if table.ndim != 2 or table.shape[1] != 2:
        raise ArgumentError(
            f"{operation}: segments has shape {tuple(table.shape)}, expected a (start, length) for each segment"
        )
    found: list[tuple[int, int]] = []
    for start, length in sorted(table.tolist()):
        if start < 0 or length < 0:
            raise ArgumentError(f"{operation}: segments holds ({start}, {length}), expected starts and lengths from 0")
        if length and found and start < found[-1][1]:
            raise ArgumentError(
                f"{operation}: segments overlap at token {start}, expected disjoint ones; give their union as one"
            )
        if length:
            found.append((start, start + length))
    return found


def evictions(operation: str, given: Any) -> Tensor:
    """(B, H, S) integers, a view of what was passed; B and H of 1 serve all."""
    table = arguments.int_table(operation, "evicted_at", given, (1, 2, 3))
    return table[None, None] if table.ndim == 1 else table[:, None] if table.ndim == 2 else table


def by_token(values: Sequence[int], lengths: Sequence[int], tokens: int, rest: int) -> Tensor:
    """(tokens,) int32: each value as often as its length says, in order; `rest` after the last.

    Args:
        values: one for each stretch of tokens.
        lengths: tokens of each stretch.
        tokens: how many entries to make; stretches that go beyond are cut.
        rest: value of the entries after all stretches.
    """
    given = torch.tensor(values, dtype=torch.int32).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    table = torch.full((tokens,), rest, dtype=torch.int32)
    table[: len(given)] = given[:tokens]
    return table


def numbers(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The document of each token, (B, longest total) int32, -1 after a row's last, and each row's total, (B,) int64."""
    totals = torch.tensor([sum(row) for row in lists], dtype=torch.int64)
    longest = max(int(totals.max()), 1)
    return torch.stack([by_token(range(len(row)), row, longest, -1) for row in lists]), totals


def _at_least_0(operation: str, name: str, lengths: list[int]) -> None:
    lowest = min(lengths, default=0)
    if lowest < 0:
        raise ArgumentError(f"{operation}: {name} holds {lowest}, expected lengths of at least 0")


def _short(values: Tensor) -> str:
    shown = values[:6].tolist()
    return f"{shown}"[:-1] + (", ...]" if len(values) > 6 else "]")
