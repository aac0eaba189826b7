"""A pool of pages and what callers pass as its scales -> the pool as backends have it: each number has a scale.

    0.02, or a tensor of one number        all of a pool          vLLM's and FlashInfer's k_scale and v_scale
    (Hkv,)                                 for each key head
    (P, page_size, Hkv)                    for each token and head, where its vector lies in the pool; with layout "HND"
                                           (P, Hkv, page_size). `PageTable.append` fills them

Only scales of tokens that some query sees are looked at: the others may be anything, as their slots may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.ground.eight_bits import FORMAT, LARGEST_SCALE
from maskflash.ground.pool import Pool
from maskflash.ground.stretch import BoolArray, Numbers

Scale = float | Tensor

_OF_TOKENS: Final = 3  # dimensions
_RIGHT: Final = "a positive number of at most 7.6e35, with which the largest code of 448 is a float32"


def pools_of(operation: str, pages: Sequence[Tensor], scales: tuple[Any, Any], layout: str) -> tuple[Pool, Pool]:
    """The pools of keys and of values, their scales checked but for the numbers that tensors hold.

    Args:
        operation: what messages call it.
        pages: of keys and of values, (P, page_size, Hkv, D), whatever the layout.
        scales: of both, as the caller passes them; None for none.
        layout: of the pools as they were given, and so of scales of tokens.

    Raises:
        ArgumentTypeError: a pool in 8 bits of another format, scales of another type or dtype, one pool alone in
            8 bits.
        ArgumentError: scales for a pool that has none, none for one in 8 bits, another shape or device, a gradient.
    """
    k_pages, v_pages = (_pool(operation, *of, layout) for of in zip("kv", pages, scales, strict=True))
    if (k_pages.scales is None) != (v_pages.scales is None):
        raise ArgumentTypeError(
            f"{operation}: v_pages has dtype {v_pages.pages.dtype} and k_pages {k_pages.pages.dtype}; expected both in "
            "8 bits, or none"
        )
    return k_pages, v_pages


def _pool(operation: str, name: str, pages: Tensor, scale: Any, layout: str) -> Pool:
    """That of keys, "k", or of values, "v"."""
    named = f"{name}_scale"
    if pages.dtype != FORMAT:
        if pages.dtype.itemsize == 1:
            raise ArgumentTypeError(
                f"{operation}: {name}_pages has dtype {pages.dtype}, expected q's dtype, or {FORMAT} with {named}"
            )
        if scale is not None:
            raise ArgumentError(
                f"{operation}: {named} is given for {name}_pages of {pages.dtype}, expected none: only pools of "
                f"{FORMAT} have scales; leave it out"
            )
        return Pool(pages)
    if scale is None:
        raise ArgumentError(
            f"{operation}: {name}_pages holds {FORMAT} and {named} is missing, expected what its numbers are "
            f"multiplied by: a number, or {_shapes(pages, layout)}; 1.0 where they are not scaled"
        )
    return Pool(pages, _scales(operation, named, pages, scale, layout))


def _scales(operation: str, named: str, pages: Tensor, scale: Any, layout: str) -> Tensor:
    """Scales as (P, page_size, Hkv), a view."""
    count, tokens, heads, _ = pages.shape
    if not isinstance(scale, Tensor):
        if isinstance(scale, (bool, np.bool_, np.ndarray)) or not hasattr(type(scale), "__float__"):
            fix = f"; torch.from_numpy({named}).float() makes one" if isinstance(scale, np.ndarray) else ""
            raise ArgumentTypeError(
                f"{operation}: {named} is {arguments.by_type(scale)}, expected a number or a float32 tensor{fix}"
            )
        number = float(torch.tensor(arguments.positive(operation, named, scale), dtype=torch.float32, device="cpu"))
        if not 0 < number <= LARGEST_SCALE:
            raise ArgumentError(f"{operation}: {named} in float32 is {number}, expected {_RIGHT}")
        return torch.full((), number, dtype=torch.float32, device=pages.device).expand(count, tokens, heads)
    arguments.held(operation, named, scale)
    if scale.dtype != torch.float32:
        raise ArgumentTypeError(f"{operation}: {named} has dtype {scale.dtype}, expected torch.float32")
    if scale.device != pages.device:
        raise ArgumentError(f"{operation}: {named} is on {scale.device}, expected the pool's {pages.device}")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{operation}: {named} asks for a gradient, expected none: there is no backward through pages; call it "
            "under torch.no_grad()"
        )
    found: Tensor = scale.detach()
    if of_tokens(found) and layout == "HND":
        found = found.transpose(1, 2)
    if found.shape == pages.shape[:3]:
        return found
    if found.shape not in ((), (1,), (heads,)):
        shape = tuple(scale.shape)
        raise ArgumentError(f"{operation}: {named} has shape {shape}, expected one number, or {_shapes(pages, layout)}")
    return found.expand(count, tokens, heads)


def of_tokens(scale: Any) -> bool:
    """Whether scales are for each token and head."""
    return isinstance(scale, Tensor) and scale.ndim == _OF_TOKENS


def check_shared(operation: str, name: str, scale: Any) -> None:
    """Check the numbers of a tensor of scales that all tokens share; it is read on the host.

    Raises:
        ArgumentError: one that is not positive, or beyond `LARGEST_SCALE`.
    """
    if not isinstance(scale, Tensor) or of_tokens(scale):
        return
    heads = scale.detach().reshape(-1).cpu()
    wrong = ~_right(heads)
    if wrong.any():
        head = int(wrong.int().argmax())
        of = f" for head {head}" if len(heads) > 1 else ""
        raise ArgumentError(f"{operation}: {name}_scale is {float(heads[head])}{of}, expected {_RIGHT}")


def check_seen(operation: str, name: str, pool: Pool, scale: Any, ids: Numbers, seen: BoolArray) -> None:
    """Check the numbers of the scales of tokens that some query sees, where each token has its own.

    Args:
        operation: what messages call it.
        name: "k" or "v".
        pool: of the scales.
        scale: as the caller passed it.
        ids: (n,), pages of the pool.
        seen: (n, page_size), which tokens are seen.

    Raises:
        ArgumentError: one that is not positive, or beyond `LARGEST_SCALE`.
    """
    if pool.scales is None or not of_tokens(scale):
        return
    scales = pool.scales.index_select(0, torch.from_numpy(ids).to(pool.scales.device)).cpu()
    wrong = ~_right(scales) & torch.from_numpy(seen)[..., None]
    if wrong.any():
        at, slot, head = np.argwhere(wrong.numpy())[0].tolist()
        raise ArgumentError(
            f"{operation}: {name}_scale is {float(scales[at, slot, head])} for slot {slot} of page {ids[at]}, head "
            f"{head}, which is used; expected {_RIGHT}"
        )


def _right(scales: Tensor) -> Tensor:
    return (scales > 0) & (scales <= LARGEST_SCALE)


def _shapes(pages: Tensor, layout: str) -> str:
    count, tokens, heads, _ = pages.shape
    each = (count, tokens, heads) if layout == "NHD" else (count, heads, tokens)
    return f"float32 ({heads},), one for each head, or {each}, one for each token and head"
