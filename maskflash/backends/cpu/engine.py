"""Scores and dropout -> attention by tiles of our own, forward and backward.

    for some rows, from the last to the first:
        for some columns:                  forward                              backward
            S = scale · q kᵀ               value = program(S)                   value, slopes = program(S)
            hidden pairs: value = -inf     P = exp(value - highest so far)      P = exp(value - lse)
                                           out = Σ P v, rescaled where the      dS = P ∘ (dO vᵀ - delta)
                                           highest has risen                    dq, dk, dv, and tables by slopes

Each tile stays in cache, on one core; cores have rows, heads and batch rows of their own. Rows and columns are those of
a plan's calls, and tiles that nobody sees are not computed. Source: Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import Tensor

from maskflash.backends.cpu.calls import Band, Call, Causal
from maskflash.backends.cpu.matrices import reach
from maskflash.backends.cpu.plan import Plan
from maskflash.backends.cpu.programs import Pairs, is_bounded, program_of
from maskflash.backends.cpu.softmax import exponentials, hide, merge_some, probabilities
from maskflash.backends.cpu.sums import CallSums, Sums, is_one, readings
from maskflash.backends.cpu.threads import WORKERS, Job
from maskflash.backends.cpu.values import Values
from maskflash.backends.cpu.views import prepared
from maskflash.backends.cpu.work import WIDTH, Work, lanes, share, works
from maskflash.expr.nodes import Expr
from maskflash.scores import dropout
from maskflash.scores.strength import Gradients, Strength

_PIECE: Final = 2  # tiles high is what of a long call's rows one job of forward computes


class _Buffers:
    """Memory of one job for its tiles."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor that is what this name had before."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size, dtype=self._dtype)
        return held[:size].view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """What one pass computes.

    Attributes:
        plan: which pairs are seen.
        strength: how strongly they attend.
        q: (B, Hq, Sq, D), of the dtype that is computed in; rows dense.
        k: (B, Hkv, Skv, D), likewise.
        v: (B, Hkv, Skv, Dv), likewise.
        bounded: whether what hidden pairs compute is finite.
        words: dropout's of rows and of columns; None without it.
        edges: masks of tiles on edges of bands.
    """

    plan: Plan
    strength: Strength
    q: Tensor
    k: Tensor
    v: Tensor
    bounded: bool
    words: tuple[Tensor, Tensor] | None
    edges: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, strength: Strength, q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> Tiling:
        """That of tensors of any dtype and strides."""
        total = torch.float64 if q.dtype == torch.float64 else torch.float32
        bounded, words, score = True, None, strength.score
        if score is not None:
            bounded = is_bounded(score.derivatives.expr if backward else score.expr, score.inputs)
        if strength.dropout is not None:
            batch, heads, q_len, _ = q.shape
            words = dropout.words(strength.dropout, batch, heads, q_len, k.shape[2])
        q, k, v = (prepared(x, total, x.shape[3]) for x in (q, k, v))
        return Tiling(plan, strength, q, k, v, bounded, words)

    @property
    def keep(self) -> float:
        """The share of probabilities that dropout keeps."""
        return 1.0 if self.strength.dropout is None else 1.0 - self.strength.dropout.p

    def values(self, work: Work, call: Call, rows: slice, expr: Expr, roots: tuple[int, ...]) -> Values:
        """These nodes of the score's program, in a call's rows."""
        score = self.strength.score
        assert score is not None, "the program is the score's"
        q, kv = (int(x[work.batch_row]) if isinstance(x, Tensor) else x for x in (score.q_offset, score.kv_offset))
        tokens = call.rows.tokens()[rows] + q, call.columns.tokens() + kv
        program = program_of(expr, roots, len(score.inputs.tables), by_diagonals=is_dense(call))
        return Values(Pairs(score.inputs, work.batch_row, work.heads, *tokens), program)


def is_dense(call: Call) -> bool:
    """Whether neither rows nor columns have gaps, so that tiles have diagonals."""
    return call.rows.index is None and call.columns.index is None


