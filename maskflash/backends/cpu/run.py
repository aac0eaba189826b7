"""A Plan and q, k, v -> attention on the CPU, forward and backward, by the calls that the plan has.

The engine is torch's own CPU flash kernel, called on just the rows and columns that a call covers. Handing its
backward the *global* out and lse makes each call return its exact share of dq, dk and dv.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.backends.cpu import biases, engine
from maskflash.backends.cpu.calls import Blocks, Call, Causal, Pick
from maskflash.backends.cpu.plan import Plan, plan
from maskflash.backends.cpu.schedules import Schedule
from maskflash.backends.cpu.softmax import merge_some
from maskflash.backends.cpu.threads import WORKERS, Job
from maskflash.backends.cpu.views import Views, batch_rows, prepared, shared, units
from maskflash.backends.merge import merge_into
from maskflash.backends.sinks import add_sinks, gradient
from maskflash.scores.strength import Gradients, Strength

__all__ = ["Plan", "attend", "backward", "forward", "plan", "sole_call"]

Each = Callable[[Call, Views], None]

_kernel = torch._scaled_dot_product_flash_attention_for_cpu  # its own binding: cheaper to call than torch.ops
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, strength: Strength) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        plan: of the mask's block map; its batch rows and heads are 1 or those of q.
        q: (B, Hq, Sq, D) float32, float64, bfloat16 or float16, any strides.
        k: (B, Hkv, Skv, D), Hkv divides Hq.
        v: (B, Hkv, Skv, Dv).
        strength: how strongly pairs attend.

    Returns:
        out: (B, Hq, Sq, Dv) in q's dtype. lse: (B, Hq, Sq), natural logarithm, float32 (float64 for float64);
        -inf (or the sink), and out 0, for rows that see nothing.
    """
    scale, sinks = strength.scale, strength.sinks
    batch, heads, q_len, head_dim = q.shape
    v_head_dim = v.shape[3]
    total = _lse_dtype(q.dtype)
    if batch * heads * q_len == 0:
        return q.new_zeros(batch, heads, q_len, v_head_dim), q.new_zeros((batch, heads, q_len), dtype=total)
    if strength.score is not None or strength.dropout is not None:
        out, lse = _additive(plan, q, k, v, strength) or engine.forward(plan, q, k, v, strength)
        if sinks is not None:
            add_sinks(out, lse, sinks)
        return _as(out, q.dtype), lse
    schedule = plan.schedule("forward", q.dtype, plan.work(batch, heads, max(head_dim, v_head_dim)))
    compute = q.dtype if schedule.native else torch.float32
    width = max(head_dim, v_head_dim)
    inputs = prepared(q, compute, width), prepared(k, compute, width), prepared(v, compute, width)
    if schedule.only is not None and heads == k.shape[1]:
        out, lse = _attend(plan, schedule.only, *inputs, scale)
        out = out if width == v_head_dim else out[..., :v_head_dim]
        if sinks is not None:
            add_sinks(out, lse, sinks)
        return _as(out, q.dtype).contiguous(), _as(lse, total).contiguous()
    lse = q.new_empty((batch, heads, q_len), dtype=total)
    out = q.new_empty((batch, heads, q_len, v_head_dim), dtype=total if schedule.merges else q.dtype)
    if not schedule.complete:
        lse.fill_(-torch.inf)
        out.zero_()

    def make(call: Call, views: Views) -> None:
        qs, ks, vs, outs, lses = views
        part, part_lse = _attend(plan, call, qs, ks, vs, scale)
        part = part[..., :v_head_dim]
        if call.merges:
            rows, rows_lse = call.rows.take(outs), call.rows.take(lses)
            merge_into(rows, rows_lse, part, part_lse)
            if call.rows.index is None:
                return
            part, part_lse = rows, rows_lse  # gathered rows are copies
        call.rows.put(outs, part)
        call.rows.put(lses, part_lse)

    _make(make, plan, schedule, (*inputs, out, lse))
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return _as(out, q.dtype), lse


