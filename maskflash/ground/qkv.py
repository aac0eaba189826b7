"""q, k and v as callers pass them -> the same, checked to fit one another, and cast as autocast has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError, BackendError
from maskflash.ground.arguments import DTYPES, by_type, instance
from maskflash.ground.eight_bits import FORMAT

_STRIDED: Final = torch.strided
_IN_8_BITS: Final = (
    "; keys and values in 8 bits are read as pages, those of a contiguous cache as one page of each batch row: "
    "mf.compile(mask).paged(q, k, v, mf.PageTable(torch.arange(batch, device=k.device)[:, None], lengths, "
    'page_size=k.shape[2]), layout="HND", k_scale=..., v_scale=...)'
)
_AUTOCAST: Final = ("cpu", "cuda")  # device types


def check(q: Tensor, k: Tensor, v: Tensor, operation: str = "attention") -> None:
    """Check what attention is computed of: shapes, dtypes, devices and layouts that fit."""
    if torch._C._get_tracing_state() is not None:
        raise BackendError(
            f"{operation}: torch.jit.trace is recording this call, which it can't; it is deprecated, so record with "
            "torch.export or torch.compile"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            fix = f"; torch.from_numpy({name}) makes one" if isinstance(x, np.ndarray) else ""
            raise ArgumentTypeError(f"{operation}: {name} is {by_type(x)}, expected a tensor{fix}")
        if x.is_nested:
            raise ArgumentTypeError(
                f"{operation}: {name} is nested, expected a dense tensor; calls of attention take nested ones where "
                "q, k and v all are, of layout torch.jagged"
            )
        if x.ndim != 4:
            raise ArgumentError(
                f"{operation}: {name} has shape {tuple(x.shape)}, expected 4 dimensions "
                f"(batch, heads, tokens, head_dim){_reshaped(name, x.ndim)}"
            )
        if x.dtype not in DTYPES:
            expected = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            fix = _IN_8_BITS if x.dtype == FORMAT and name != "q" else ""
            raise ArgumentTypeError(f"{operation}: {name} has dtype {x.dtype}, expected one of {expected}{fix}")
        if x.layout != _STRIDED:
            raise ArgumentTypeError(f"{operation}: {name} has layout {x.layout}, expected a dense tensor")
    dtype, device = q.dtype, q.device
    batch, heads, _, dim = q.shape
    k_batch, k_heads, k_len, k_dim = k.shape
    v_batch, v_heads, v_len, v_dim = v.shape
    for name, x, rows in (("k", k, k_batch), ("v", v, v_batch)):
        if x.dtype != dtype:
            raise ArgumentTypeError(f"{operation}: {name} has dtype {x.dtype}, expected q's {dtype}")
        if x.device != device:
            raise ArgumentError(f"{operation}: {name} is on {x.device}, expected q's {device}")
        if rows != batch:
            raise ArgumentError(f"{operation}: {name} has batch {rows}, expected q's {batch}")
    if dim != k_dim or dim == 0 or v_dim == 0:
        raise ArgumentError(
            f"{operation}: head_dim is {dim} for q, {k_dim} for k and {v_dim} for v; expected at "
            "least 1, and the same for q and k"
        )
    if k_heads != v_heads or k_len != v_len:
        raise ArgumentError(
            f"{operation}: k has {k_heads} heads of {k_len} tokens and v {v_heads} of {v_len}; expected the same"
        )
    if heads == 0 or k_heads == 0:
        raise ArgumentError(f"{operation}: q has {heads} heads and k {k_heads}; expected at least 1 each")
    if heads % k_heads:
        raise ArgumentError(f"{operation}: q has {heads} heads and k {k_heads}; expected q's to be a multiple of k's")


def check_sinks(sinks: Tensor, q: Tensor, operation: str = "attention") -> None:
    """Check attention sinks against q (B, Hq, Sq, D): a number for each query head, where q is."""
    instance(operation, "sinks", sinks, Tensor, "one number for each query head, such as an nn.Parameter")
    if sinks.shape != q.shape[1:2] or sinks.layout != _STRIDED:
        raise ArgumentError(
            f"{operation}: sinks have shape {tuple(sinks.shape)}, expected a dense ({q.shape[1]},), "
            "one for each head of q"
        )
    if not sinks.is_floating_point():
        raise ArgumentTypeError(f"{operation}: sinks have dtype {sinks.dtype}, expected a floating dtype")
    if sinks.device != q.device:
        raise ArgumentError(f"{operation}: sinks are on {sinks.device}, expected q's {q.device}")


def _reshaped(name: str, ndim: int) -> str:
    """How a tensor of other than four dimensions becomes one of four."""
    if ndim == 3:
        return (
            f"; {name}[None] adds a batch of 1, {name}.unflatten(-1, (heads, -1)).transpose(1, 2) takes heads out of "
            "(batch, tokens, heads * head_dim)"
        )
    if ndim > 4:
        return f"; {name}.flatten(0, {ndim - 4}) makes one batch of what comes before the heads"
    return f"; {name}[None, None] adds a batch and a head of 1" if ndim == 2 else ""


def same_device(device: torch.device, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Check that a mask's tables and the offsets are where q is."""
    for name, tensor in tensors:
        if tensor.device != device:
            raise ArgumentError(
                f"attention: the mask's {name} is on {tensor.device}, expected q's {device}; move it once, before "
                f"the call: {name}.to({str(device)!r})"
            )


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as autocast has torch's own attention take them: in its dtype, but for float64."""
    if not torch._C._is_any_autocast_enabled():
        return q, k, v
    if isinstance(q, Tensor) and q.device.type in _AUTOCAST and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (q, k, v)
        )
    return q, k, v
