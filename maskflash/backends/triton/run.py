"""A DevicePlan and q, k, v -> attention on a GPU: which kernels run, over what, in which order.

    walks       runs of a block map -> what a kernel walks
    plan        a classified mask -> all walks, on the device
    device      triton itself, streams, processors, caches
    layout      tensors -> strides and arguments
    launch      a pass -> its kernel, its tile, its launch
    hopper      what Hopper's own kernels serve; kernel_choice, which kernels run
    fp8         q, k and v -> 8 bits
    few         few rows, without a plan -> programs that share them, and what joins these
    learned     what a score's tables learn

Forward is one kernel, or two where rows are few; backward three: delta, then dK and dV, then dQ; and one more where a
score's tables learn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.analysis.seen import Seen
from maskflash.backends.incoherence import width
from maskflash.backends.sinks import gradient
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import few, fp8, kernel_choice, tile_choice
from maskflash.backends.triton.device import unavailable, without_8_bits
from maskflash.backends.triton.hopper import mapped
from maskflash.backends.triton.intervals import intervals
from maskflash.backends.triton.launch import NO_MASK, Launcher, kernel, specialisation
from maskflash.backends.triton.layout import UNIT, addressed, cut, laid_out, padded, whole, without_hidden
from maskflash.backends.triton.learned import table_gradients, untouched
from maskflash.backends.triton.plan import DevicePlan, plan
from maskflash.backends.triton.render import render
from maskflash.backends.triton.score_kind import score_kind
from maskflash.backends.triton.signature import PassName
from maskflash.backends.triton.tiles import DELTA
from maskflash.ground.eight_bits import FORMAT
from maskflash.scores.strength import BoundScore, Gradients, Precision, Strength

__all__ = ["DevicePlan", "backward", "few", "forward", "plan", "source", "tune", "unavailable", "without_8_bits"]

_LOG2E: Final = 1.4426950408889634


def source(
    problem: Problem,
    seen: Seen,
    head_dim: int,
    v_head_dim: int,
    pass_name: PassName,
    score: BoundScore | None = None,
    *,
    dropout: bool = False,
    precision: Precision = "full",
) -> str:
    """The text of the kernel that a call with these head dims runs, with remarks on the user's lines in it."""
    interval, dims = intervals(seen) is not None, (whole(head_dim), whole(v_head_dim))
    eight_bits = pass_name == "forward" and precision == "fp8"
    if pass_name == "forward" and not (dropout or eight_bits) and few.are_few(problem.q_len, problem.kv_len):
        pass_name = "split"
    if pass_name == "split":
        return render(few.special_of(problem, *dims, score), pass_name, remarks=True)
    kind = None if score is None else score_kind(score, problem.extents)
    if kind is not None and score is not None and pass_name == "dtables":
        kind = replace(kind, wanted=score.wanted)
    special = specialisation(problem, interval, seen.largest < 2**31, *dims, kind, dropout)
    if eight_bits:
        special = replace(special, products_in_8_bits=True, padded_d=False)  # q and k have a power of two of dims then
    return render(special, pass_name, remarks=True)


def tune(plan: DevicePlan, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength) -> None:
    """Measure which tiles are fastest for calls like this one, unless all are known; later calls use them.

    Takes some seconds for each pass: every candidate is compiled. Choices are kept beside the cached kernels.
    """
    pass_name = kernel_choice.choose(problem, q, k, v, strength).pass_name
    own = kernel_choice.choose_backward(problem, q, v, strength).own
    q, k, v = laid_out(q, k, v)
    launcher = Launcher(problem, q, k, v, strength, plan=plan)
    ahead, *back = map(launcher.case, (pass_name, *(("hopper_dkdv", "hopper_dq") if own else ("dkdv", "dq"))))
    if strength.precision == "fp8":  # as forward has it, after it has quantised
        ahead = replace(ahead, dtype=FORMAT, dims=(width(q.shape[3]), v.shape[3]))
    if not all(tile_choice.find(case).measured for case in (ahead, *back)):
        out, lse = forward(plan, problem, q, k, v, strength, tuning=True)
        backward(plan, problem, out, None, q, k, v, out, lse, strength, tuning=True)


