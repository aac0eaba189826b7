"""Turns a Plan and q, k, v into attention on an NVIDIA GPU: which kernels run, over what, in which order.

What it is made of: `triton_work` (runs of a block map -> what a kernel walks), `triton_plan` (a classified mask -> all
walks, kept on the device), `triton_device` (triton itself, streams, processors, caches), `triton_layout` (tensors ->
strides and arguments), `triton_launch` (a pass -> its kernel, its tile, its launch).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.analysis.seen import Seen
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import tiles_measured
from maskflash.backends.triton.device import unavailable
from maskflash.backends.triton.launch import NO_MASK, Call, kernel, specialisation
from maskflash.backends.triton.layout import UNIT, cut, laid_out, padded, strides, whole, without_hidden
from maskflash.backends.triton.plan import Plan, plan
from maskflash.backends.triton.render import PassName, render
from maskflash.backends.triton.tiles import DELTA, Tile

__all__ = ["Plan", "backward", "forward", "plan", "source", "tune", "unavailable"]

_LOG2E: Final = 1.4426950408889634


def source(problem: Problem, seen: Seen, head_dim: int, v_head_dim: int, pass_name: PassName) -> str:
    """The text of the kernel that a call with these head dims runs."""
    special = specialisation(problem, seen.largest < 2**31, whole(head_dim), whole(v_head_dim))
    return render(special, pass_name)


def tune(plan: Plan, problem: Problem, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Measure which tiles are fastest for calls like this one, unless that is known; later calls use them.

    Takes some seconds for each pass: every candidate is compiled. Choices are kept beside the cached kernels.
    """
    q, k, v = laid_out(q, k, v)
    call = Call(plan, problem, q, v.shape[3])
    if tiles_measured.find(call.key("forward")) is None:
        out, lse = forward(plan, problem, q, k, v, scale, tuning=True)
        backward(plan, problem, out, None, q, k, v, out, lse, scale, tuning=True)


def forward(
    plan: Plan, problem: Problem, q: Tensor, k: Tensor, v: Tensor, scale: float, *, tuning: bool = False
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        plan: of the mask's block map.
        problem: the mask itself, for the partial tiles.
        q: (B, Hq, Sq, D) float32, bfloat16 or float16, any strides.
        k: (B, Hkv, Skv, D), Hkv divides Hq.
        v: (B, Hkv, Skv, Dv).
        scale: positive factor of the scores.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        out: (B, Hq, Sq, Dv) in q's dtype. lse: (B, Hq, Sq) float32, natural logarithm; -inf, and out 0, for rows that
        see nothing.
    """
    (batch, heads, q_len, _), (_, kv_heads, kv_len, v_dim) = q.shape, v.shape
    out = torch.empty((batch, heads, q_len, whole(v_dim)), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or kv_len == 0:
        return cut(out.zero_(), v_dim), lse.fill_(-math.inf)
    k, v = without_hidden(plan.seen(rows=False), k, v)
    q, k, v = laid_out(q, k, v)
    call = Call(plan, problem, q, v.shape[3])
    plan.keep(problem)
    group = heads // kv_heads
    bytes_per_head = kv_len * (k.shape[3] + v.shape[3]) * q.element_size()
    share = gpu.heads_in_cache(q.device, bytes_per_head, group, batch * heads)
    numbers = [scale * _LOG2E, batch, heads, group, share, q_len, kv_len]

    def launch(tile: Tile) -> None:
        tiles = -(-q_len // tile.block_m)
        call.launch(
            "forward",
            tile,
            tiles * batch * heads,
            [q, k, v, out, lse, *strides(q, k, v, out)],
            [*call.walks("forward", tile, tiles), *numbers, tiles],
        )

    if tuning:
        call.tune("forward", launch)
    call.fitted("forward", launch)
    return cut(out, v_dim), lse


def backward(
    plan: Plan,
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    tuning: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        plan: as in forward.
        problem: as in forward.
        dout: (B, Hq, Sq, Dv), gradient of out.
        dlse: (B, Hq, Sq), gradient of lse, or None for zero.
        q: as in forward.
        k: as in forward.
        v: as in forward.
        out: forward's result.
        lse: forward's result.
        scale: positive factor of the scores.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        dq, dk, dv, shaped and typed like q, k, v. No atomics: the same inputs give the same bits.
    """
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, v_dim) = q.shape, v.shape
    if min(q.numel(), k.numel()) == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    k, v = without_hidden(plan.seen(rows=False), k, v)
    q, dout = without_hidden(plan.seen(rows=True), q, dout)
    blind = lse == -math.inf
    lse = lse.masked_fill(blind, math.inf)  # so that p = exp(s - lse) is 0
    dlse = None if dlse is None else dlse.masked_fill(blind, 0.0)
    q, k, v, dout, out = laid_out(q, k, v, dout, out)
    call = Call(plan, problem, q, v.shape[3])
    plan.keep(problem)
    group = heads // kv_heads
    delta = _delta(out, dout, dlse)
    part = gpu.part_of_group(q.device, group, batch * kv_heads * -(-kv_len // 128))
    parts = group // part
    partial_dtype = q.dtype if group == 1 else torch.float32  # not by `parts`: they depend on lengths
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((parts, *x.shape), dtype=partial_dtype, device=q.device) for x in (k, v))
    size = (q.shape[3] + v.shape[3]) * q.element_size()
    share_q = gpu.heads_in_cache(q.device, kv_len * size, group, batch * heads)
    share_kv = gpu.heads_in_cache(q.device, q_len * size * part, 1, batch * heads // part)
    scales = [scale, scale * _LOG2E, batch, heads, group]

    def launch_dq(tile: Tile) -> None:
        tiles = -(-q_len // tile.block_m)
        call.launch(
            "dq",
            tile,
            tiles * batch * heads,
            [q, k, v, dout, lse, delta, dq, *strides(q, k, v, dout, dq)],
            [*call.walks("dq", tile, tiles), *scales, share_q, q_len, kv_len, tiles],
        )

    def launch_dkdv(tile: Tile) -> None:
        tiles = -(-kv_len // tile.block_n)
        call.launch(
            "dkdv",
            tile,
            tiles * batch * heads // part,
            [q, k, v, dout, lse, delta, dk, dv, *strides(q, k, v, dout)],
            [*call.walks("dkdv", tile, tiles), *scales, part, share_kv, q_len, kv_len, tiles],
        )

    passes: dict[PassName, Callable[[Tile], None]] = {"dkdv": launch_dkdv, "dq": launch_dq}
    for pass_name, launch in passes.items():
        if tuning:
            call.tune(pass_name, launch)
        call.fitted(pass_name, launch)
    dk, dv = ((x[0] if parts == 1 else x.sum(0)).to(q.dtype) for x in (dk, dv))
    return cut(dq, dim), cut(dk, dim), cut(dv, v_dim)


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    batch, heads, q_len, v_dim = out.shape
    delta = torch.empty((batch, heads, q_len), dtype=torch.float32, device=out.device)
    tiles = -(-q_len // DELTA.block_m)
    with gpu.current(out.device):
        kernel(NO_MASK, "delta")[(tiles * batch * heads,)](
            out,
            dout,
            delta if dlse is None else dlse.float().contiguous(),
            delta,
            *strides(out, dout),
            heads,
            q_len,
            tiles,
            HAS_DLSE=dlse is not None,
            UNIT=UNIT,
            BLOCK_M=DELTA.block_m,
            DV=v_dim,
            BLOCK_DV=padded(v_dim),
            num_warps=DELTA.warps,
        )
    return delta
