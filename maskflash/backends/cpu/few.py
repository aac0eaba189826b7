"""Few rows over many keys -> attention under a mask that is evaluated then and there: a step of decoding.

    keys       first                 stop
    row 0    . . # # # # # # # # . . . .     the kernel gets the columns from the first that some row sees to the last,
    row 1    . . # # # # # # # # # . . .     and what is hidden of them; columns that no row sees are left out

All pairs of few rows cost little beside reading their keys. So nothing is planned, and nothing is kept: a step costs
the same whatever moved since the last one, be it an offset, a length or a table. Query heads that share a key head are
rows of one product, which reads the keys once. Columns that all rows see are computed without a mask where they are
most, as a cache before a tree of drafts is. Long stretches of keys are computed in parts of one size, merged by lse, so
that one head has work for several cores; the parts are the same whatever else is computed, and on how many cores.

Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023), for the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import BoolArray
from maskflash.backends.cpu.costs import candidates
from maskflash.backends.cpu.scored import ScoredPairs, attend
from maskflash.backends.cpu.softmax import merge_some
from maskflash.backends.cpu.views import prepared
from maskflash.backends.merge import merge
from maskflash.backends.sinks import add_sinks
from maskflash.scores.strength import BoundScore

_ROWS: Final = 128  # at most
_WIDE: Final = 4  # keys for each row, at least: in squares a plan leaves out more than it costs
_PAIRS: Final = 1 << 20  # evaluated at each call, at most
_LEAD: Final = 1 << 17  # rows x columns that all rows see, from which on they are computed by themselves
_PART: Final = 4096  # keys
_PARTS: Final = 4  # at least: joining fewer costs more than it gains

_FIRST: Final = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device="cpu")

_kernel = torch._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What the rows of one unit of the mask see.

    Attributes:
        start: first column that some row sees.
        stop: one past the last; not after start where they see nothing.
        columns: (n,) int64, those between them that some row sees; None for all.
        hidden: (heads, q_len, n) bool, what of these columns rows don't see; heads is 1 where they see the same. None
            where nothing is hidden.
    """

    start: int
    stop: int
    columns: Tensor | None
    hidden: Tensor | None

    @property
    def plain(self) -> tuple[int, int] | None:
        """Start and stop, where that is all."""
        return (self.start, self.stop) if self.columns is None and self.hidden is None else None


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Batch rows and key heads whose rows see the same.

    Attributes:
        batch: the batch rows.
        kv_heads: the key heads.
        window: what is seen.
    """

    batch: slice
    kv_heads: slice
    window: Window


def are_few(batch: int, heads: int, q_len: int, kv_len: int) -> bool:
    """Whether so many rows are computed here, of a mask with so many batch rows and heads of its own."""
    return 0 < q_len <= _ROWS and _WIDE * q_len <= kv_len and batch * heads * q_len * kv_len <= _PAIRS


def look(problem: Problem) -> Tensor:
    """What the few rows of a problem see, (batch or 1, heads or 1, q_len, kv_len) bool.

    Raises:
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.
    """
    sizes = *problem.shape[:2], problem.q_len, problem.kv_len
    places = [along(axis, n) for axis, n in enumerate(sizes)]
    return problem.visible(*places).expand(sizes)


def along(axis: int, count: int) -> Tensor:
    """0 to count, along one of the four axes b, h, q and kv."""
    if count == 1:
        return _FIRST
    return torch.arange(count, device="cpu").view((1,) * axis + (count,) + (1,) * (3 - axis))


def scored(score: BoundScore, batch: int, heads: int, q_len: int, kv_len: int) -> ScoredPairs:
    """A score function on all pairs of a call."""
    b, h, *tokens = (along(axis, n) for axis, n in enumerate((batch, heads, q_len, kv_len)))
    offsets = (x.long().view(-1, 1, 1, 1) if isinstance(x, Tensor) else x for x in (score.q_offset, score.kv_offset))
    q, kv = (x + offset for x, offset in zip(tokens, offsets, strict=True))
    return ScoredPairs(score, b, h, q, kv)


def units_of(bits: BoolArray, batch: int, heads: int, kv_heads: int) -> list[Unit]:
    """The units of a mask.

    Args:
        bits: (batch or 1, heads or 1, q_len, kv_len), what is visible; 1 where all see the same.
        batch: batch rows.
        heads: query heads.
        kv_heads: key heads.
    """
    own_batch, own_heads = bits.shape[:2]
    group = heads // kv_heads if own_heads > 1 else 1
    units: list[Unit] = []
    for b in range(own_batch):
        rows = slice(b, b + 1) if own_batch > 1 else slice(0, batch)
        for first in range(0, own_heads, group):
            head = first // group
            of = slice(head, head + 1) if own_heads > 1 else slice(0, kv_heads)
            window = _window(bits[b, first : first + group])
            last = units[-1] if units else None
            if last and last.kv_heads == of and last.window.plain and last.window.plain == window.plain:
                units[-1] = Unit(slice(last.batch.start, rows.stop), of, window)  # one call for both
            else:
                units.append(Unit(rows, of, window))
    return units


def _window(bits: BoolArray) -> Window:
    """What rows (heads, q_len, kv_len) see."""
    if bits.all():
        return Window(0, bits.shape[2], None, None)
    seen = bits.reshape(-1, bits.shape[-1])
    columns: BoolArray = seen[0] if len(seen) == 1 else np.logical_or.reduce(seen)
    start = int(columns.argmax())
    if not columns[start]:
        return Window(0, 0, None, None)
    stop = len(columns) - int(columns[::-1].argmax())
    some = None
    if columns[start:stop].all():
        bits = bits[..., start:stop]
    else:
        index = np.flatnonzero(columns)
        bits, some = bits[..., index], torch.from_numpy(index)
    return Window(start, stop, some, None if bits.all() else torch.from_numpy(~bits))


def forward(
    units: list[Unit],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sinks: Tensor | None,
    scored: ScoredPairs | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of few rows: see `run.forward`.

    Args:
        units: what they see.
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Skv, D).
        v: (B, Hkv, Skv, Dv).
        scale: factor of the scores.
        sinks: (Hq,), or None.
        scored: the score function on all pairs, or None.
    """
    batch, heads, q_len, _ = q.shape
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    if batch == 0:
        return q.new_zeros(0, heads, q_len, v.shape[3]), q.new_zeros((0, heads, q_len), dtype=total)
    group = heads // k.shape[1]
    if len(units) == 1:
        out, lse = (
            x.contiguous() for x in _attend(units[0].window, q, k, v, scale, scored)
        )  # tokens are before heads in them
    else:
        out = q.new_empty(batch, heads, q_len, v.shape[3], dtype=total)
        lse = q.new_empty(batch, heads, q_len, dtype=total)
        for unit in units:
            own = slice(unit.kv_heads.start * group, unit.kv_heads.stop * group)
            part = q[unit.batch, own], k[unit.batch, unit.kv_heads], v[unit.batch, unit.kv_heads]
            some = None if scored is None else scored.part(unit.batch, own)
            out[unit.batch, own], lse[unit.batch, own] = _attend(unit.window, *part, scale, some)
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _attend(
    window: Window, q: Tensor, k: Tensor, v: Tensor, scale: float, scored: ScoredPairs | None
) -> tuple[Tensor, Tensor]:
    """Out (n, heads, q_len, Dv) and lse (n, heads, q_len) of one unit."""
    n, heads, q_len, _ = q.shape
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    if window.start >= window.stop:
        return q.new_zeros(n, heads, q_len, v.shape[3]), q.new_full((n, heads, q_len), -torch.inf, dtype=total)
    if window.columns is not None:
        k, v = (x.index_select(2, window.columns) for x in (k, v))
    elif window.stop - window.start < k.shape[2]:
        k, v = k[:, :, window.start : window.stop], v[:, :, window.start : window.stop]
    if scored is not None:
        some = slice(window.start, window.stop) if window.columns is None else window.columns
        scored = scored.columns(some)
    return seen(q, k, v, None if window.hidden is None else window.hidden[None], scale, scored)


