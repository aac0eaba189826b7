"""Any mask <-> the form that serving engines take for images: (causal and window) or bidirectional ranges.

    position 0   ■ · · · · ·      window of 2 tokens (the token itself counts),
             1   ■ ■ · · · ·      range [2, 4]: its tokens see one another
             2   · ■ ■ ■ ■ ·
             3   · · ■ ■ ■ ·
             4   · · ■ ■ ■ ·
             5   · · · · ■ ■

Positions are those of keys; the queries are the last ones. A range has both its ends, and one of a single token says
nothing. Every row sees one interval: its window and the ranges that it is in all hold its own position.
Source: compute_kv_seq_mask in vLLM's triton_unified_attention helpers, and compute_mm_prefix_range_tensor beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.errors import ArgumentError, UnsupportedMask
from maskflash.forms.headless import sequence_intervals
from maskflash.forms.row_intervals import RowIntervals
from maskflash.functions.sizes import Fits
from maskflash.ground import arguments
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRanges:
    """A mask as a window and bidirectional ranges, by vLLM's names.

    Attributes:
        sliding_window: tokens that a token sees, itself and those before it; None for all.
        mm_prefix_range: (B, n, 2) int32, first and last position of each range; (0, 0) is none. None without ranges.
    """

    sliding_window: int | None
    mm_prefix_range: Tensor | None


def find_prefix_ranges(problem: Problem) -> PrefixRanges:
    """The window and the ranges of a problem's mask; the sequences are its batch rows.

    Raises:
        UnsupportedMask: no window and ranges show what a row sees, the first of them; or heads differ.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    found = sequence_intervals("to_prefix_ranges", problem)
    position = torch.arange(problem.q_len) + problem.kv_len - problem.q_len
    first, last = _one_interval(found, position)
    window = _window(first, position)
    ranges = [_ranges(*row, position, window) for row in zip(first, last, strict=True)]
    for b, held in enumerate(ranges):
        low, high = _seen(held, position, window)
        wrong = ((low != first[b]) | (high != last[b])).nonzero()
        if len(wrong):
            q = int(wrong[0])
            raise _refusal(f"row {q} of batch row {b} sees {int(first[b, q])} to {int(last[b, q])}", position[q])
    most = max(map(len, ranges), default=0)
    table = torch.zeros(len(ranges), most, 2, dtype=torch.int32)
    for b, held in enumerate(ranges):
        table[b, : len(held)] = held
    return PrefixRanges(window, table.to(problem.device) if most else None)


def _refusal(what: str, position: Tensor) -> UnsupportedMask:
    return UnsupportedMask(
        f"to_prefix_ranges: {what}, which no window and ranges show: position {int(position)} is to see one interval "
        "that holds it, alike for all that share a range. Use the mask itself: compile(mask) needs no ranges"
    )


def _one_interval(found: RowIntervals, position: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last key that each row sees: two (B, q_len); every row sees one interval, with itself in it."""
    one = found.count == 1
    row = found.rows
    first, last = (torch.full_like(found.count, -1).index_put((row,), x) for x in (found.start, found.stop - 1))
    here = position.repeat(found.shape[0])
    wrong = (~(one & (first <= here) & (here <= last))).nonzero()
    if len(wrong):
        r = int(wrong[0])
        b, q = divmod(r, found.q_len)
        what = f"{int(found.count[r])} intervals" if not one[r] else f"{int(first[r])} to {int(last[r])}"
        raise _refusal(f"row {q} of batch row {b} sees {what}", here[r])
    return first.view(found.shape[0], found.q_len), last.view(found.shape[0], found.q_len)


def _window(first: Tensor, position: Tensor) -> int | None:
    """The window that rows which don't see the first key allow: ranges only show more. None where all see it."""
    reach = (position - first + 1)[first > 0]
    return int(reach.min()) if len(reach) else None


def _ranges(first: Tensor, last: Tensor, position: Tensor, window: int | None) -> Tensor:
    """The ranges that rows of one sequence may be in, none within another: (n, 2), ascending.

    A range is told by its last key, which its rows see ahead of them, from the first row that sees so far; and by its
    first key, where its last rows see beyond their window.
    """
    ahead, back = last > position, first < _opening(position, window)
    ends = torch.stack((_extreme(last[ahead], position[ahead], "amin"), last[ahead].unique()), 1)
    starts = torch.stack((first[back].unique(), _extreme(first[back], position[back], "amax")), 1)
    found = torch.cat((ends, starts))
    found = found[(found[:, 0] * (int(found.max() if len(found) else 0) + 1) - found[:, 1]).argsort()]
    farthest = torch.cat((found.new_full((1,), -1), found[:, 1].cummax(0).values))[:-1]
    return found[found[:, 1] > farthest]


def _opening(position: Tensor, window: int | None) -> Tensor:
    """The first key of each row's window."""
    return torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)


