"""Tensors and a spec -> out and lse: the ops that torch sees, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import expression
from maskflash.op import cache, checking, later
from maskflash.op.analyse import Analysis
from maskflash.op.few_rows import FewRows
from maskflash.op.spec import SCHEMA, Spec

# A recorded CUDA graph would keep the block map of the tables that it was recorded with.
_TAGS: Final = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_DENSE: Final = "use a dense mask with torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"

_PLAIN: Final = frozenset((Tensor, torch.nn.Parameter))  # subclasses may dispatch for themselves

Found = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]
"""What the op's backward gives: dq, dk, dv, dsinks, and the gradients of the learned ones of the score's tables."""

_library = torch.library.Library("maskflash", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    "backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor[] dtables)",
    tags=_TAGS,
)


def attend(analysis: Analysis | FewRows, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Masked attention, differentiable in q, k, v, sinks and a score's tables, where nobody watches: see `watched`.

    Args:
        analysis: what `prepared` found.
        spec: what is attended.
        q: (B, Hq, Sq, D) float32, float64, bfloat16 or float16.
        k: (B, Hkv, Skv, D).
        v: (B, Hkv, Skv, Dv).

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype; lse (B, Hq, Sq), float32 (float64 for float64), for `natural`.
    """
    learned = any(spec.learned) or (spec.sinks is not None and spec.sinks.requires_grad)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or learned)):
        return analysis.forward(spec, q, k, v)
    by_engine = analysis.differentiable(spec, q, k, v)
    if by_engine is not None:
        for node in {x.grad_fn for x in by_engine if x.grad_fn is not None}:
            node.register_hook(_refused)
        return by_engine
    result: tuple[Tensor, Tensor] = _Forward.apply(analysis, q, k, v, spec, *spec.tensors)
    return result


def natural(spec: Spec, lse: Tensor) -> Tensor:
    """An lse of `attend` or `dispatch` as users get it: Triton's are in base 2, as its backward wants them."""
    return lse * math.log(2) if spec.backend == "triton" else lse


