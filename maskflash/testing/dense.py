"""A mask and the sizes of a call -> nothing, if tiles, results and gradients are right, else an AssertionError."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskflash.api import attention
from maskflash.backends.dense import DenseCall
from maskflash.backends.reference import error_budget
from maskflash.expr.evaluate import Inputs
from maskflash.functions.function import Function
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.predicate import MaskLike
from maskflash.masks.predicate import mask as as_mask
from maskflash.masks.sight import Sight
from maskflash.op.asking import BackendChoice
from maskflash.scores.score import Score, ScoreLike, as_score, own_arguments
from maskflash.scores.strength import BoundScore
from maskflash.testing.keep import dropout_keep
from maskflash.testing.shape import Shape, torch_seed


def assert_matches_dense(
    mask: MaskLike,
    shape: Shape | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    block_size: BlockSize = 128,
    scale: float | None = None,
    backend: BackendChoice = "auto",
    device: str = "cpu",
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    score: ScoreLike | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = True,
    seed: int = 0,
    **args: Any,
) -> None:
    """Assert that a mask's block map and its attention agree with evaluating every pair densely.

    The map must equal brute force tile by tile. out, lse and the gradients of q, k, v, sinks and whatever the score
    function looks up that requires gradients, with gradients that arrive at both out and lse, must be as near to
    float64 as twice a plain computation in `dtype`, plus one rounding unit of the result and of the terms it is summed
    from (a gradient of zero may be the difference of large terms), and one of float64 for the truth's own rounding.

    Args:
        mask: a mask or predicate.
        shape: sizes of the call.
        dtype: of q, k and v.
        block_size: tokens per tile, one number or a pair.
        scale: factor of the scores; None for 1/sqrt(D).
        backend: as in `compile`.
        device: of the tensors.
        q_offset: as in a call.
        kv_offset: as in a call.
        score: as in `compile`.
        sinks: as in a call.
        dropout_p: as in a call, with `seed`.
        return_lse: as in a call; without it there is no lse to check, and no gradient that arrives there.
        seed: of the random tensors, and of dropout.
        **args: the mask's own arguments, and the score function's.

    Raises:
        AssertionError: naming the result, its error and its budget, or the tile and its kinds.

    Example:
        >>> import maskflash as mf
        >>> assert_matches_dense(mf.sliding_window(20), Shape(q_len=100, kv_len=100), block_size=32)
    """
    operation = "assert_matches_dense"
    shape = Shape() if shape is None else shape
    arguments.instance(operation, "shape", shape, Shape, "such as mf.testing.Shape(q_len=100)")
    dtype, seed = arguments.dtype(operation, dtype), torch_seed(operation, seed)
    checked = as_mask(mask)
    strength = None if score is None else as_score(operation, score)
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    sizes: dict[str, Any] = {"batch": shape.batch, "heads": shape.heads, "device": device, **offsets}
    seen = checked.at(shape.q_len, shape.kv_len, **sizes, **own_arguments(checked, args))
    dense = seen.dense()
    _assert_map(seen, dense, arguments.block_size(operation, block_size))
    q, k, v = shape.tensors(dtype, seed=seed, device=device)
    if sinks is not None:
        sinks = sinks.detach().to(torch.promote_types(sinks.dtype, dtype)).requires_grad_()
    draw = torch.Generator().manual_seed(seed + 1)
    given: dict[str, Any] = {"scale": scale, "block_size": block_size, "backend": backend, "sinks": sinks, **offsets}
    given |= {"score": strength, "dropout_p": dropout_p, "seed": seed if dropout_p else None}
    returned = attention(q, k, v, checked, **given, return_lse=return_lse, **args)
    ours = dict(zip(("out", "lse"), returned, strict=True)) if return_lse else {"out": returned}
    dout = torch.randn(ours["out"].shape, generator=draw).to(device, dtype)
    dlse = torch.randn(dout.shape[:3], generator=draw).to(device) * return_lse
    factor = shape.head_dim**-0.5 if scale is None else scale
    bound = None if strength is None else bound_score(strength, shape, sizes, dtype, args)
    tensors = (*(() if strength is None else strength.held()), *args.values())
    learned = {id(x): x for x in tensors if isinstance(x, Tensor) and x.requires_grad}
    lengths = shape.batch, shape.heads, shape.q_len, shape.kv_len
    kept = (
        dropout_keep(seed, dropout_p, *lengths, q_offset, kv_offset).to(device).double() / (1 - dropout_p)
        if dropout_p
        else None
    )
    call = DenseCall(q, k, v, dense, factor, dout, dlse, sinks, bound, tuple(learned.values()), kept)
    exact, plain = call.results(torch.float64), call.results(dtype, backwards=True)
    terms = call.terms(exact)
    arriving = [x.to(result.dtype) for x, result in zip((dout, dlse), ours.values(), strict=False)]
    inputs = {"dq": q, "dk": k, "dv": v, **({} if sinks is None else {"dsinks": sinks})}
    inputs |= {f"dtable{n}": x for n, x in enumerate(learned.values())}
    gradients = torch.autograd.grad(tuple(ours.values()), tuple(inputs.values()), arriving, allow_unused=True)
    ours.update((name, x) for name, x in zip(inputs, gradients, strict=True) if x is not None)
    for name, found in ours.items():
        unit = torch.finfo(torch.promote_types(dtype, found.dtype) if "table" in name else dtype).eps
        unit = max(unit, torch.finfo(found.dtype).eps) + torch.finfo(torch.float64).eps
        budget = error_budget(plain[name], exact[name], dtype) + unit * terms[name]
        _assert_near(name, found.detach(), exact[name].double(), budget)


def bound_score(
    score: Score, shape: Shape, sizes: dict[str, Any], dtype: torch.dtype, args: dict[str, Any]
) -> BoundScore:
    """A score function in a call, with what of it is a mask."""
    call = Sizes.checked("assert_matches_dense", shape.q_len, shape.kv_len, **sizes)
    slots, params, tables = Function.bind(score.at(dtype), call, own_arguments(score, args))
    wanted = tuple(table.requires_grad for table in tables)
    inputs = Inputs(slots.expr.decoded(params), tuple(tables))
    return BoundScore(slots.expr, inputs, wanted, sizes["q_offset"], sizes["kv_offset"])


def _assert_map(seen: Sight, dense: Tensor, block_size: tuple[int, int]) -> None:
    rows, columns = block_size
    found = seen.block_map(block_size).kinds()
    for i, band in enumerate(dense.split(rows, 2) if dense.numel() else ()):
        for j, tile in enumerate(band.split(columns, 3)):
            expected = tile.flatten(2).any(2).to(torch.int8) + tile.flatten(2).all(2).to(torch.int8)
            wrong = (found[:, :, i, j].expand_as(expected) != expected).nonzero()
            if len(wrong):
                b, h = wrong[0].tolist()
                kinds = ("skip", "partial", "full")
                got, wanted = (kinds[int(x.expand_as(expected)[b, h])] for x in (found[:, :, i, j], expected))
                raise AssertionError(
                    f"{seen.mask}: tile ({i}, {j}) of batch row {b}, head {h} is {got}, expected {wanted}"
                )


def _assert_near(name: str, found: Tensor, exact: Tensor, budget: float) -> None:
    finite = exact.isfinite()
    if not torch.equal(found.double()[~finite], exact[~finite]):
        raise AssertionError(f"{name}: rows that see nothing should hold {exact[~finite][:1].tolist()}")
    error = (found.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3g} exceeds its budget of {budget:.3g}")
