"""A problem <-> slices as MagiAttention takes them: rectangles of pairs, each whole or cut by diagonals.

    k0      k1   k0      k1   k0      k1   k0      k1
    ■ ■ ■ ■ ■    ■ ■ ■ · ·    ■ ■ ■ ■ ■    ■ ■ ■ · ·   q0     last key moves by one a row: causal, bi-causal
    ■ ■ ■ ■ ■    ■ ■ ■ ■ ·    · ■ ■ ■ ■    · ■ ■ ■ ·          first key moves: inverse causal, bi-causal
    ■ ■ ■ ■ ■    ■ ■ ■ ■ ■    · · ■ ■ ■    · · ■ ■ ■   q1
    0 full       1 causal     2 inverse    3 bi-causal

An interval of keys that a row sees goes on in the next row if each of its ends stays there or moves by one. As the
intervals of a row are apart, at most one of the next row's goes on from it: so intervals are chains, and a slice is a
stretch of a chain with equal steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.errors import ArgumentError, UnsupportedMask
from maskflash.forms.row_intervals import RowIntervals, find_row_intervals
from maskflash.forms.row_mask import RowMask, united
from maskflash.ground import arguments, modes
from maskflash.masks.lines import Line
from maskflash.masks.mask import Mask

FULL: Final = 0
CAUSAL: Final = 1
INVERSE_CAUSAL: Final = 2
BI_CAUSAL: Final = 3

_NAMES: Final = ("full", "causal", "inverse causal", "bi-causal")
_MOST_TOKENS: Final = 2**31 - 1  # of all batch rows together


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """Disjoint slices whose union is a mask, in the order of their first queries and keys.

    MagiAttention's `flex_flash_attn_func` takes them as they are: q_ranges, k_ranges, and types as attn_type_map. Query
    q of batch row b is token b*q_len + q, and key kv is token b*kv_len + kv. A query may be in several slices.

    Attributes:
        q_ranges: (slices, 2) int32, first query of each, and one past its last.
        k_ranges: (slices, 2) int32, first key of each, and one past its last.
        types: (slices,) int32. 0 is full; 1 causal, aligned to the bottom right: query q1 - i sees keys up to k1 - i;
            2 inverse causal, aligned to the top left: query q0 + i sees keys from k0 + i on; 3 both.
    """

    q_ranges: Tensor
    k_ranges: Tensor
    types: Tensor

    def __len__(self) -> int:
        return len(self.types)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each type."""
        return dict(zip(_NAMES, torch.bincount(self.types, minlength=len(_NAMES)).tolist(), strict=True))

    def __repr__(self) -> str:
        told = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        return f"Slices({told or 'none'})"


