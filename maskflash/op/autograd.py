"""Tensors, and a mask as text and numbers -> out and lse: the ops torch sees, with their gradients.

The schema holds nothing of this process: the mask is its canonical expression, its parameters and its tables. So a
graph that recorded the op runs elsewhere, and lengths and parameters may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from maskflash.analysis.problem import Problem
from maskflash.expr.evaluate import Inputs
from maskflash.functions.slots import expression
from maskflash.ground.identity import state
from maskflash.op import cache, checking, later
from maskflash.op.analyse import Analysis, Backend

_MASK: Final = (
    "Tensor[] tables, SymInt[] params, SymInt q_offset, Tensor? q_offsets, float scale, "
    "str expr, int[2] block_size, str backend"
)

# A recorded CUDA graph would keep the block map of the tables that it was recorded with.
_TAGS: Final = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_DENSE: Final = "use a dense mask with torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"

_Mask = tuple[Any, ...]  # what the schema has of it
_PLAIN: Final = frozenset((Tensor, torch.nn.Parameter))  # subclasses may dispatch for themselves

_library = torch.library.Library("maskflash", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    "backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    params: list[int],
    q_offset: int | Tensor,
    scale: float,
    expr: str,
    block_size: tuple[int, int],
    backend: Backend,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Masked attention, differentiable in q, k and v through out and lse.

    Args:
        q: (B, Hq, Sq, D) float32, float64, bfloat16 or float16.
        k: (B, Hkv, Skv, D).
        v: (B, Hkv, Skv, Dv).
        tables: values of the mask's table slots.
        params: values of its integer slots.
        q_offset: added to row numbers; an int, or an int tensor (B,).
        scale: positive factor of the scores.
        expr: the mask's canonical text.
        block_size: (bq, bkv), a tile in tokens.
        backend: which kernels run it.
        return_lse: whether lse is needed.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype; lse (B, Hq, Sq), natural logarithm, float32 (float64 for float64), or perhaps
        None where it isn't needed.
    """
    number, tensor = (0, q_offset) if isinstance(q_offset, Tensor) else (q_offset, None)
    mask = tables, params, number, tensor, scale, expr, block_size, backend
    result: tuple[Tensor, Tensor | None]
    of_mask = tables if tensor is None else [*tables, tensor]
    if torch.compiler.is_compiling() or watched(q, k, v, *of_mask):
        result = torch.ops.maskflash.forward.default(q, k, v, *mask)
        return result
    plan = _analysis(q, k, *mask).plan if backend == "cpu" and not return_lse else None
    out = None if plan is None else at_once(plan, q, k, v, scale)
    if out is not None:
        return out, None
    result = _Forward.apply(_forward_at_once, q, k, v, mask)
    return result


