"""A rank's shards of q, k and v, and parts of the keys -> its shard of out, lse and gradients.

    part 0          own keys, here already             stage 1 travels meanwhile
    part 1          keys of stage 1                    stage 2 travels meanwhile
    ...
    out, lse        of all parts, merged in this order; then the sinks

Backward has the same parts. Given the global out and lse of its rows, each part's backward gives the exact share of dq,
dk and dv, so that shares add up. Keys travel once more, since forward has kept none, and the shares of their
gradients travel back. Their owner adds them to its own in a fixed order: the same plan gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskflash.backends.merge import merge_into
from maskflash.backends.sinks import add_sinks, gradient
from maskflash.op import autograd
from maskflash.op.analyse import Analysis
from maskflash.op.parts import Tokens, of_tokens
from maskflash.op.spec import Spec
from maskflash.parallel import exchange
from maskflash.parallel.exchange import Arriving, Stage
from maskflash.parallel.peers import Peers
from maskflash.scores.strength import Gradients


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """Some of the keys that a rank needs.

    Attributes:
        keys: which.
        analysis: of the rank's queries and these keys; None where the rank gets no keys in the stage.
        stage: in which they arrive; None for the rank's own.
    """

    keys: Tokens
    analysis: Analysis | None
    stage: Stage | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """What a rank computes in a call.

    Attributes:
        rows: its tokens.
        portions: its own keys, and those of each stage.
        peers: the ranks that hold the keys of all tokens.
    """

    rows: Tokens
    portions: tuple[Portion, ...]
    peers: Peers

    def spec(self, whole: Spec, portion: Portion) -> Spec:
        """The spec of the queries and of some of the keys, of that of all tokens; sinks come once, at the end."""
        return of_tokens(whole._replace(sinks=None), self.rows, portion.keys)

    def arriving(self, k: Tensor, v: Tensor) -> Iterator[tuple[Portion, Tensor, Tensor]]:
        """Each portion's k and v; those of the next are on their way when it comes."""
        coming: Arriving | None = None
        for place, portion in enumerate(self.portions):
            here = k, v
            if portion.stage is not None and coming is not None:
                here = exchange.keys_of(portion.stage, coming.wait(), k, v)
            for following in self.portions[place + 1 : place + 2]:
                assert following.stage is not None, "only the first portion has none"
                coming = exchange.send_keys(following.stage, k, v, self.peers)
            yield portion, *here


def attend(work: Assignment, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of a rank's queries, differentiable in q, k, v, sinks and a score's tables.

    Args:
        work: what the rank computes.
        spec: of all tokens.
        q: (B, Hq, Sr, D), the rank's shard.
        k: (B, Hkv, Sr, D).
        v: (B, Hkv, Sr, Dv).

    Returns:
        out (B, Hq, Sr, Dv) in q's dtype; lse (B, Hq, Sr), natural logarithm, float32 (float64 for float64).
    """
    out: Tensor
    lse: Tensor
    out, lse = _OnShards.apply(work, q, k, v, spec, *spec.tensors)  # type: ignore[no-untyped-call]
    return out, lse


class _OnShards(torch.autograd.Function):
    """Saves q, k, v, out, lse and the spec's tensors, as the op of one machine does."""

    @staticmethod
    def forward(
        ctx: Any, work: Assignment, q: Tensor, k: Tensor, v: Tensor, spec: Spec, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        spec = spec.with_tensors(tensors)
        out, lse = _forward(work, spec, q, k, v)
        autograd.save(ctx, tensors, q, k, v, out, lse)
        ctx.work, ctx.spec = work, spec.with_tensors((None,) * len(tensors))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # Others wait for this rank's part even where no gradient arrives here.
        (q, k, v, out, lse), tensors = autograd.saved(ctx, 5)
        spec = ctx.spec.with_tensors(tensors)
        with torch.no_grad():
            found = _backward(ctx.work, spec, dout, dlse, q, k, v, out, lse)
        arriving = iter(found.tables)
        of_tables = [next(arriving) if learned else None for learned in spec.learned]
        others = [None] * (len(tensors) - 1 - len(of_tables))
        gradients = (None, found.q, found.k, found.v, None, found.sinks, *of_tables, *others)
        given = [x for x in (dout, dlse, q, k, v, *tensors) if x is not None]
        return autograd.final(gradients, *given) if torch.is_grad_enabled() else gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise autograd.no_forward_mode()


def _forward(work: Assignment, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total, compute = _dtypes(work, spec, q)
    queries = q.to(compute)
    merged: tuple[Tensor, Tensor] | None = None
    for portion, keys, values in work.arriving(k, v):
        if portion.analysis is None:
            continue
        own = work.spec(spec, portion)
        part, part_lse = portion.analysis.forward(own, queries, keys.to(compute), values.to(compute))
        found = part.to(total), autograd.natural(spec, part_lse)
        if merged is None:
            merged = found
        else:
            merge_into(*merged, *found)
    assert merged is not None, "a rank's own keys are a portion"
    out, lse = merged
    if spec.sinks is not None:
        add_sinks(out, lse, spec.sinks)
    return out.to(q.dtype), lse


def _backward(
    work: Assignment,
    spec: Spec,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    total, compute = _dtypes(work, spec, q)
    dout = torch.zeros_like(out) if dout is None else dout
    dsinks = None
    if spec.sinks is not None:
        delta = (dout.to(total) * out.to(total)).sum(-1)
        dsinks = gradient(spec.sinks, lse, delta if dlse is None else delta - dlse)
    given = _in_its_base(spec, dlse, lse)
    queries, douts, outs = (x.to(compute) for x in (q, dout, out))
    dq, dk, dv = (torch.zeros(x.shape, dtype=total, device=x.device) for x in (q, k, v))
    tables: list[Tensor] = []
    returning: list[tuple[Stage, Arriving]] = []
    for portion, keys, values in work.arriving(k, v):
        of_keys, of_values = (x.new_zeros((*x.shape[:2], len(portion.keys.at), x.shape[3])) for x in (dk, dv))
        if portion.analysis is not None:
            own = work.spec(spec, portion)
            found = portion.analysis.backward(
                own, douts, given[0], queries, keys.to(compute), values.to(compute), outs, given[1]
            )
            dq += found.q
            of_keys, of_values = found.k.to(total), found.v.to(total)
            tables = [a + b for a, b in zip(tables, found.tables, strict=True)] if tables else list(found.tables)
        if portion.stage is None:
            dk += of_keys
            dv += of_values
        else:
            returning.append((portion.stage, exchange.send_back(portion.stage, of_keys, of_values, work.peers)))
    for stage, arriving in returning:
        exchange.add_back(stage, arriving.wait(), dk, dv)
    return Gradients(dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dsinks, tuple(tables))


def _dtypes(work: Assignment, spec: Spec, q: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What sums are in, and what shares are computed in: on the CPU the same where there is something to sum."""
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    several = spec.backend == "cpu" and len(work.portions) > 1
    return total, total if several else q.dtype


def _in_its_base(spec: Spec, dlse: Tensor | None, lse: Tensor) -> tuple[Tensor | None, Tensor]:
    """Of dlse and lse what the backend has for them: see `autograd.natural`."""
    if spec.backend != "triton":
        return dlse, lse
    return None if dlse is None else dlse * math.log(2), lse / math.log(2)