class _Tile:
    """Some rows and columns of a call, as its job computes them."""

    def __init__(self, problem: Tiling, work: Work, call: Call, values: Values | None, first: int) -> None:
        self.problem, self.work, self.call = problem, work, call
        self.values, self.first = values, first  # of the rows that `values` has
        self.buffers = _Buffers(problem.q.dtype)
        self.keys, self.v = (call.columns.take(work.of_kv_heads(x)[None])[0] for x in (problem.k, problem.v))
        self.tokens = call.rows.tokens()
        self.words: tuple[Tensor, Tensor] | None = None
        if problem.words is not None:
            rows, columns = (work.of_heads(x) for x in problem.words)
            self.words = rows, columns.index_select(1, call.columns.tokens())

    def rows(self, low: int, high: int) -> Iterator[tuple[slice, Tensor, list[slice]]]:
        """Rows of the call, a tile high each: where they are, their tokens from the last to the first, and columns."""
        for top in range(low, high, height := self.work.height(len(self.call.columns))):
            rows = slice(top, min(top + height, high))
            first, last = reach(self.call, rows)
            columns = [slice(x, min(x + WIDTH, last)) for x in range(first, last, WIDTH)]
            yield rows, self.tokens[rows].flip(0), columns

    def queries(self, tokens: Tensor, x: Tensor, factor: float) -> Tensor:
        """These rows of x (B, Hq, Sq, ...), for one product with each key head: (key heads, group x rows, ...)."""
        picked = self.work.of_heads(x).index_select(1, tokens)
        return (picked * factor if factor != 1.0 else picked).view(len(self.work.kv_heads), -1, x.shape[3])

    def values_of(self, rows: slice, columns: slice, queries: Tensor) -> list[Tensor]:
        """The roots of the score's program on a tile: first its value, of shape (heads, rows, columns)."""
        width = columns.stop - columns.start
        found = self.buffers.take("score", *queries.shape[:2], width)
        torch.bmm(queries, self.keys[:, columns].mT, out=found)
        score = found.view(len(self.work.heads), -1, width)
        if self.values is None:
            return [score]
        value, *others = self.values.of(slice(rows.start - self.first, rows.stop - self.first), columns, score)
        return [value.to(score.dtype).expand_as(score), *others]

    def hidden(self, rows: slice, columns: slice) -> Tensor | None:
        """0 and -inf of the tile's pairs, (rows, columns); None where all are seen."""
        mask = Band(0, 1, 1) if isinstance(self.call.mask, Causal) else self.call.mask
        if not isinstance(mask, Band):
            found = self.problem.plan.tile(self.call, rows, columns)
            return None if found is None else found.flip(0)
        # Tiles lie alike along an edge.
        start_step, stop_step, wide = mask.start_step, mask.stop_step, mask.width
        start, stop = start_step * rows.start - columns.start, wide + stop_step * rows.start - columns.start
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if start + start_step * (height - 1) <= 0 and stop >= width:
            return None
        key = start_step, mask.stop_step, start, stop, height, width
        edges = self.problem.edges
        if key not in edges:
            found = self.problem.plan.tile(self.call, rows, columns)
            assert found is not None, "some pairs are hidden"
            edges[key] = found.flip(0)
        return edges[key]

    def add_product(self, total: Tensor, x: Tensor, y: Tensor) -> None:
        """Add x y to a total: as one term, since adding each of its own to the total rounds twice as much."""
        total.add_(torch.bmm(x, y, out=self.buffers.take("product", *total.shape)))

    def kept(self, tokens: Tensor, columns: slice) -> Tensor | None:
        """1 where dropout keeps a pair and 0 elsewhere, (heads, rows, columns); None without dropout."""
        if self.words is None or self.problem.strength.dropout is None:
            return None
        rows, of_columns = self.words[0].index_select(1, tokens), self.words[1][:, columns]
        found = self.buffers.take("kept", *rows.shape, of_columns.shape[1])
        return dropout.kept(rows, of_columns, dropout.threshold(self.problem.strength.dropout.p), out=found)


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, strength: Strength) -> tuple[Tensor, Tensor]:
    """Block-sparse attention without sinks: see `run.forward`. Both results are of the dtype that is computed in."""
    problem = Tiling.of(plan, strength, q, k, v, backward=False)
    batch, heads, q_len = q.shape[:3]
    out = torch.zeros(batch, heads, q_len, v.shape[3], dtype=problem.q.dtype)
    lse = torch.full((batch, heads, q_len), -torch.inf, dtype=problem.q.dtype)
    jobs: list[Job] = []
    for work in works(plan, plan.tiled("forward"), q, k, times=2):  # its jobs are rows: heads need not be apart
        if any(call.merges for call in work.calls):  # one after the other
            jobs.append(Job(partial(_forward_all, problem, work, out, lse), work.cost))
            continue
        for call in work.calls:
            step = _PIECE * work.height(len(call.columns))
            for low in range(0, len(call.rows), step):
                rows = slice(low, min(low + step, len(call.rows)))
                first, last = reach(call, rows)
                cost = float(last - first) * (rows.stop - low) * len(work.heads)
                jobs.append(Job(partial(_forward, problem, work, call, rows, out, lse), cost))
    WORKERS.side_by_side([job.run for job in sorted(jobs, key=lambda job: job.cost, reverse=True)])
    return out, lse


