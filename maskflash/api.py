"""What users call: a mask -> an attention op, or attention under it at once."""

from __future__ import annotations

from typing import Any, Final, Literal, Never, get_args, overload

import torch
from torch import Tensor

from maskflash.errors import ArgumentTypeError
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.ground.names import instead_of, surplus, unexpected
from maskflash.masks.dense import FloatMask, dense_mask
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import MaskLike, Predicate, mask, refuse_maker
from maskflash.op import cache
from maskflash.op.asking import BackendChoice, asks_for_dropout
from maskflash.op.attention import Attention
from maskflash.op.spec import ENGINES
from maskflash.scores.presets import bias
from maskflash.scores.score import Score, ScoreLike, as_score
from maskflash.scores.strength import Kernels, Precision

_FULL: Final = Predicate(
    lambda b, h, q, kv: True, "full()", traced=False
)  # of calls without a mask; traced at the first


def compile(
    mask: MaskLike | Tensor,
    *more: Never,
    score: ScoreLike | None = None,
    scale: float | None = None,
    block_size: BlockSize = 128,
    backend: BackendChoice = "auto",
    deterministic: bool = True,
    tune: bool = False,
    check: bool = False,
    splits: int | Literal["auto"] = "auto",
    kernels: Kernels = "auto",
    precision: Precision = "full",
    **others: Never,
) -> Attention:
    """Compile a mask to an attention op.

    Args:
        mask: a predicate `f(b, h, q, kv) -> bool`, a preset, or masks combined with & | ^ ~; or a tensor of bool as
            torch's attention takes it, (q_len, kv_len) or (batch, heads, q_len, kv_len) where 1 serves all. One of
            floats is added to the scores, and hides where it is -inf or a dtype's lowest number.
        score: how strongly a visible pair attends: a function `f(score, b, h, q, kv) -> float` of the scaled product, a
            preset of `mf.scores`, or several that are applied in turn.
        scale: positive factor of the scores, from 2**-64 to 2**64; None for 1/sqrt(D).
        block_size: tokens per tile, one number or (q_tokens, kv_tokens): at most 2**24 pairs.
        backend: "auto" takes the device's: "cpu" or "triton". A named one never falls back to another. Engines of other
            libraries are run by name alone: "flex", "cudnn", "fa4", "magi", "flashinfer".
        deterministic: same inputs, same bits.
        tune: on a GPU, measure which tiles are fastest at the first call of a kind, and keep the choice on disk; a
            compiled graph uses what was found, and measures nothing.
        check: read every table at every call, and raise ArgumentError where one was written to by something that torch
            doesn't see (numpy, `.data`, another process); MASKFLASH_CHECK=1 in the environment does so for all calls.
            On a GPU `paged` then reads lengths and page tables on the host, and raises what is wrong with them.
        splits: on a GPU, into how many pieces the keys of few rows are cut, by what these see: a step of decoding, or
            drafts. "auto" has enough of them for the device's processors. With a number, which pieces a row has
            depends on its own mask alone, so its bits don't depend on who else is in the batch; 1 cuts nothing. On a
            CPU any number has steps over pages compute each request as if it were alone, with the same end.
        kernels: which of a GPU's kernels run: "portable" for those that serve all devices; "hopper" for those of
            compute capability 9.0, which are refused where their forward doesn't serve a call, and leave a backward
            with head dims over 128, or tiles not of 128 x 128 tokens, to the portable ones; "auto" for what
            MASKFLASH_KERNELS in the environment says, else "portable": Hopper's have not run on a GPU yet. Few rows
            over many keys, and pages, have kernels of their own forward, whatever is said here.
        precision: of products on a GPU. "full" computes in the dtype of q, k and v. "tf32x3" computes those of float32
            as three of TF32, which have tensor cores: nearly float32's accuracy in the scores, less in long sums.
            "fp8" computes forward's in 8 bits (e4m3) after making outliers small, on compute capability 8.9 or later,
            and the backward in full.
        *more: none; what is passed there is answered by its name.
        **others: none; those that other libraries have are answered by what to write here.

    Returns:
        The op: `attn(q, k, v, **mask_args)`.

    Raises:
        MaskTraceError: the predicate does something that can't become an expression.
        ArgumentError: an argument is out of range.

    Example:
        >>> attn = compile(lambda b, h, q, kv: kv <= q < kv + 256)
        >>> q, k, v = torch.randn(3, 1, 4, 512, 64).unbind()
        >>> attn(q, k, v).shape
        torch.Size([1, 4, 512, 64])
    """
    if more:
        raise surplus("compile", more, ("mask",), ("score",))
    for name in others:
        raise unexpected("compile", name, None)
    automatic = isinstance(splits, str) and splits == "auto"
    pieces = 0 if automatic else arguments.length("compile", "splits", splits, low=1)
    arguments.choice("compile", "kernels", kernels, get_args(Kernels))
    arguments.choice("compile", "precision", precision, get_args(Precision))
    flags = {"tune": arguments.flag("compile", "tune", tune), "check": arguments.flag("compile", "check", check)}
    wishes = {**flags, "splits": pieces, "kernels": kernels, "precision": precision}
    return _op("compile", mask, score, scale, block_size, backend, deterministic, **wishes)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskLike | Tensor | None = None,
    *,
    score: ScoreLike | None = None,
    scale: float | None = None,
    block_size: BlockSize = 128,
    backend: BackendChoice = "auto",
    deterministic: bool = True,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    **mask_args: Any,
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskLike | Tensor | None = None, *, return_lse: Literal[True], **others: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskLike | Tensor | None = None, *, return_lse: bool, **others: Any
) -> Any: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskLike | Tensor | None = None,
    *more: Never,
    score: ScoreLike | None = None,
    scale: float | None = None,
    block_size: BlockSize = 128,
    backend: BackendChoice = "auto",
    deterministic: bool = True,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    **mask_args: Any,
) -> Any:
    """Attend under a mask in one call; without a mask every query sees every key.

    The arguments are those of `compile` and of the op it returns. A Mask keeps its trace; a plain function is traced
    at each call (about a millisecond), but its analysis is found again by what it says.

    Example:
        >>> import maskflash as mf
        >>> q, k, v = torch.randn(3, 1, 4, 512, 64).unbind()
        >>> attention(q, k, v, mf.causal() & mf.document([200, 312])).shape
        torch.Size([1, 4, 512, 64])
    """
    whole = _FULL if mask is None else mask
    attn = _op("attention", whole, score, scale, block_size, backend, deterministic)
    if more:
        raise surplus("attention", more, ("q", "k", "v", "mask"), (*attn.mask.keywords, "scale"))
    if asks_for_dropout(dropout_p, generator, seed):
        mask_args |= {"dropout_p": dropout_p, "generator": generator, "seed": seed}
    return attn(q, k, v, q_offset=q_offset, kv_offset=kv_offset, sinks=sinks, return_lse=return_lse, **mask_args)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskLike | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *more: Never,
    score: ScoreLike | None = None,
    scale: float | None = None,
    block_size: BlockSize = 128,
    backend: BackendChoice = "auto",
    deterministic: bool = True,
    q_offset: int | Tensor = 0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **mask_args: Any,
) -> Any:
    """Attend inside each of several sequences of any lengths, packed end to end: nothing is padded.

    A query sees keys of its own sequence alone, where the mask shows them. For the mask, and a score function, b is the
    sequence, and q and kv count inside it, both from 0. So a table by batch row has a row for each sequence. Where the
    queries are a sequence's last ones, q_offset says so: kv_len - q_len, flash-attention's alignment.

    Other numbers in cu_seqlens, also if written in place, are another analysis, but never another trace or kernel.
    `Attention.varlen` is the same of a compiled op, and an op also takes jagged nested tensors.

    Args:
        q: (T, Hq, D) float32, bfloat16, float16 or float64, the queries of all sequences; any strides.
        k: (Tk, Hkv, D), Hkv divides Hq.
        v: (Tk, Hkv, Dv).
        mask: as in `attention`, but no tensor and no column intervals, which are made for calls of one size.
        cu_seqlens_q: (R + 1,) integers on q's device: 0, where each next sequence begins in q, and T. Empty ones may be
            among them.
        cu_seqlens_k: likewise in k and v, with as many sequences.
        score: as in `compile`.
        scale: as in `compile`.
        block_size: as in `compile`.
        backend: as in `compile`.
        deterministic: as in `compile`.
        q_offset: added to q inside each sequence: an int, or (R,) integers.
        sinks: as in `attention`.
        return_lse: also return the log-sum-exp.
        *more: none; what is passed there is answered by its name.
        **mask_args: the mask's own arguments, and the score function's.

    Returns:
        out: (T, Hq, Dv) in q's dtype; 0 in rows that see nothing.
        lse: if asked for, (Hq, T), as `attention` has it. Both are differentiable in q, k, v, sinks and what the score
        function looks up.

    Raises:
        ArgumentError: shapes that don't fit, cu_seqlens that don't begin with 0, ascend and end with the number of
            tokens, or dropout, which is refused.
        ArgumentTypeError: types or dtypes that don't fit.
        UnsupportedMask: a dense mask, or column intervals.
        BackendError: the chosen backend can't run here.
        MaskIndexError: the mask reads a table out of range, where no guard excludes it.

    Source: the call that flash-attention's `flash_attn_varlen_func` has for its own masks.

    Example:
        >>> import maskflash as mf
        >>> q, k, v = torch.randn(3, 8, 4, 64).unbind()
        >>> starts = torch.tensor([0, 3, 8])  # sequences of 3 tokens and of 5
        >>> out = varlen_attention(q, k, v, mf.causal(), starts, starts)
        >>> alone = mf.attention(*(x[3:].transpose(0, 1)[None] for x in (q, k, v)), mf.causal())
        >>> torch.allclose(out[3:], alone[0].transpose(0, 1), atol=1e-6)
        True
    """
    whole = _FULL if mask is None else mask
    attn = _op("varlen_attention", whole, score, scale, block_size, backend, deterministic)
    if more:
        takes = ("q", "k", "v", "mask", "cu_seqlens_q", "cu_seqlens_k")
        raise surplus("varlen_attention", more, takes, (*attn.mask.keywords, "q_offset"))
    mask_args |= {"q_offset": q_offset, "sinks": sinks, "return_lse": return_lse}
    return attn.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **mask_args)