def _additive(plan: Plan, q: Tensor, k: Tensor, v: Tensor, strength: Strength) -> tuple[Tensor, Tensor] | None:
    """Forward, without sinks, of factor * score + bias by torch's kernel; None for other scores."""
    score, total = strength.score, _lse_dtype(q.dtype)
    if score is None or strength.dropout is not None or score.form.kind == "general":
        return None
    form, (batch, heads, q_len), (kv_heads, kv_len) = score.form, q.shape[:3], k.shape[1:3]
    if form.of_columns and form.factor is not None and "h" in form.factor.reads and kv_heads != heads:
        return None
    q, k, v = (_as(x, total) for x in (q, k, v))
    if form.factor is not None:
        given = biases.indices(score, batch, heads, (q_len, kv_len))
        factor = biases.value_of(form.factor, score, given).to(total)
        q, k = (q, k * factor[..., None]) if form.of_columns else (q * factor.expand(*q.shape[:3])[..., None], k)
    if form.bias is None:
        return forward(plan, q, k, v, Strength(strength.scale))
    found = biases.Biases.of(plan, form.bias, score, q, k)
    width, v_head_dim = max(q.shape[3], v.shape[3]), v.shape[3]
    q, k, v = (prepared(x, total, width) for x in (q, k, v))
    vector, places = found.along(batch, heads, q_len), found.places(batch, heads)
    schedule = plan.biased(total, plan.work(batch, heads, width))
    lse = torch.empty((batch, heads, q_len), dtype=total)
    out = torch.empty((batch, heads, q_len, v_head_dim), dtype=total)
    if not schedule.complete:
        lse.fill_(-torch.inf)
        out.zero_()

    def make(call: Call, views: Views) -> None:
        qs, ks, vs, vectors, *at, outs, lses = views
        rows = call.rows
        if not found.is_view(call):
            for part, some in biases.parts(call, qs.shape[0] * qs.shape[1]):
                matrix = found.matrix(part, some, at, total)
                kernel(part, part.rows.between(some.start, some.stop), matrix, (qs, ks, vs, outs, lses))
        elif isinstance(rows, Blocks):  # their keys can't be in another order than they
            # One matrix for all blocks: expanded to them, it would be copied for each.
            kernel(call, rows, found.view(call, vectors, total).flip(3)[0, :, None], (qs, ks, vs, outs, lses))
        else:
            kernel(call, rows, found.view(call, vectors, total), (qs, ks, vs, outs, lses), turned=True)

    def kernel(call: Call, rows: Pick, matrix: Tensor, views: tuple[Tensor, ...], *, turned: bool = False) -> None:
        qs, ks, vs, outs, lses = views
        queries, columns = rows.take(qs), (call.columns.take(x) for x in (ks, vs))
        keys, values = (shared(x.flip(2) if turned else x, queries) for x in columns)
        part, part_lse = _kernel(queries, keys, values, 0.0, False, attn_mask=matrix, scale=strength.scale)
        part = part[..., :v_head_dim]
        if found.hides:
            part_lse = part_lse.masked_fill(matrix.amax(3) == -torch.inf, -torch.inf)
        if call.merges:
            merge_some(part, part_lse, rows.take(outs), rows.take(lses))
        rows.put(outs, part)
        rows.put(lses, part_lse)

    _make(make, plan, schedule, (q, k, v, vector, *places, out, lse))
    return out, lse


