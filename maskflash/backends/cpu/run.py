"""Turns a Plan and q, k, v into attention on the CPU, forward and backward: one dense-kernel call per call planned.

The engine is torch's own CPU flash kernel, called on just the rows and columns that a call covers. Handing its
backward the *global* out and lse makes each call return its exact share of dq, dk and dv.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapreplace
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskflash.backends.cpu.calls import Call, Causal, Pick, Schedule
from maskflash.backends.cpu.plan import Plan, plan
from maskflash.backends.cpu.threads import side_by_side
from maskflash.backends.merge import merge_into

__all__ = ["Plan", "attend", "backward", "forward", "plan", "sole_call"]

_WORTH_THREADS: Final = (1 << 16) * 512  # pairs x heads x head dim: for less, other threads aren't woken
_MAX_WAIT: Final = 0.05  # as a part of all work: about what a call of middling size gains from having one core

_kernel = torch._scaled_dot_product_flash_attention_for_cpu  # its own binding: cheaper to call than torch.ops
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        plan: of the mask's block map; its batch rows and heads are 1 or those of q.
        q: (B, Hq, Sq, D) float32, float64, bfloat16 or float16, any strides.
        k: (B, Hkv, Skv, D), Hkv divides Hq.
        v: (B, Hkv, Skv, Dv).
        scale: factor of the scores.

    Returns:
        out: (B, Hq, Sq, Dv) in q's dtype. lse: (B, Hq, Sq), natural logarithm, float32 (float64 for float64);
        -inf, and out 0, for rows that see nothing.
    """
    batch, heads, q_len, head_dim = q.shape
    v_head_dim = v.shape[3]
    total = _lse_dtype(q.dtype)
    if batch * heads * q_len == 0:
        return q.new_zeros(batch, heads, q_len, v_head_dim), q.new_zeros((batch, heads, q_len), dtype=total)
    schedule = plan.schedule("forward", q.dtype, plan.work(batch, heads, max(head_dim, v_head_dim)))
    compute = q.dtype if schedule.native else torch.float32
    width = max(head_dim, v_head_dim)
    inputs = _prepared(q, compute, width), _prepared(k, compute, width), _prepared(v, compute, width)
    only = schedule.only(q_len)
    if only is not None and heads == k.shape[1]:
        out, lse = _attend(plan, only, *inputs, scale)
        out = out if width == v_head_dim else out[..., :v_head_dim]
        return _as(out, q.dtype).contiguous(), _as(lse, total).contiguous()
    lse = q.new_empty((batch, heads, q_len), dtype=total)
    out = q.new_empty((batch, heads, q_len, v_head_dim), dtype=total if schedule.merges else q.dtype)
    if not schedule.complete(q_len):
        lse.fill_(-torch.inf)
        out.zero_()

    def make(call: Call, views: list[Tensor]) -> None:
        qs, ks, vs, outs, lses = views
        part, part_lse = _attend(plan, call, qs, ks, vs, scale)
        if call.merges:
            _merge(outs, lses, call, part[..., :v_head_dim], part_lse)
        else:
            _put(outs, call, part[..., :v_head_dim])
            _put(lses, call, part_lse)

    _make(make, plan, schedule, (*inputs, out, lse))
    return _as(out, q.dtype), lse