def invalidate() -> None:
    """Forget what is known of all masks' tables, whoever calls with them.

    Needed only after a write to a table that torch doesn't see: by numpy into memory that a tensor shares, through
    `.data`, or by another process into shared memory. Writes through torch, and other tensors, are always seen.

    Example:
        >>> import numpy as np
        >>> ids = np.array([0, 0, 0, 1])
        >>> attn = compile(lambda b, h, q, kv, *, doc: doc[q] == doc[kv])
        >>> doc = torch.from_numpy(ids)
        >>> q, k, v = torch.randn(3, 1, 1, 4, 8).unbind()
        >>> before = attn(q, k, v, doc=doc)
        >>> ids[:] = 0  # torch knows nothing of it
        >>> invalidate()
        >>> torch.equal(attn(q, k, v, doc=doc), before)
        False
    """
    cache.invalidate()


def _op(
    operation: str,
    mask: MaskLike | Tensor,
    score: ScoreLike | None,
    scale: float | None,
    block_size: BlockSize,
    backend: BackendChoice,
    deterministic: bool,
    **others: Any,
) -> Attention:
    """The op of a call's arguments, which are checked here; `others` have been."""
    size = arguments.block_size(operation, block_size)
    arguments.choice(operation, "backend", backend, ("auto", "cpu", "triton", *ENGINES))
    deterministic = arguments.flag(operation, "deterministic", deterministic)
    factor = None if scale is None else arguments.scale(operation, scale)
    whole, strength = _given(operation, mask, score)
    if not (whole.keywords or whole.implied_names):
        whole.slots({})
    return Attention(whole, factor, size, backend, deterministic, score=strength, **others)


def _given(operation: str, mask: Any, score: Any) -> tuple[Mask, Score | None]:
    """A mask and a score function as callers give them; a floating tensor is both."""
    strength = None if score is None else as_score(operation, score)
    if isinstance(mask, Tensor) and mask.is_floating_point() and not instead_of(mask):
        whole = dense_mask(operation, mask, FloatMask, above=3)
        added = bias(mask)
        return whole, added if strength is None else as_score(operation, (strength, added))
    return _as_mask(operation, mask), strength


def _as_mask(operation: str, value: Any) -> Mask:
    if isinstance(value, Mask):
        return value
    foreign = instead_of(value)
    if isinstance(value, Tensor) and not foreign:
        return dense_mask(operation, value, above=4)
    if not (callable(value) or isinstance(value, str)):
        raise ArgumentTypeError(
            f"{operation}: mask is a {type(value).__name__}, expected a predicate f(b, h, q, kv), a mask or a tensor "
            f"of bool{foreign}"
        )
    refuse_maker(operation, value)
    return mask(value)