def _forward_all(problem: Tiling, work: Work, out: Tensor, lse: Tensor) -> None:
    for call in work.calls:
        _forward(problem, work, call, slice(0, len(call.rows)), out, lse)


def _forward(problem: Tiling, work: Work, call: Call, some: slice, out: Tensor, lse: Tensor) -> None:
    """Some rows of a call, into these rows of out and lse."""
    score = problem.strength.score
    values = None if score is None else problem.values(work, call, some, score.expr, (len(score.expr.nodes) - 1,))
    tile, lowest = _Tile(problem, work, call, values, some.start), torch.finfo(lse.dtype).min
    outs, lses = work.of_heads(out), work.of_heads(lse)
    for rows, tokens, each in tile.rows(some.start, some.stop):
        queries = tile.queries(tokens, problem.q, problem.strength.scale)
        part = queries.new_empty((*queries.shape[:2], out.shape[3]))
        by_head = part.view(len(work.heads), -1, out.shape[3])
        highest = sums = None
        for columns in each:
            (value,) = tile.values_of(rows, columns, queries)
            p, hidden = tile.buffers.take("score", *value.shape), tile.hidden(rows, columns)  # its value is used here
            if hidden is not None:
                value = hide(value, hidden, bounded=problem.bounded, out=p)
            risen = value.amax(-1, keepdim=True)
            risen = risen.clamp_min_(lowest) if highest is None else torch.maximum(highest, risen)
            exponentials(torch.sub(value, risen, out=p))
            found = p.sum(-1, keepdim=True)
            kept = tile.kept(tokens, columns)
            if kept is not None:
                p.mul_(kept)
            if highest is None or sums is None:
                sums = found
                torch.bmm(p.view(*queries.shape[:2], -1), tile.v[:, columns], out=part)
            else:
                shrink = highest.sub_(risen).exp_()
                sums.mul_(shrink).add_(found)
                by_head.mul_(shrink)
                part.baddbmm_(p.view(*queries.shape[:2], -1), tile.v[:, columns])
            highest = risen
        assert highest is not None and sums is not None, "a row of a call sees some column"
        nothing = sums == 0
        by_head.div_(sums.masked_fill(nothing, 1.0) * problem.keep)
        part_lse = (highest + sums.log()).squeeze(-1)
        if call.merges:
            merge_some(by_head, part_lse, outs.index_select(1, tokens), lses.index_select(1, tokens))
        outs.index_copy_(1, tokens, by_head)
        lses.index_copy_(1, tokens, part_lse)


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """What backward reads and writes beside the problem, each in the dtype that is computed in.

    Attributes:
        dout: gradient of out, (B, Hq, Sq, Dv).
        lse: (B, Hq, Sq, 1), inf in rows that see nothing.
        delta: row sums of dO ∘ O, less dlse, (B, Hq, Sq, 1).
        dq: (B, Hq, Sq, D).
        dk: (B, Hkv, Skv, D).
        dv: (B, Hkv, Skv, Dv).
    """

    dout: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def backward(
    plan: Plan, dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, strength: Strength
) -> Gradients:
    """Gradients of `forward`, without those of sinks: see `run.backward`.

    Args:
        plan: as in forward.
        dout: gradient of out.
        delta: row sums of dO ∘ O, less dlse: (B, Hq, Sq).
        q: as in forward.
        k: as in forward.
        v: as in forward.
        lse: with sinks in it.
        strength: as in forward.
    """
    problem = Tiling.of(plan, strength, q, k, v, backward=True)
    total, score = problem.q.dtype, strength.score
    dq, dk, dv = (torch.zeros(x.shape, dtype=total) for x in (q, k, v))
    lse = lse.to(total).masked_fill(lse == -torch.inf, torch.inf)[..., None]
    given = _Gradients(dout.to(total), lse, delta[..., None], dq, dk, dv)
    found = works(plan, plan.tiled("backward"), q, k)
    learned = {} if score is None else {n: x for n, x in enumerate(score.inputs.tables) if score.wanted[n]}
    size = sum(table.numel() for table in learned.values())
    read = () if score is None else readings(score.expr, score.wanted, by_diagonals=False)
    by_head = all(reading.by_head for reading in read)
    shared = share(found, size, by_head=by_head)
    each = lanes(found, by_kv_head=plan.block_map.shape[1] > 1, size=size, shared=shared)
    whole = Sums(learned, total)
    parts = [whole if shared else Sums(learned, total) for _ in each]
    costs = [sum(work.cost for work in lane) for lane in each]
    jobs = [
        Job(partial(_backward_all, problem, lane, given, sums), cost)
        for lane, sums, cost in zip(each, parts, costs, strict=True)
    ]
    WORKERS.side_by_side([job.run for job in sorted(jobs, key=lambda job: job.cost, reverse=True)])
    if not shared:
        for part in parts:
            whole.add_all(part)
    return Gradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, whole.gradients())