def find_slices(problem: Problem) -> Slices:
    """The slices of a problem's mask, on its device.

    Raises:
        UnsupportedMask: heads that see different keys, with the first such row; or too many tokens for 32 bits.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    longest = problem.batch * max(problem.q_len, problem.kv_len)
    if longest > _MOST_TOKENS:
        raise UnsupportedMask(
            f"to_slices: {problem.batch} batch rows have {longest:,} tokens, and slices number at most "
            f"{_MOST_TOKENS:,}; make them of fewer batch rows at a time"
        )
    found = find_row_intervals(problem)
    row, start, stop = _along_tokens(found, *_of_one_head(found))
    order, linked, kind = _chains(row, start, stop, found.batch * found.kv_len)
    joined = _stretches(linked, kind)
    before = torch.cat((joined.new_zeros(min(len(joined), 1)), joined[:-1]))
    first, last = order[~before], order[~joined]
    q_ranges, k_ranges = torch.stack((row[first], row[last] + 1), 1), torch.stack((start[first], stop[last]), 1)
    types = torch.where(joined, kind, FULL)[~before]
    by_place = (q_ranges[:, 0] * (_MOST_TOKENS + 1) + k_ranges[:, 0]).argsort()
    return Slices(*(x[by_place].int().to(problem.device) for x in (q_ranges, k_ranges, types)))


def _of_one_head(found: RowIntervals) -> tuple[Tensor, Tensor, Tensor]:
    """Row b*q_len + q, start and stop of the intervals of head 0, if the others have the same."""
    batch, heads = found.shape
    ends = found.offsets[:: max(found.q_len, 1)] if found.q_len else found.offsets.expand(batch * heads + 1)
    units = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    every = found.rows, found.start, found.stop
    parts = []
    for b in range(batch):
        first, *others = ([x[slice(*units[b * heads + h])] for x in every] for h in range(heads))
        rows = first[0] - b * heads * found.q_len
        for h, other in enumerate(others, 1):
            theirs = [other[0] - (b * heads + h) * found.q_len, *other[1:]]
            least = min(len(rows), len(theirs[0]))
            unlike = torch.stack([x[:least] != y[:least] for x, y in zip((rows, *first[1:]), theirs, strict=True)])
            if len(rows) != len(theirs[0]) or bool(unlike.any()):
                q = _first_unlike(rows, theirs[0], unlike.any(0))
                raise UnsupportedMask(
                    f"to_slices: row {q} of batch row {b} sees {_told(found.row(q, b=b, h=h))} in head {h} and "
                    f"{_told(found.row(q, b=b))} in head 0; slices are for all heads; make them of each "
                    "head's own mask"
                )
        parts.append((rows + b * found.q_len, *first[1:]))
    row, start, stop = (torch.cat(x) for x in zip(*parts, strict=True))
    return row, start, stop


def _first_unlike(rows: Tensor, theirs: Tensor, unlike: Tensor) -> int:
    """The first row in which two lists of intervals differ."""
    least = len(unlike)
    at = int(unlike.long().argmax()) if bool(unlike.any()) else least
    return min(int(x[at]) for x in (rows, theirs) if at < len(x))


def _told(line: Line) -> str:
    """What a row sees, in words."""
    runs = [f"{a} to {z - 1}" if z - a > 1 else f"{a}" for a, z in line[:4]]
    return f"the keys {', '.join(runs)}{', ...' if len(line) > 4 else ''}" if line else "nothing"


def _along_tokens(found: RowIntervals, row: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals of all batch rows, one after the other along queries and keys."""
    if found.shape[0] == found.batch:
        moved = row // max(found.q_len, 1) * found.kv_len
        return row, start + moved, stop + moved
    b = torch.arange(found.batch)[:, None]
    queries, keys = b * found.q_len, b * found.kv_len
    return (row + queries).flatten(), (start + keys).flatten(), (stop + keys).flatten()