def sole_call(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """The call that alone is forward, and alone backward: torch can differentiate it as it stands; None if several."""
    batch, heads, q_len, head_dim = q.shape
    if k.shape[1] != heads or v.shape[3] != head_dim or batch * q_len == 0:
        return None
    return plan.sole(q.dtype, plan.work(batch, heads, head_dim))


def attend(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The `out` of `forward` by its sole call, through operations that torch can differentiate, the kernel once."""
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        q, k, v = (prepared(x, x.dtype, x.shape[3]) for x in (q, k, v))
    return _attend(plan, call, q, k, v, scale)[0]


def backward(
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    strength: Strength,
) -> Gradients:
    """Gradients of `forward`.

    Args:
        plan: as in forward.
        dout: (B, Hq, Sq, Dv), gradient of out.
        dlse: (B, Hq, Sq), gradient of lse, or None for zero.
        q: as in forward.
        k: as in forward.
        v: as in forward.
        out: forward's result.
        lse: forward's result.
        strength: as in forward.

    Returns:
        Gradients, shaped and typed like what they are of. Summed in float32 (float64 for float64), cast once.
    """
    scale, sinks = strength.scale, strength.sinks
    total = _lse_dtype(q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=total) for x in (k, v))
    if lse.numel() == 0:
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        score = strength.score
        learned = () if score is None else zip(score.inputs.tables, score.wanted, strict=True)
        tables = tuple(torch.zeros(table.shape, dtype=table.dtype) for table, wanted in learned if wanted)
        return Gradients(torch.zeros(q.shape, dtype=q.dtype), dk.to(k.dtype), dv.to(k.dtype), dsinks, tables)
    if strength.score is not None or strength.dropout is not None:
        delta = _delta(dout, dlse, out, total)
        found = engine.backward(plan, dout, delta, q, k, v, lse, strength)
        return found if sinks is None else found._replace(sinks=gradient(sinks, lse, delta))
    dsinks = None if sinks is None else gradient(sinks, lse, _delta(dout, dlse, out, total))
    work = plan.work(q.shape[0], q.shape[1], max(q.shape[3], v.shape[3]))
    schedule = plan.schedule("backward", q.dtype, work)
    dq = torch.empty(q.shape, dtype=total if schedule.merges else q.dtype)
    if not schedule.complete:
        dq.zero_()
    width = max(q.shape[3], v.shape[3])
    if dlse is not None:
        # The kernel forms dS = P ∘ (dO vᵀ - rowsum(dO ∘ out)); lse adds dlse inside the bracket. One more column
        # with dO = 1, out = -dlse, v = 0 puts it there; whole vectors of columns keep the products aligned.
        width = -(-(width + 1) // 8) * 8
        dout = torch.cat((dout.to(total), torch.ones_like(dlse, dtype=total)[..., None]), dim=3)
        out = torch.cat((out.to(total), -dlse.to(total)[..., None]), dim=3)
        v = pad(v, (0, 1))
    inputs = tuple(prepared(x, total, width) for x in (q, k, v, dout, out))

    def make(call: Call, views: Views) -> None:
        qs, ks, vs, douts, outs, lses, dqs, dks, dvs = views
        queries = call.rows.take(qs)
        part_q, part_k, part_v = _kernel_backward(
            call.rows.take(douts),
            queries,
            shared(call.columns.take(ks), queries),
            shared(call.columns.take(vs), queries),
            call.rows.take(outs),
            call.rows.take(lses),
            0.0,
            isinstance(call.mask, Causal),
            attn_mask=plan.additive(call, total),
            scale=scale,
        )
        # Most rows are in one call, a column may be in many.
        put = call.rows.add if call.merges else call.rows.put
        put(dqs, part_q[..., : dqs.shape[3]])
        call.columns.add(dks, part_k[..., : dks.shape[3]])
        call.columns.add(dvs, part_v[..., : dvs.shape[3]])

    _make(make, plan, schedule, (*inputs, lse, dq, dk, dv))
    return Gradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(k.dtype), dsinks)


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor, total: torch.dtype) -> Tensor:
    """The row sums of dO ∘ O, less dlse: (B, Hq, Sq)."""
    found = (dout.to(total) * out.to(total)).sum(-1)
    return found if dlse is None else found - dlse


def _attend(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Runs a call: its rows of out and lse."""
    queries = call.rows.take(q)
    result: tuple[Tensor, Tensor] = _kernel(
        queries,
        shared(call.columns.take(k), queries),
        shared(call.columns.take(v), queries),
        0.0,
        isinstance(call.mask, Causal),
        attn_mask=plan.additive(call, q.dtype),
        scale=scale,
    )
    return result


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts; a call of `to` that does nothing takes a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _make(each: Each, plan: Plan, schedule: Schedule, tensors: tuple[Tensor, ...]) -> None:
    """Makes every call of the schedule on its views of the tensors."""
    own = plan.block_map.shape[0], plan.block_map.shape[1]
    batch, heads, _, head_dim = tensors[0].shape
    group, work = heads // tensors[1].shape[1], plan.work(batch, heads, head_dim)
    jobs: list[Job] = []
    for (b, h), chains in schedule.chains.items():
        found = [
            Job(partial(_make_chain, each, chain.calls, views), chain.cost * work)
            for views in units((b, h), own, tensors)
            for chain in chains
        ]
        if own[1] > 1 and group > 1:  # heads of one key head add to the same dk and dv: one job, in order
            together = [jobs.pop(), *found] if h % group else found
            found = [Job(partial(_run, [job.run for job in together]), sum(job.cost for job in together))]
        jobs += found
    WORKERS.do(jobs)


def _make_chain(each: Each, calls: list[Call], views: Views) -> None:
    for call in calls:
        for part in batch_rows(views) if isinstance(call.rows, Blocks) else [views]:
            each(call, part)


def _run(jobs: list[Callable[[], None]]) -> None:
    for job in jobs:
        job()
