"""A call's tensors and mask -> floating-point operations, for `torch.utils.flop_counter.FlopCounterMode`.

Counted as torch counts its own attention, two for each multiply-add of its products, but only in visited tiles: a tile
that the mask leaves out costs nothing, one that it cuts counts whole. A dense call counts what SDPA's formula says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.functions.sizes import Sizes
from maskflash.op import cache
from maskflash.op.spec import Spec


@register_flop_formula(torch.ops.maskflash.forward, get_raw=True)
def forward(q: Tensor, k: Tensor, v: Tensor, *mask: Any, out_val: Any = None) -> int:
    """Q Kᵀ and P V: 2 (D + Dv) for each visited pair of each query head."""
    return _pairs(q, k, *mask) * 2 * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.maskflash.backward, get_raw=True)
def backward(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *mask: Any, out_val: Any = None
) -> int:
    """Q Kᵀ again, dO Vᵀ, Pᵀ dO, dS K and dSᵀ Q: 2 (3 D + 2 Dv) for each visited pair of each query head."""
    return _pairs(q, k, *mask) * 2 * (3 * q.shape[3] + 2 * v.shape[3])


def visited(block_map: BlockMap) -> int:
    """Pairs, inside the lengths, in all visited tiles of all batch rows and heads that the map has."""
    rows, columns = block_map.block_size
    runs, n_q = block_map.rows, max(block_map.shape[2], 1)
    start = runs.start.long() * columns
    length = (runs.stop.long() * columns).clamp(max=block_map.kv_len) - start
    first = (runs.lines() % n_q) * rows
    height = (first + rows).clamp(max=block_map.q_len) - first
    return int((length * height).sum())


def _pairs(q: Tensor, k: Tensor, *args: Any) -> int:
    """Pairs in visited tiles of a call; all of them where sizes or tables have no values yet."""
    spec, (batch, heads, q_len, _) = Spec.from_op(*args), q.shape
    if not _is_known(q, k, spec):
        return batch * heads * q_len * k.shape[2]
    with _disable_current_modes():  # what is counted here is no part of what they look at
        found = _block_map(q, k, spec)
        own_batch, own_heads = found.shape[:2]
        return visited(found) * (batch // max(own_batch, 1)) * (heads // max(own_heads, 1))


def _is_known(q: Tensor, k: Tensor, spec: Spec) -> bool:
    numbers = (*q.shape, k.shape[2], spec.q_offset, spec.kv_offset, *spec.params)
    tensors = (x for x in spec.tensors if x is not None)
    return all(type(number) is int for number in numbers) and not any(map(_is_hollow, tensors))


def _block_map(q: Tensor, k: Tensor, spec: Spec) -> BlockMap:
    """The call's map; without data of q it is made for the CPU, and not kept."""
    sizes = Sizes.of(q, k)
    if _is_hollow(q):
        return classify(spec.problem(sizes._replace(device=torch.device("cpu")))).block_map
    return cache.find(spec, sizes, saved=True).block_map


def _is_hollow(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor | FunctionalTensor)