def _chains(row: Tensor, start: Tensor, stop: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The intervals in the order of their chains, whether each goes on in the next, and by which step (a type)."""
    width = keys + 1
    place = row * width + start
    below = place + width  # of an interval in the next row that begins at the same key
    after = torch.searchsorted(place, below).clamp_(max=max(len(place) - 1, 0))
    right, longer = place[after] - below, stop[after] - stop
    linked = (right >= 0) & (right <= 1) & (longer >= 0) & (longer <= 1)
    kind = 2 * right + longer
    one = linked.nonzero()[:, 0]
    chain = torch.arange(len(row))
    if torch.equal(after[one], one + 1):  # as where rows have one interval each
        return chain, linked, kind
    chain[after[one]] = one
    while True:  # until each knows the first of its chain; twice as far each time
        further = chain[chain]
        if torch.equal(further, chain):
            break
        chain = further
    order = chain.argsort(stable=True)
    return order, linked[order], kind[order]


def _stretches(linked: Tensor, kind: Tensor) -> Tensor:
    """Whether each interval and the next one of its chain are in one slice: as far as steps are equal, and no farther.

    The step after a stretch leads to the next one, and is in neither. So it is missing from the run of equal steps that
    it begins, and a run of this step alone is no stretch:

        steps      F F F C C I I    F C I C
        stretches  F F F   C   I    F   I     where the next begins is left out
    """
    before = torch.cat((linked.new_zeros(min(len(linked), 1)), linked[:-1]))
    changes = torch.cat((linked.new_ones(min(len(linked), 1)), kind[1:] != kind[:-1]))
    begins = linked & (changes | ~before)
    first = begins.nonzero()[:, 0]
    run = begins.cumsum(0) - 1
    length = torch.bincount(run[linked], minlength=len(first))
    number = torch.arange(len(first))
    leads = ~before[first]  # the first run of its chain loses nothing
    single = torch.cat((length.new_zeros(min(len(first), 1)), length[:-1])) == 1
    known = number.where(leads | ~single, 0).cummax(0).values  # from there on, one loses its step and the next doesn't
    loses = ~leads[known] ^ ((number - known) % 2 == 1)
    joined = linked.clone()
    joined[first[loses]] = False
    return joined


def from_slices(q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None = None) -> Mask:
    """MagiAttention's slices as a mask: it combines with & | ^ ~, and is pickled by its numbers.

    Args:
        q_ranges: (slices, 2) integers, first query of each slice, and one past its last.
        k_ranges: (slices, 2) integers, first key of each, and one past its last.
        types: (slices,) integers, 0 full, 1 causal to the bottom right, 2 inverse causal to the top left, 3 both; None
            where all are full.

    Returns:
        A mask for calls at least as long as the ranges, without offsets: other queries see nothing.

    Raises:
        ArgumentTypeError: something that holds no integers.
        ArgumentError: shapes, ranges or types that mean nothing, or slices that overlap: their common pairs would count
            twice.

    Source: SandAI, MagiAttention, magi_attention/functional/flex_flash_attn.py.

    Example:
        >>> from_slices([[0, 2], [2, 4]], [[0, 2], [1, 4]], [1, 3]).dense(4, 4)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    call = "from_slices"
    with modes.off():
        queries, keys, kinds = _checked(call, q_ranges, k_ranges, types)
        length = queries[:, 1] - queries[:, 0]
        owner = torch.repeat_interleave(torch.arange(len(length)), length)
        down = torch.arange(len(owner)) - (length.cumsum(0) - length)[owner]  # rows from the slice's first
        start = keys[owner, 0] + down * (kinds[owner] >= INVERSE_CAUSAL)
        stop = keys[owner, 1] - (length[owner] - 1 - down) * (kinds[owner] % 2)
        some = start < stop
        owner, row, start, stop = (x[some] for x in (owner, queries[owner, 0] + down, start, stop))
        q_len, kv_len = (int(x.max()) if len(x) else 0 for x in (queries, keys))
        order = (row * (kv_len + 1) + start).argsort()
        owner, row, start, stop = (x[order] for x in (owner, row, start, stop))
        twice = (row[1:] == row[:-1]) & (start[1:] < stop[:-1])
        if bool(twice.any()):
            at = int(twice.long().argmax())
            first, second = sorted(owner[at : at + 2].tolist())
            raise ArgumentError(
                f"{call}: slices {first} and {second} overlap at query {int(row[at])}, key {int(start[at + 1])}, "
                "expected disjoint ones: their common pairs would count twice"
            )
        return RowMask(call, united(row, start, stop, (q_len, kv_len), (1, 1)), padded=True)


def _checked(call: str, q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges and types as int64 on the CPU."""
    found = []
    for name, given in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
        table = _numbers(call, name, given, 2)
        if table.numel() == 0:
            table = table.reshape(0, 2)
        if table.shape[1] != 2:
            raise ArgumentError(f"{call}: {name} has shape {tuple(table.shape)}, expected (slices, 2)")
        wrong = (table[:, 0] < 0) | (table[:, 1] < table[:, 0]) | (table[:, 1] > arguments.MOST_TOKENS)
        if bool(wrong.any()):
            number = int(wrong.long().argmax())
            raise ArgumentError(
                f"{call}: slice {number} has {name} {tuple(table[number].tolist())}, expected 0 <= start <= stop <= "
                f"{arguments.MOST_TOKENS:,}"
            )
        found.append(table)
    queries, keys = found
    kinds = torch.zeros(len(queries), dtype=torch.int64) if types is None else _numbers(call, "types", types, 1)
    for name, table in (("k_ranges", keys), ("types", kinds)):
        if len(table) != len(queries):
            raise ArgumentError(f"{call}: {name} has {len(table)} entries, expected {len(queries)} as q_ranges has")
    wrong = (kinds < FULL) | (kinds > BI_CAUSAL)
    if bool(wrong.any()):
        number = int(wrong.long().argmax())
        raise ArgumentError(
            f"{call}: slice {number} has type {int(kinds[number])}, expected 0 full, 1 causal, 2 inverse causal or "
            "3 bi-causal"
        )
    return queries, keys, kinds


def _numbers(call: str, name: str, given: Tensor, dims: int) -> Tensor:
    """An integer table as int64 on the CPU; an empty list is one of any dimensions."""
    table = arguments.int_table(call, name, given, (dims, 1))
    if table.ndim != dims and table.numel():
        raise ArgumentError(f"{call}: {name} has shape {tuple(table.shape)}, expected (slices, 2)")
    if arguments.without_data(table):
        raise ArgumentError(f"{call}: {name} has no data, expected numbers, which are read now")
    return table.detach().to("cpu", torch.int64)