def seen(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, scored: ScoredPairs | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to columns of which each is seen by some row, or holds finite numbers.

    Args:
        q: (n, heads, q_len, D).
        k: (n, kv_heads, columns, D).
        v: (n, kv_heads, columns, Dv).
        hidden: (n or 1, heads or 1, q_len, columns) bool, what rows don't see; None for nothing. A single key head may
            have as many heads there as q has.
        scale: factor of the scores.
        scored: the score function on these pairs, or None.

    Returns:
        out (n, heads, q_len, Dv), in q's dtype or a wider one, and lse (n, heads, q_len).
    """
    if scored is not None:
        return attend(scored, q, k, v, hidden, scale)
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    compute, width, v_head_dim = total, max(q.shape[3], v.shape[3]), v.shape[3]
    if q.dtype != total:
        ways, rows = candidates("forward", q.dtype), q.shape[1] // k.shape[1] * q.shape[2]
        if min(ways, key=lambda way: way.of(rows, k.shape[2], masked=hidden is not None)).native:
            compute = q.dtype
    q, k, v = (prepared(x, compute, width) for x in (q, k, v))
    lead = 0 if hidden is None or compute.itemsize == 2 else _lead(hidden, q.shape[1] // k.shape[1] * q.shape[2])
    if hidden is None or not lead:
        out, lse = _seen(q, k, v, hidden, scale)
    else:
        out, lse = _seen(q, k[:, :, :lead], v[:, :, :lead], None, scale)
        merge_some(out, lse, *_seen(q, k[:, :, lead:], v[:, :, lead:], hidden[..., lead:], scale))
    return out if width == v_head_dim else out[..., :v_head_dim], lse


def _lead(hidden: Tensor, rows: int) -> int:
    """How many columns all rows see before the first of which something is hidden, if they are worth their own call."""
    if rows * hidden.shape[3] < _LEAD:
        return 0
    some = hidden.flatten(0, 2).any(0).numpy()
    lead = int(some.argmax())
    return lead if rows * lead >= _LEAD and 2 * lead >= len(some) else 0


def _seen(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Out (n, heads, q_len, D) and lse (n, heads, q_len) of rows that see these columns, but for what is hidden."""
    (n, heads, q_len, width), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    bias = None if hidden is None else _bias(hidden, kv_heads, group, q.dtype)
    out, lse = _parts(q.reshape(n, kv_heads, group * q_len, width), k, v, bias, scale)
    out, lse = out.reshape(q.shape), lse.reshape(n, heads, q_len)
    if hidden is not None and bool((blind := hidden.all(-1)).any()):  # of rows that see nothing the kernel's lse is 0
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _bias(hidden: Tensor, kv_heads: int, group: int, dtype: torch.dtype) -> Tensor:
    """0 and -inf for the kernel, (n or 1, kv_heads or 1, rows, columns)."""
    bias = hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    n, heads, rows, columns = bias.shape
    if heads > 1:
        return bias.view(n, kv_heads, group * rows, columns)
    return bias.expand(n, group, rows, columns).reshape(n, 1, group * rows, columns)


def _parts(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel on q (n, kv_heads, rows, D), the keys in parts where they are many: out, and lse."""
    n, kv_heads, rows, width = q.shape
    keys = k.shape[2]
    count = keys // _PART
    if (
        count < _PARTS or k.dtype.itemsize == 2
    ):  # a kernel of 16 bits rounds what it returns: once, not once for each part
        out, lse = _kernel(q, k, v, attn_mask=bias, scale=scale)
        return out, lse
    whole = keys // count * count
    # As many batch rows at once as have one stride from head to head.
    alike = n == 1 or all(x.stride(0) == kv_heads * x.stride(1) for x in (k, v))
    found: list[tuple[Tensor, Tensor]] = []
    for some in [slice(0, n)] if alike else [slice(row, row + 1) for row in range(n)]:
        of_heads = q[some].flatten(0, 1), k[some].flatten(0, 1), v[some].flatten(0, 1)
        own = bias
        if own is not None and (len(own) > 1 or own.shape[1] > 1):
            own = (own if len(own) == 1 else own[some]).expand(len(q[some]), kv_heads, -1, -1)
        own = None if own is None else own.flatten(0, 1)
        each = [_part(*of_heads, own, slice(0, whole), count, scale)]
        if whole < keys:
            each.append(_part(*of_heads, own, slice(whole, keys), 1, scale))
        found.append(merge(*(torch.cat(x) for x in zip(*each, strict=True))))
    out, lse = (torch.cat(x) for x in zip(*found, strict=True))
    return out.view(n, kv_heads, rows, width), lse.view(n, kv_heads, rows)


def _part(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tokens: slice, count: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel on some columns in parts side by side: out (parts, heads, rows, Dv), and lse."""
    queries = q[:, None].expand(-1, count, -1, -1)
    keys, values = (x[:, tokens].unflatten(1, (count, -1)) for x in (k, v))
    if bias is None:
        out, lse = _kernel(queries, keys, values, scale=scale)
        return out.transpose(0, 1), lse.transpose(0, 1)
    mask = bias[..., tokens].unflatten(2, (count, -1)).transpose(1, 2)
    out, lse = _kernel(queries, keys, values, attn_mask=mask, scale=scale)
    # Of a row that sees nothing of a part the kernel says 0.
    lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return out.transpose(0, 1), lse.transpose(0, 1)