def _backward_all(problem: Tiling, lane: list[Work], given: _Gradients, sums: Sums) -> None:
    for work in lane:
        for call in work.calls:
            _backward(problem, work, call, given, sums)


def _backward(problem: Tiling, work: Work, call: Call, given: _Gradients, sums: Sums) -> None:
    """A call's part of all gradients."""
    score = problem.strength.score
    values: Values | None = None
    learned: CallSums | None = None
    constant, sloped = False, False
    if score is not None:
        derivatives, read = score.derivatives, readings(score.expr, score.wanted, by_diagonals=is_dense(call))
        constant = derivatives.slope is None
        slope = derivatives.slope
        sloped = slope is not None and not is_one(derivatives.expr, slope)
        roots = (derivatives.value, *(root for reading in read for root in reading.roots))
        if sloped and slope is not None:
            roots = (*roots, slope)
        values = problem.values(work, call, slice(0, len(call.rows)), derivatives.expr, roots)
        learned = CallSums(sums, read, values.pairs, derivatives.expr, problem.q.dtype)
    tile = _Tile(problem, work, call, values, 0)
    # Gathered columns have gradients of their own first.
    sides = [(work.of_kv_heads(given.dk)[None], tile.keys), (work.of_kv_heads(given.dv)[None], tile.v)]
    gathered = call.columns.index is not None
    dkeys, dvalues = (torch.zeros_like(x) if gathered else call.columns.take(dx)[0] for dx, x in sides)
    for rows, tokens, each in tile.rows(0, len(call.rows)):
        queries = tile.queries(tokens, problem.q, problem.strength.scale)
        douts = tile.queries(tokens, given.dout, 1 / problem.keep)
        lse, delta = (work.of_heads(x).index_select(1, tokens) for x in (given.lse, given.delta))
        part = torch.zeros_like(queries)
        for columns in each:
            value, *rest = tile.values_of(rows, columns, queries)
            found = iter(rest)
            p, ds = (tile.buffers.take(name, *value.shape) for name in ("p", "ds"))
            flat_p, flat_ds = (x.view(*queries.shape[:2], -1) for x in (p, ds))
            hidden, kept = tile.hidden(rows, columns), tile.kept(tokens, columns)
            torch.sub(value, lse, out=p)
            if hidden is not None:
                hide(p, hidden, bounded=problem.bounded, out=p)
            probabilities(p)
            dead = None if problem.bounded else p == 0
            torch.bmm(douts, tile.v[:, columns].mT, out=flat_ds)
            if kept is not None:
                ds.mul_(kept)
            ds.sub_(delta).mul_(p)
            if kept is not None:
                p.mul_(kept)
            tile.add_product(dvalues[:, columns], flat_p.mT, douts)
            if learned is not None:
                learned.add(rows, columns, ds, dead, found)
            if constant:
                continue
            if sloped:
                ds.mul_(rest[-1])
                if dead is not None:
                    ds.masked_fill_(dead, 0.0)
            tile.add_product(part, flat_ds, tile.keys[:, columns])
            tile.add_product(dkeys[:, columns], flat_ds.mT, queries)
        dq = part.mul_(problem.strength.scale).view(len(work.heads), len(tokens), -1)
        work.of_heads(given.dq).index_add_(1, tokens, dq)
    if learned is not None:
        learned.finish()
    if gathered:
        for (dx, _), part in zip(sides, (dkeys, dvalues), strict=True):
            call.columns.add(dx, part[None])