def sole_call(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """The call that alone is forward, and alone backward: torch can differentiate it as it stands; None if several."""
    batch, heads, q_len, head_dim = q.shape
    if k.shape[1] != heads or v.shape[3] != head_dim or batch * q_len == 0:
        return None
    return plan.sole(q.dtype, batch, heads, head_dim)


def attend(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The `out` of `forward` by its sole call, through operations that torch can differentiate, the kernel once."""
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        q, k, v = (_prepared(x, x.dtype, x.shape[3]) for x in (q, k, v))
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
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
        scale: factor of the scores.

    Returns:
        dq, dk, dv, shaped and typed like q, k, v. Summed in float32 (float64 for float64), cast once.
    """
    total = _lse_dtype(q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=total) for x in (k, v))
    if lse.numel() == 0:
        return torch.zeros(q.shape, dtype=q.dtype), dk.to(k.dtype), dv.to(k.dtype)
    work = plan.work(q.shape[0], q.shape[1], max(q.shape[3], v.shape[3]))
    schedule = plan.schedule("backward", q.dtype, work)
    dq = torch.empty(q.shape, dtype=total if schedule.merges else q.dtype)
    if not schedule.complete(q.shape[2]):
        dq.zero_()
    width = max(q.shape[3], v.shape[3])
    if dlse is not None:
        # The kernel forms dS = P ∘ (dO vᵀ - rowsum(dO ∘ out)); lse adds dlse inside the bracket. One more column
        # with dO = 1, out = -dlse, v = 0 puts it there; whole vectors of columns keep the products aligned.
        width = -(-(width + 1) // 8) * 8
        dout = torch.cat((dout.to(total), torch.ones_like(dlse, dtype=total)[..., None]), dim=3)
        out = torch.cat((out.to(total), -dlse.to(total)[..., None]), dim=3)
        v = pad(v, (0, 1))
    inputs = tuple(_prepared(x, total, width) for x in (q, k, v, dout, out))

    def make(call: Call, views: list[Tensor]) -> None:
        qs, ks, vs, douts, outs, lses, dqs, dks, dvs = views
        queries = _take(qs, call.rows, call)
        part_q, part_k, part_v = _kernel_backward(
            _take(douts, call.rows, call),
            queries,
            _shared(_take(ks, call.columns, call), queries),
            _shared(_take(vs, call.columns, call), queries),
            _take(outs, call.rows, call),
            _take(lses, call.rows, call),
            0.0,
            isinstance(call.mask, Causal),
            attn_mask=plan.additive(call, total),
            scale=scale,
        )
        # Most rows are in one call, a column may be in many.
        put = _add_rows if call.merges else _put
        put(dqs, call, part_q[..., : dqs.shape[3]])
        _add(dks, call, part_k[..., : dks.shape[3]])
        _add(dvs, call, part_v[..., : dvs.shape[3]])

    _make(make, plan, schedule, (*inputs, lse, dq, dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(k.dtype)


def _attend(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Runs a call: its rows of out and lse."""
    queries = _take(q, call.rows, call)
    result: tuple[Tensor, Tensor] = _kernel(
        queries,
        _shared(_take(k, call.columns, call), queries),
        _shared(_take(v, call.columns, call), queries),
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


def _prepared(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Brings x to the compute dtype, `width` wide, with rows that are dense and don't overlap.

    The kernel reads garbage from rows that are not dense, and is 15x slower on rows closer than their width, such as
    those of an expanded tensor; all other strides it takes as they are.
    """
    x = _as(x, dtype)
    if x.shape[3] < width:
        x = pad(x, (0, width - x.shape[3]))
    stride = x.stride()
    return x if stride[3] == 1 and stride[2] >= width else x.clone(memory_format=torch.contiguous_format)


class _Part(NamedTuple):
    """Calls to make in this order, each with views of the tensors it is made on; no two parts write to one place."""

    calls: list[tuple[Call, list[Tensor]]]
    cost: float

    def make(self, each: Callable[[Call, list[Tensor]], None]) -> None:
        for call, views in self.calls:
            each(call, views)


def _make(
    each: Callable[[Call, list[Tensor]], None], plan: Plan, schedule: Schedule, tensors: tuple[Tensor, ...]
) -> None:
    """Makes every call: on all cores where side by side some core would wait for the others, else on one."""
    parts = sorted(_parts(plan, schedule, tensors), key=lambda part: part.cost, reverse=True)
    threads, large = torch.get_num_threads(), 0
    while large < len(parts) and _waits(parts[large:], threads):
        large += 1
    batch, heads, _, head_dim = tensors[0].shape
    cost = sum(part.cost for part in parts[large:])
    worth = cost * plan.work(batch, heads, head_dim) >= _WORTH_THREADS and 2 * cost >= sum(part.cost for part in parts)
    if threads == 1 or len(parts) - large < 2 or not worth:
        large = len(parts)
    if large < len(parts):  # first: after a call on all cores, torch's threads keep them busy for a while
        side_by_side([partial(part.make, each) for part in parts[large:]])
    for part in parts[:large]:
        part.make(each)


def _waits(parts: list[_Part], threads: int) -> bool:
    """Whether threads would wait long for the last of them, if they made the parts side by side in this order."""
    done = [0.0] * threads
    for part in parts:
        heapreplace(done, done[0] + part.cost)
    return threads * max(done) > (1 + _MAX_WAIT) * sum(done)


def _parts(plan: Plan, schedule: Schedule, tensors: tuple[Tensor, ...]) -> list[_Part]:
    """The schedule's chains, with views of the tensors.

    Views are (N, G, S, ...), or (N, 1, S, ...) on K and V's side. N x G are the query heads that share the mask, G of
    them each key head. Which side a tensor is on shows in its number of heads, q's being that of tensors[0]. With G > 1
    and several batch rows, each row is a unit of its own: so no strides ever force a copy. A repeated call needs N's
    dimension for its blocks: there N is 1.
    """
    heads, kv_heads = tensors[0].shape[1], tensors[1].shape[1]
    group = heads // kv_heads
    map_batch, map_heads = plan.block_map.shape[:2]
    parts: list[_Part] = []
    for (b, h), chains in schedule.chains.items():
        views = list(tensors)
        if map_batch > 1:
            views = [x[b : b + 1] for x in views]
        if map_heads > 1:
            head = {heads: h, kv_heads: h // group}
            units = [[x[:, head[x.shape[1]] : head[x.shape[1]] + 1] for x in views]]
        elif group == 1:
            units = [views]
        else:
            units = [[x[row].unflatten(0, (kv_heads, -1)) for x in views] for row in range(views[0].shape[0])]
        found = [_Part(_on(unit, calls), cost) for unit in units for calls, cost in chains]
        if map_heads > 1 and group > 1:  # heads of one key head add to the same dk and dv
            together = [parts.pop(), *found] if h % group else found
            found = [_Part([call for part in together for call in part.calls], sum(part.cost for part in together))]
        parts += found
    return parts


def _on(unit: list[Tensor], calls: list[Call]) -> list[tuple[Call, list[Tensor]]]:
    """The calls on a unit's tensors, a repeated one on each of its batch rows."""
    rows = [[x[n : n + 1] for x in unit] for n in range(unit[0].shape[0])]
    return [(call, views) for call in calls for views in ([unit] if call.repeat == 1 else rows)]


def _take(x: Tensor, pick: Pick, call: Call) -> Tensor:
    """The picked tokens of x (dim 2); of a repeated call (G, blocks, tokens, ...), which may overlap."""
    if call.repeat == 1:
        return pick.take(x, 2)
    size = (x.shape[1], call.repeat, len(pick), *x.shape[3:])
    stride = (x.stride(1), len(call.rows) * x.stride(2), *x.stride()[2:])
    return x.as_strided(size, stride, int(x.storage_offset()) + pick.start * x.stride(2))


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """K or V seen by all the heads of its group, without a copy."""
    return x if x.shape[:2] == q.shape[:2] else x.expand(*q.shape[:2], -1, -1)


def _put(x: Tensor, call: Call, part: Tensor) -> None:
    """Writes the call's rows of x."""
    if call.rows.index is None:
        _take(x, call.rows, call).copy_(part)
    else:
        x.index_copy_(2, call.rows.index, part.to(x.dtype))


def _merge(outs: Tensor, lses: Tensor, call: Call, part: Tensor, part_lse: Tensor) -> None:
    """Merges the call's rows of out and lse with the softmax over more columns."""
    out, lse = _take(outs, call.rows, call), _take(lses, call.rows, call)
    merge_into(out, lse, part, part_lse)
    if call.rows.index is not None:  # these are copies
        _put(outs, call, out)
        _put(lses, call, lse)


def _add_rows(x: Tensor, call: Call, part: Tensor) -> None:
    """Adds to the call's rows of x."""
    if call.rows.index is None:
        _take(x, call.rows, call).add_(part)
    else:
        x.index_add_(2, call.rows.index, part.to(x.dtype))


def _add(x: Tensor, call: Call, part: Tensor) -> None:
    """Adds to the call's columns of x, first summing over the heads of a group."""
    heads = 1 if call.repeat == 1 else 0
    if part.shape[heads] != x.shape[1]:
        part = part.sum(heads, keepdim=True, dtype=x.dtype)
    if call.columns.index is not None:
        x.index_add_(2, call.columns.index, part.to(x.dtype))
    elif call.repeat == 1:
        call.columns.take(x, 2).add_(part)
    else:
        for block in range(call.repeat):
            start = call.columns.start + block * len(call.rows)
            x[0, :, start : start + len(call.columns)].add_(part[:, block])