def at_once(plan: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """`out`, where one call of torch's own kernel is all there is to do: torch differentiates it, once. Else None."""
    from maskflash.backends.cpu import run as cpu

    call = cpu.sole_call(plan, q, k, v) if isinstance(plan, cpu.Plan) else None
    if call is None:
        return None
    out = cpu.attend(plan, call, q, k, v, scale)
    if out.grad_fn is not None:
        out.grad_fn.register_hook(_refused)
    return out.contiguous()


def _refused(gradients: tuple[Tensor | None, ...], arrived: Any) -> tuple[Tensor | None, ...] | None:
    final: tuple[Tensor | None, ...] | None = _Final.apply(*gradients) if torch.is_grad_enabled() else None
    return final  # None leaves them as they are


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
    """Saves q, k, v, out, lse and the mask's tensors: writing to any of them before backward is an error.

    Tensors of inference mode can't be saved, and their analyses are found by content: of them copies are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, mask: _Mask
    ) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v, *mask)
        tables, params, q_offset, q_offsets, *rest = mask
        of_mask = q_offsets, *tables
        ctx.save_for_backward(q, k, v, out, lse, *(None if _is_of_inference(x) else x for x in of_mask))
        ctx.mask = params, q_offset, rest, [_copy(x) if _is_of_inference(x) else None for x in of_mask]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *of_mask = ctx.saved_tensors
        params, q_offset, rest, copies = ctx.mask
        q_offsets, *tables = (x if copy is None else copy for x, copy in zip(of_mask, copies, strict=True))
        if dout is None and dlse is None:
            return (None,) * 5
        gradients = torch.ops.maskflash.backward.default(
            dout, dlse, q, k, v, out, lse, tables, params, q_offset, q_offsets, *rest
        )
        return None, *gradients, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"maskflash: attention has no forward-mode derivative; use reverse mode, or {_DENSE}")


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
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = _below_autograd(torch.ops.maskflash.backward.default, *args)
        return gradients


def _forward_autograd(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    with _own_level():
        result: tuple[Tensor, Tensor] = _Forward.apply(_forward_below, q, k, v, mask)
        return result


def _backward_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with _own_level():
        result: tuple[Tensor, Tensor, Tensor] = _Backward.apply(*args)
        return result


def _own_level() -> AbstractContextManager[None]:
    """Lets a Function run in a transform of torch.func, of which the dispatcher has left it one level."""
    if torch._C._are_functorch_transforms_active():
        return enable_single_level_autograd_function()
    return nullcontext()


def _forward_at_once(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*args)


def _forward_below(*args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _below_autograd(torch.ops.maskflash.forward.default, *args)
    return result


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


def _forward(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    from maskflash.backends.cpu import run as cpu

    plan, scale = _analysis(q, k, *mask).plan, mask[4]
    if isinstance(plan, cpu.Plan):
        return cpu.forward(plan, q, k, v, scale)
    from maskflash.backends.triton import run as triton

    return triton.forward(plan, problem_of(q, k, *mask)[0], q, k, v, scale)


def _analysis(q: Tensor, k: Tensor, *mask: Any) -> Analysis:
    """What is known of a call's mask, without a problem if there was a call like it: that would take 10 us."""
    tables, params, q_offset, q_offsets, _, expr, block_size, backend = mask
    if checking.ALWAYS:
        checking.check("attention", _named(expr, tables))
    if q_offsets is not None or any(table.is_inference() for table in tables):
        return cache.find(problem_of(q, k, *mask)[0], backend)
    call = (expr, backend, *block_size, q.shape, k.shape, q_offset, *params, *map(state, tables))
    found = cache.again(call)
    if found is None:
        problem = problem_of(q, k, *mask)[0]
        found = cache.find(problem, backend)
        cache.note(call, tables, problem, backend)
    return found


def _named(expr: str, tables: list[Tensor]) -> list[tuple[str, Tensor]]:
    """Tables and what a user knows them by: the line that looks them up, or their number."""
    mask = expression(expr)
    lines = {node.value: mask.source(place) for place, node in enumerate(mask.nodes) if node.op == "lookup"}
    return [(f"{slot} ({lines[slot]})" if lines.get(slot) else str(slot), table) for slot, table in enumerate(tables)]


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *mask: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from maskflash.backends.cpu import run as cpu

    problem, scale, backend = problem_of(q, k, *mask)
    dout = torch.zeros_like(out) if dout is None else dout
    plan = cache.find(problem, backend, saved=True).plan
    if isinstance(plan, cpu.Plan):
        return cpu.backward(plan, dout, dlse, q, k, v, out, lse, scale)
    from maskflash.backends.triton import run as triton

    return triton.backward(plan, problem, dout, dlse, q, k, v, out, lse, scale)


def _forward_meta(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_meta(dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def problem_of(
    q: Tensor,
    k: Tensor,
    tables: list[Tensor],
    params: list[int],
    q_offset: int,
    q_offsets: Tensor | None,
    scale: float,
    expr: str,
    block_size: Sequence[int],
    backend: Backend,
) -> tuple[Problem, float, Backend]:
    """What the op is given of a mask as a problem, and beside it the scale and the backend."""
    batch, heads, q_len, _ = q.shape
    rows, columns = block_size
    mask = expression(expr)
    problem = Problem(
        expr=mask,
        inputs=Inputs(mask.decoded(params), tuple(tables)),
        q_len=q_len,
        kv_len=k.shape[2],
        batch=batch,
        heads=heads,
        block_size=(rows, columns),
        q_offset=q_offset if q_offsets is None else q_offsets,
        device=q.device,
    )
    return problem, scale, backend


def _with_lists(implementation: Callable[..., Any], place: int) -> Callable[..., Any]:
    """An implementation whose two lists, from this place on, may be None: AOTInductor hands empty ones over as that."""

    def listed(*args: Any) -> Any:
        return implementation(*args[:place], args[place] or [], args[place + 1] or [], *args[place + 2 :])

    return listed


for _name, _place, _implementations in (
    ("forward", 3, (_forward, _forward_meta, _forward_autograd)),
    ("backward", 7, (_backward, _backward_meta, _backward_autograd)),
):
    _run, _meta, _autograd = (_with_lists(_each, _place) for _each in _implementations)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    _library.impl(_name, _meta, "Meta")
    _library.impl(_name, _autograd, "Autograd")
    _library.impl(_name, _batched, "FuncTorchBatched")

later.follow("torch.utils.flop_counter", "maskflash.op.flops")
later.follow("torch.distributed.tensor", "maskflash.op.sharding")