def _extreme(group: Tensor, value: Tensor, which: str) -> Tensor:
    """The least or the greatest value of each group, groups ascending."""
    names, of = group.unique(return_inverse=True)
    return torch.zeros_like(names).scatter_reduce(0, of, value, which, include_self=False)


def _seen(ranges: Tensor, position: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """The first and the last key that rows see by a window and ranges, none within another."""
    low, high = _opening(position, window), position
    if not len(ranges):
        return low, high
    # Both ends ascend: the ranges that hold a position are those from the first that reaches it to the last before it.
    first = torch.searchsorted(ranges[:, 1].contiguous(), position)
    last = torch.searchsorted(ranges[:, 0].contiguous(), position, right=True) - 1
    inside = first <= last
    first, last = (x.clamp(0, len(ranges) - 1) for x in (first, last))
    return (
        torch.minimum(low, ranges[first, 0].where(inside, low)),
        torch.maximum(high, ranges[last, 1].where(inside, high)),
    )


def from_prefix_ranges(mm_prefix_range: Tensor | None = None, sliding_window: int | None = None) -> Mask:
    """A window and bidirectional ranges, as vLLM takes them for images, as a mask.

        visible = (kv <= q and q - kv < sliding_window) or first <= q, kv <= last of a range

    It counts positions: where there are fewer queries than keys, pass `q_offset=kv_len - q_len`.

    Args:
        mm_prefix_range: (B, n, 2) or (n, 2) ints, first and last position of each range; one whose last is not after
            its first says nothing. None for no ranges. B of 1 serves any batch.
        sliding_window: tokens that a token sees, itself and those before it; None for all.

    Raises:
        ArgumentTypeError: ranges that hold no integers.
        ArgumentError: another shape, a position below 0, a window of no token.

    Example:
        >>> from_prefix_ranges(torch.tensor([[1, 3]]), sliding_window=2).dense(5, 5)[0, 0].int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 1, 1, 0],
                [0, 1, 1, 1, 0],
                [0, 1, 1, 1, 0],
                [0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    operation = "from_prefix_ranges"
    window = None if sliding_window is None else arguments.distance(operation, "sliding_window", sliding_window, low=1)

    def near(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= q if window is None else kv <= q and q - kv < window

    name = f"{operation}(sliding_window={window})"
    if mm_prefix_range is None:
        return Predicate(near, name)
    table = arguments.int_table(operation, "mm_prefix_range", mm_prefix_range, (2, 3))
    arguments.held(operation, "mm_prefix_range", table)
    if table.shape[-1] != 2 or 0 in table.shape[:-2]:
        raise ArgumentError(
            f"{operation}: mm_prefix_range has shape {tuple(table.shape)}, expected (B, n, 2) or (n, 2), the first and "
            "the last position of each range"
        )
    table = table.long() if table.ndim == 3 else table.long()[None]
    if bool((table < 0).any()):
        raise ArgumentError(
            f"{operation}: mm_prefix_range holds {int(table.min())}, expected positions, which are at least 0; pad "
            "with (0, 0)"
        )
    if table.numel() and int(table.max()) >= arguments.MOST_TOKENS:
        raise ArgumentError(
            f"{operation}: mm_prefix_range holds {int(table.max())}, expected positions below {arguments.MOST_TOKENS:,}"
        )
    low, high = _by_position(table)
    batch, length = low.shape

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        if near(b, h, q, kv):
            return True
        at = b if batch > 1 else 0
        return 0 <= q < length and low[at, q] <= kv and kv <= high[at, q]

    count = int((table[..., 0] < table[..., 1]).sum())
    fits = Fits(batch=batch) if batch > 1 else None
    return Predicate(visible, f"{operation}({count} ranges, sliding_window={window})", fits)


def _by_position(table: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last key that each position sees by its ranges, itself where it is in none: (B, length) each.

    All ranges of a position hold it, so together they are one interval.
    """
    length = int(table.max()) + 1 if table.numel() else 0
    position = torch.arange(length, device=table.device)
    seen = []
    for ranges in table:
        held = ranges[ranges[:, 0] < ranges[:, 1]]
        held = held[(held[:, 0] * (length + 1) - held[:, 1]).argsort()]
        farthest = torch.cat((held.new_full((1,), -1), held[:, 1].cummax(0).values))[:-1]
        held = held[held[:, 1] > farthest]  # none within another
        ends = _seen(held, position, 1)
        seen.append(ends)
    low, high = (torch.stack(x) for x in zip(*seen, strict=True))
    return low, high
