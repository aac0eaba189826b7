"""Scores and dropout -> attention by tiles of our own, forward and backward.

    for some rows, from the last to the first:
        for some columns:                  forward                              backward
            S = scale · q kᵀ               value = program(S)                   value, slopes = program(S)
            hidden pairs: value = -inf     P = exp(value - highest so far)      P = exp(value - lse)
                                           out = Σ P v, rescaled where the      dS = P ∘ (dO vᵀ - delta)
                                           highest has risen                    dq, dk, dv, and tables by slopes

Where values are limited (`limits.py`), P is exp(value) in forward, and P of hidden pairs is multiplied by 0 instead.
Each tile stays in cache, on one core; cores have rows, heads and batch rows of their own. Rows and columns are those of
a plan's calls, and tiles that nobody sees are not computed. Source: Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from maskflash.backends.cpu.calls import Call
from maskflash.backends.cpu.matrices import reach
from maskflash.backends.cpu.plan import Plan
from maskflash.backends.cpu.softmax import exponentials, hide, merge_some, probabilities
from maskflash.backends.cpu.sums import CallSums, Sums, is_one, readings
from maskflash.backends.cpu.threads import WORKERS, Job
from maskflash.backends.cpu.tile import CallPart, Tiling, is_dense
from maskflash.backends.cpu.values import Values
from maskflash.backends.cpu.work import Work, lanes, share, works
from maskflash.scores.strength import Gradients, Strength

_PIECE: Final = 2  # tiles high is what of a long call's rows one job of forward computes


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, strength: Strength) -> tuple[Tensor, Tensor]:
    """Block-sparse attention without sinks: see `run.forward`. Both results are of the dtype that is computed in."""
    problem = Tiling.of(plan, strength, q, k, v, backward=False)
    batch, heads, q_len = q.shape[:3]
    schedule = plan.tiled("forward")
    out = torch.empty((batch, heads, q_len, v.shape[3]), dtype=problem.q.dtype)
    lse = torch.empty((batch, heads, q_len), dtype=problem.q.dtype)
    if not schedule.complete:
        out.zero_()
        lse.fill_(-torch.inf)
    jobs: list[Job] = []
    for work in works(plan, schedule, q, k, times=2):  # its jobs are rows: heads need not be apart
        if any(call.merges for call in work.calls):  # one after the other
            jobs.append(Job(partial(_forward_all, problem, work, out, lse), work.cost))
            continue
        for call in work.calls:
            step = _PIECE * work.height(call)
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
    tile, sum_up = CallPart(problem, work, call, values, some.start), _limited if problem.limited else _running
    outs, lses = work.of_heads(out), work.of_heads(lse)
    for rows, tokens, each in tile.rows(some.start, some.stop):
        queries = tile.queries(tokens, problem.q, problem.strength.scale)
        part = queries.new_empty((*queries.shape[:2], out.shape[3]))
        by_head = part.view(len(work.heads), -1, out.shape[3])
        sums, part_lse = sum_up(tile, rows, tokens, each, queries, part)
        nothing = sums == 0
        by_head.div_(sums.masked_fill(nothing, 1.0) * problem.keep)
        part_lse = part_lse.squeeze(-1)
        if call.merges:
            merge_some(by_head, part_lse, outs.index_select(1, tokens), lses.index_select(1, tokens))
        outs.index_copy_(1, tokens, by_head)
        lses.index_copy_(1, tokens, part_lse)


def _limited(
    tile: CallPart, rows: slice, tokens: Tensor, each: list[slice], queries: Tensor, part: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums of exponentials of limited values, and lse: (heads, rows, 1); their product with v goes into part."""
    words, sums = tile.row_words(tokens), None
    for columns in each:
        (value,) = tile.values_of(rows, columns, queries)
        p, hidden = torch.exp(value, out=tile.buffers.take("score", *value.shape)), tile.hidden(rows, columns)
        if hidden is not None:
            p.mul_(hidden)
        found = p.sum(-1, keepdim=True)
        tile.drop(p, tile.products(words, columns))
        flat, v = p.view(*queries.shape[:2], -1), tile.v[:, columns]
        if sums is None:
            sums = found
            torch.bmm(flat, v, out=part)
        else:
            sums.add_(found)
            part.baddbmm_(flat, v)
    assert sums is not None, "a row of a call sees some column"
    return sums, sums.log()


def _running(
    tile: CallPart, rows: slice, tokens: Tensor, each: list[slice], queries: Tensor, part: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of any values, of which the highest so far are subtracted: sums and part are without these."""
    lowest, by_head = torch.finfo(part.dtype).min, part.view(len(tile.work.heads), -1, part.shape[2])
    words, highest, sums = tile.row_words(tokens), None, None
    for columns in each:
        (value,) = tile.values_of(rows, columns, queries)
        p, hidden = tile.buffers.take("score", *value.shape), tile.hidden(rows, columns)  # its value is used here
        if hidden is not None:
            value = hide(value, hidden, bounded=tile.problem.bounded, out=p)
        risen = value.amax(-1, keepdim=True)
        risen = risen.clamp_min_(lowest) if highest is None else torch.maximum(highest, risen)
        exponentials(torch.sub(value, risen, out=p))
        found = p.sum(-1, keepdim=True)
        tile.drop(p, tile.products(words, columns))
        flat, v = p.view(*queries.shape[:2], -1), tile.v[:, columns]
        if highest is None or sums is None:
            sums = found
            torch.bmm(flat, v, out=part)
        else:
            shrink = highest.sub_(risen).exp_()
            sums.mul_(shrink).add_(found)
            by_head.mul_(shrink)
            part.baddbmm_(flat, v)
        highest = risen
    assert highest is not None and sums is not None, "a row of a call sees some column"
    return sums, highest + sums.log()


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
    tile = CallPart(problem, work, call, values, 0)
    # Gathered columns have gradients of their own first.
    sides = [(work.of_kv_heads(given.dk)[None], tile.keys), (work.of_kv_heads(given.dv)[None], tile.v)]
    gathered = call.columns.index is not None
    dkeys, dvalues = (torch.zeros_like(x) if gathered else call.columns.take(dx)[0] for dx, x in sides)
    for rows, tokens, each in tile.rows(0, len(call.rows)):
        queries = tile.queries(tokens, problem.q, problem.strength.scale)
        douts = tile.queries(tokens, given.dout, 1 / problem.keep)
        lse, delta = (work.of_heads(x).index_select(1, tokens) for x in (given.lse, given.delta))
        words, part = tile.row_words(tokens), torch.zeros_like(queries)
        for columns in each:
            value, *rest = tile.values_of(rows, columns, queries)
            found = iter(rest)
            p, ds = (tile.buffers.take(name, *value.shape) for name in ("p", "ds"))
            flat_p, flat_ds = (x.view(*queries.shape[:2], -1) for x in (p, ds))
            hidden, products = tile.hidden(rows, columns), tile.products(words, columns)
            torch.sub(value, lse, out=p)
            if problem.limited:
                p.exp_()
                if hidden is not None:
                    p.mul_(hidden)
            else:
                if hidden is not None:
                    hide(p, hidden, bounded=problem.bounded, out=p)
                probabilities(p)
            dead = None if problem.bounded else p == 0
            torch.bmm(douts, tile.v[:, columns].mT, out=flat_ds)
            tile.drop(ds, products)
            ds.sub_(delta).mul_(p)
            tile.drop(p, products)
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
