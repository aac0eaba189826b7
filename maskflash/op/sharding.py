"""DTensors and a mask -> the op on what each rank holds of the batch and the heads, under the mask as seen from there.

A rank that holds the rows from 4 on computes under `mask(b + 4, ...)`: the mask's tables are whole everywhere, and its
indices are those of the whole tensors. Nothing is sent, unless k or v are laid out in another way than q, or sinks are
trained: their gradient is summed over the ranks that share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.op.parts import part
from maskflash.op.spec import Spec

_DIMENSIONS: Final = ("batch", "heads", "tokens", "head dim")


def forward(cls: Any, op: Any, types: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The results out and lse, laid out as q is."""
    q, k, v, *mask = args
    return _on_parts(op, args[:3], (q, k, v), mask, ((*q.shape[:3], v.shape[3]), q.shape[:3]))


def backward(cls: Any, op: Any, types: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """dq, dk and dv, laid out as q is; those of sinks and of a score's tables as these are."""
    q, k, v = args[2:5]
    *found, dsinks, dtables = _on_parts(op, args[:7], (q, k, v), args[7:], (q.shape, k.shape, v.shape))
    spec = Spec.from_op(*args[7:])
    learned = [table for table, wanted in zip(spec.score_tables, spec.learned, strict=True) if wanted]
    summed = [_summed(part, table, q, by_head=False) for part, table in zip(dtables, learned, strict=True)]
    return *found, dsinks if spec.sinks is None else _summed(dsinks, spec.sinks, q, by_head=True), summed


def _on_parts(op: Any, tensors: Sequence[Any], qkv: Sequence[Any], mask: Sequence[Any], shapes: Sequence[Any]) -> Any:
    """An op on what this rank holds of its tensors: results of these shapes, and what else it gives, as it is here."""
    if not any(isinstance(x, DTensor) for x in qkv):
        return op(*tensors, *_here(mask, None, ()))
    mesh, placements = _layout(*qkv)
    with torch.no_grad():  # autograd is above
        parts = [None if x is None else _part(x, mesh, placements) for x in tensors]
        local = op(*parts, *_here(mask, qkv[0], placements))
        found = [_whole(x, mesh, placements, shape) for x, shape in zip(local, shapes, strict=False)]
        return *found, *local[len(shapes) :]


def _layout(q: Any, k: Any, v: Any) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """Where q, k, v and all that is made of them are computed: as q is laid out; what is to be summed, everywhere.

    Raises:
        ArgumentTypeError: only some of them are DTensors.
        ArgumentError: they are of several meshes, or split along tokens, or key heads can't be shared out.
    """
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, DTensor):
            raise ArgumentTypeError(
                f"attention: {name} is a {type(x).__name__}, expected a DTensor as the others are; make it one with "
                "torch.distributed.tensor.distribute_tensor or DTensor.from_local"
            )
        if x.device_mesh != q.device_mesh:
            raise ArgumentError(f"attention: {name} is on {x.device_mesh}, expected q's {q.device_mesh}")
        for placement in x.placements:
            if not (placement.is_replicate() or placement.is_partial() or _is_split(placement)):
                along = _DIMENSIONS[placement.dim] if isinstance(placement, Shard) else str(placement)
                fix = f"bring it together first: {name}.redistribute(placements=...)"
                if along == "tokens":
                    fix += ", or attend on shards of a plan: maskflash.parallel.compile"
                raise ArgumentError(
                    f"attention: {name} is a DTensor split along {along}, expected batch (Shard(0)) or heads "
                    f"(Shard(1)); {fix}"
                )
    placements = tuple(p if _is_split(p) else Replicate() for p in q.placements)
    split = 1
    for size, placement in zip(q.device_mesh.shape, placements, strict=True):
        split *= size if placement.is_shard(1) else 1
    if k.shape[1] % split:
        raise ArgumentError(
            f"attention: {k.shape[1]} key heads can't be shared out over {split} ranks along q's heads, expected a "
            "multiple; repeat key heads for it (repeat_interleave), or split the batch"
        )
    return q.device_mesh, placements


def _is_split(placement: Placement) -> bool:
    return isinstance(placement, Shard) and placement.dim in (0, 1)


def _part(x: DTensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """What this rank holds of it in a layout."""
    return x.redistribute(mesh, placements).to_local()


def _whole(x: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], shape: Sequence[int]) -> DTensor:
    """A tensor of this shape, of which this rank holds x."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _summed(part: Tensor, like: Tensor, q: Tensor, *, by_head: bool) -> Tensor:
    """A gradient, laid out as what it is of, from that of the heads and batch rows of q on this rank.

    Args:
        part: this rank's: of the heads that it holds if `by_head`, else of all that there is.
        like: what it is the gradient of.
        q: whose layout says what ranks hold.
        by_head: whether there is one number for each query head.
    """
    if not isinstance(q, DTensor):
        return part
    of_head: Placement = Shard(0) if by_head else Partial()
    laid_out = [of_head if p.is_shard(1) else Partial() if p.is_shard(0) else Replicate() for p in q.placements]
    shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
    with torch.no_grad():
        found = DTensor.from_local(part, q.device_mesh, laid_out, run_check=False, shape=shape, stride=stride)
        return found.redistribute(placements=like.placements) if isinstance(like, DTensor) else found.full_tensor()


def _here(args: Sequence[Any], q: DTensor | None, placements: tuple[Placement, ...]) -> Spec:
    """The op's spec as seen from this rank's part of q: indices shifted, tables whole, offsets of its own rows."""
    spec = Spec.from_op(*args)
    spec = spec.with_tensors([None if x is None else _all_of(x) for x in spec.tensors])
    if q is None:
        return spec
    rows, of_heads = (_held(q.shape[dim], dim, q.device_mesh, placements) for dim in (0, 1))
    return part(spec, rows, of_heads)


def _held(size: int, dim: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> range:
    """What this rank holds of a dimension, which torch splits as `chunk` does."""
    held, at = range(size), mesh.get_coordinate()
    assert at is not None, "a rank outside of the mesh has no part to compute"
    for ranks, place, placement in zip(mesh.shape, at, placements, strict=True):
        if placement.is_shard(dim):
            most = -(-len(held) // ranks)
            held = held[most * place : most * (place + 1)]
    return held


def _all_of(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    return x.to_local() if all(placement.is_replicate() for placement in x.placements) else x.full_tensor()


torch.library.register_torch_dispatch("maskflash::forward", DTensor, forward)
torch.library.register_torch_dispatch("maskflash::backward", DTensor, backward)