def forward(
    plan: DevicePlan,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Strength,
    *,
    tuning: bool = False,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        plan: of the mask's block map.
        problem: the mask itself, for the partial tiles.
        q: (B, Hq, Sq, D) float32, bfloat16 or float16, any strides.
        k: (B, Hkv, Skv, D), Hkv divides Hq.
        v: (B, Hkv, Skv, Dv).
        strength: how strongly pairs attend.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        out: (B, Hq, Sq, Dv) in q's dtype. lse: (B, Hq, Sq) float32, in base 2; -inf (or the sink), and out 0, for rows
        that see nothing.
    """
    scale, sinks = strength.scale, strength.sinks
    (batch, heads, q_len, _), (_, kv_heads, kv_len, v_dim) = q.shape, v.shape
    out = torch.empty((batch, heads, q_len, whole(v_dim)), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.float().contiguous()
    if out.numel() == 0 or kv_len == 0:
        lse.fill_(-math.inf) if sinks is None else lse.copy_(sinks[:, None] * _LOG2E)
        return cut(out.zero_(), v_dim), lse
    pass_name = kernel_choice.choose(problem, q, k, v, strength).pass_name
    factor = {"qk_scale": scale * _LOG2E} if strength.score is None else {"scale": scale}
    if strength.precision == "fp8":  # scales are of whole blocks, visited or not
        (q,) = without_hidden(plan.used(problem, rows=True), q)
        k, v = without_hidden(plan.used(problem, rows=False), k, v)
    else:
        k, v = without_hidden(plan.seen(rows=False), k, v)
    q, k, v = laid_out(q, k, v)
    operands = (mapped if pass_name == "hopper" else addressed)(q=q, k=k, v=v, out=out)
    if strength.precision == "fp8":
        q, k, v, in_8_bits = fp8.eight_bits(q, k, v)
        operands |= in_8_bits
    head_bytes = kv_len * (k.shape[3] + v.shape[3]) * q.element_size()
    own = {
        **operands,
        "lse_ptr": lse,
        "sinks_ptr": lse if sinks is None else sinks,
        "HAS_SINKS": sinks is not None,
        **factor,
        "share": gpu.heads_in_cache(q.device, head_bytes, heads // kv_heads, batch * heads),
    }
    Launcher(problem, q, k, v, strength, tuning, plan=plan).run(pass_name, own)
    return cut(out, v_dim), lse


def backward(
    plan: DevicePlan,
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    strength: Strength,
    *,
    tuning: bool = False,
) -> Gradients:
    """Gradients of `forward`.

    Args:
        plan: as in forward.
        problem: as in forward.
        dout: (B, Hq, Sq, Dv), gradient of out.
        dlse: (B, Hq, Sq), gradient of lse as forward returns it, or None for zero.
        q: as in forward.
        k: as in forward.
        v: as in forward.
        out: forward's result.
        lse: forward's result.
        strength: as in forward.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        Gradients, shaped and typed like what they are of; the same inputs give the same bits.
    """
    scale, sinks = strength.scale, strength.sinks
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, v_dim) = q.shape, v.shape
    if min(q.numel(), k.numel()) == 0:
        delta = None if dlse is None else dlse * -_LOG2E  # out is 0
        dsinks = None if sinks is None or delta is None else gradient(sinks, lse / _LOG2E, delta)
        dq, dk, dv = map(torch.zeros_like, (q, k, v))
        return Gradients(dq, dk, dv, dsinks, untouched(strength.score))
    k, v = without_hidden(plan.seen(rows=False), k, v)
    q, dout = without_hidden(plan.seen(rows=True), q, dout)
    blind = lse == -math.inf
    lse = lse.masked_fill(blind, math.inf)  # so that p = exp(s - lse) is 0
    dlse = None if dlse is None else dlse.masked_fill(blind, 0.0)
    q, k, v, dout, out = laid_out(q, k, v, dout, out)
    launcher = Launcher(problem, q, k, v, strength, tuning, plan=plan)
    own = kernel_choice.choose_backward(problem, q, v, strength).own
    delta = _delta(out, dout, dlse, gpu.precision(q.dtype, strength.precision))
    operands = (mapped if own else addressed)(q=q, k=k, v=v, dout=dout)
    both = {
        "lse_ptr": lse,
        "delta_ptr": delta,
        "scale": scale,
        **({"qk_scale": scale * _LOG2E} if strength.score is None else {}),
    }
    group, token_bytes = heads // kv_heads, (q.shape[3] + v.shape[3]) * q.element_size()

    part = gpu.part_of_group(q.device, group, batch * kv_heads * -(-kv_len // 128))
    summed = q.dtype if group == 1 else torch.float32  # not by the number of parts: that depends on lengths
    dk, dv = (torch.empty((group // part, *x.shape), dtype=summed, device=q.device) for x in (k, v))
    share = gpu.heads_in_cache(q.device, q_len * token_bytes * part, 1, batch * heads // part)
    summands = {"dk_ptr": dk, "dv_ptr": dv, "part": part, "share": share}
    launcher.run("hopper_dkdv" if own else "dkdv", {**operands, **both, **summands})
    dk, dv = ((x[0] if len(x) == 1 else x.sum(0)).to(q.dtype) for x in (dk, dv))

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    share = gpu.heads_in_cache(q.device, kv_len * token_bytes, group, batch * heads)
    result = (mapped if own else addressed)(dq=dq)
    launcher.run("hopper_dq" if own else "dq", {**operands, **both, **result, "share": share})
    portable = {**addressed(q=q, k=k, v=v, dout=dout), **both, "share": share}
    tables = table_gradients(launcher, strength.score, portable)
    dsinks = None if sinks is None else gradient(sinks, lse.masked_fill(blind, -math.inf) / _LOG2E, delta)
    return Gradients(cut(dq, dim), cut(dk, dim), cut(dv, v_dim), dsinks, tables)


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None, products: str) -> Tensor:
    """The row sums of dO * O, less dlse in natural units: (B, Hq, Sq) float32. Products as those for dP are."""
    batch, heads, q_len, v_dim = out.shape
    delta = torch.empty((batch, heads, q_len), dtype=torch.float32, device=out.device)
    tiles = -(-q_len // DELTA.block_m)
    with gpu.current(out.device):
        kernel(NO_MASK, "delta").launch(
            tiles * batch * heads,
            DELTA,
            **addressed(out=out, dout=dout),
            dlse_ptr=delta if dlse is None else dlse.float().contiguous(),
            delta_ptr=delta,
            heads=heads,
            q_len=q_len,
            tiles_m=tiles,
            HAS_DLSE=dlse is not None,
            UNIT=UNIT,
            BLOCK_M=DELTA.block_m,
            DV=v_dim,
            BLOCK_DV=padded(v_dim),
            PRECISION=products,
        )
    return delta