def dispatch(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same through torch's dispatcher, for whoever watches: out and lse."""
    result: tuple[Tensor, Tensor] = torch.ops.maskflash.forward.default(q, k, v, *spec)
    return result


def at_once(analysis: Analysis | FewRows, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """`out`, where one call of torch's own kernel is all there is to do: torch differentiates it, once. Else None."""
    out = analysis.at_once(scale, q, k, v)
    if out is None:
        return None
    if out.grad_fn is not None:
        out.grad_fn.register_hook(_refused)
    return out.contiguous()


def _refused(gradients: tuple[Tensor | None, ...], arrived: Any) -> tuple[Tensor | None, ...] | None:
    return final(gradients) if torch.is_grad_enabled() else None  # which leaves them as they are


def final(gradients: tuple[Tensor | None, ...], *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that refuse to be differentiated with respect to what they, or these inputs, are made of."""
    found: tuple[Tensor | None, ...] = _Final.apply(*gradients, *inputs)
    return found[: len(gradients)]


def watched(*tensors: Tensor) -> bool:
    """Whether anything but autograd may want to see the op; if nothing does, dispatching it is 40 us for nothing."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


# What autograd.Function is made of, without what that does about torch.func: the op's dispatcher does it.
_Function: Any = torch.autograd.function._SingleLevelFunction


class _Forward(_Function):  # type: ignore[misc]
    """Saves q, k, v, out, lse and the spec's tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        analysis: Analysis | FewRows | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: Spec,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        spec = spec.with_tensors(tensors)
        if analysis is None:
            out, lse = _below_autograd(torch.ops.maskflash.forward.default, q, k, v, *spec)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = analysis.forward(spec, q, k, v)
        save(ctx, tensors, q, k, v, out, lse)
        ctx.analysis, ctx.spec = analysis, spec.with_tensors((None,) * len(tensors))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), tensors = saved(ctx, 5)
        if dout is None and dlse is None:
            return (None,) * (5 + len(tensors))
        spec = ctx.spec.with_tensors(tensors)
        given = [x for x in (dout, dlse, q, k, v, *tensors) if x is not None]
        if ctx.analysis is None or torch.is_grad_enabled() or watched(*given):
            gradients = torch.ops.maskflash.backward.default(dout, dlse, q, k, v, out, lse, *spec)
        else:
            gradients = ctx.analysis.backward(spec, dout, dlse, q, k, v, out, lse)
        dq, dk, dv, dsinks, dtables = gradients
        arriving = iter(dtables)
        of_tables = [next(arriving) if learned else None for learned in spec.learned]
        others = [None] * (len(tensors) - 1 - len(of_tables))
        return None, dq, dk, dv, None, None if spec.sinks is None else dsinks, *of_tables, *others

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode()


def no_forward_mode() -> NotImplementedError:
    """The error of whoever asks for it."""
    return NotImplementedError(f"maskflash: attention has no forward-mode derivative; use reverse mode, or {_DENSE}")


def save(ctx: Any, tensors: Sequence[Tensor | None], *others: Tensor) -> None:
    """Keep the tensors of a spec, and others, for backward: writing to one of them before that is an error.

    Tensors of inference mode can't be saved, and their analyses are found by content: of them copies are kept.
    """
    ctx.save_for_backward(*others, *(None if _is_of_inference(x) else x for x in tensors))
    ctx.copies = [None if x is None or not x.is_inference() else _copy(x) for x in tensors]


def saved(ctx: Any, others: int) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """What `save` has kept: so many others, and the tensors of a spec."""
    kept = ctx.saved_tensors
    tensors = [x if copy is None else copy for x, copy in zip(kept[others:], ctx.copies, strict=True)]
    return kept[:others], tensors


def _is_of_inference(x: Tensor | None) -> bool:
    return x is not None and x.is_inference()


def _copy(x: Tensor) -> Tensor:
    """A tensor of inference mode once more; an ordinary one would not be found by content."""
    with torch.inference_mode():
        return x.clone()


class _Final(_Function):  # type: ignore[misc]
    """Gradients that refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        raise NotImplementedError(f"maskflash: attention has no second derivative; detach its gradients, or {_DENSE}")

    jvp = backward


class _Backward(_Final):
    """The op's gradients, where zeros for theirs would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        tensors, spec, rest = args[:7], args[7], args[8:]
        op = torch.ops.maskflash.backward.default
        *gradients, dtables = _below_autograd(op, *tensors, *spec.with_tensors(rest))
        return *gradients, *dtables


def _forward_autograd(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    spec = Spec.from_op(*args)
    with _own_level():
        result: tuple[Tensor, Tensor] = _Forward.apply(None, q, k, v, spec, *spec.tensors)
        return result


def _backward_autograd(*args: Any) -> Found:
    spec = Spec.from_op(*args[7:])
    with _own_level():
        dq, dk, dv, dsinks, *dtables = _Backward.apply(*args[:7], spec, *spec.tensors)
        return dq, dk, dv, dsinks, dtables


def _own_level() -> AbstractContextManager[None]:
    """Lets a Function run in a transform of torch.func, of which the dispatcher has left it one level."""
    if torch._C._are_functorch_transforms_active():
        return enable_single_level_autograd_function()
    return nullcontext()


def _below_autograd(op: Any, *args: Any) -> Any:
    """An op's result from the kernels below autograd."""
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    # The next level down of torch.func differentiates for itself, which a Function's forward would keep it from.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op(*args)


def _batched(*args: Any) -> Any:
    raise NotImplementedError(
        "maskflash: attention can't be vmapped; make what is mapped over its batch (its first dimension), or call it "
        "once for each element"
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    spec = Spec.from_op(*args)
    return prepared(spec, q, k).forward(spec, q, k, v)


def prepared(spec: Spec, q: Tensor, k: Tensor) -> Analysis | FewRows:
    """What runs forward: the call's own few rows, or its analysis."""
    return FewRows.of(spec, q, k) or found(spec, q, k)


def found(spec: Spec, q: Tensor, k: Tensor) -> Analysis:
    """The analysis of a call, made now or found."""
    if checking.ALWAYS:
        checking.check("attention", _named(spec))
    sizes = Sizes.of(q, k)
    analysis = cache.find(spec, sizes)
    cache.check_reads(spec, sizes)
    return analysis


def _named(spec: Spec) -> list[tuple[str, Tensor]]:
    """Tables and what a user knows them by: the line that looks them up, or their number."""
    mask = expression(spec.expr)
    lines = {node.value: mask.source(place) for place, node in enumerate(mask.nodes) if node.op == "lookup"}
    return [
        (f"{slot} ({lines[slot]})" if lines.get(slot) else str(slot), table) for slot, table in enumerate(spec.tables)
    ]


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> Found:
    spec = Spec.from_op(*args)
    analysis = cache.find(spec, Sizes.of(q, k), saved=True)
    found = analysis.backward(spec, dout, dlse, q, k, v, out, lse)
    dsinks = q.new_empty(0) if found.sinks is None else found.sinks  # an op can't return None
    return found.q, found.k, found.v, dsinks, list(found.tables)


def _forward_meta(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_meta(dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *args: Any) -> Found:
    spec = Spec.from_op(*args)
    dsinks = q.new_empty(0) if spec.sinks is None else spec.sinks.new_empty(spec.sinks.shape)
    learned = zip(spec.score_tables, spec.learned, strict=True)
    dtables = [table.new_empty(table.shape) for table, wanted in learned if wanted]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks, dtables


for _name, _implementations in (
    ("forward", (_forward, _forward_meta, _forward_autograd)),
    ("backward", (_backward, _backward_meta, _backward_autograd)),
):
    _run, _meta, _autograd = _implementations
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    _library.impl(_name, _meta, "Meta")
    _library.impl(_name, _autograd, "Autograd")
    _library.impl(_name, _batched, "FuncTorchBatched")

later.follow("torch.utils.flop_counter", "maskflash.op.flops")
later.follow("torch.distributed.tensor", "maskflash.op.sharding")
