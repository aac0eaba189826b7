"""Sequences packed end to end, or jagged nested tensors -> attention inside each sequence, by one call on their tokens.

q   (T, Hq, D)      a a a b b b b b     one batch row of all tokens, nothing padded, under the mask
k   (Tk, Hkv, D)    a a a a b b b       of q's sequence == kv's sequence and mask(sequence, h, place, place)
"""

from __future__ import annotations

from typing import Any, Final, Never

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import aside
from maskflash.ground import arguments, qkv
from maskflash.ground.names import surplus
from maskflash.masks.sequences import ARGUMENTS, InSequences
from maskflash.op import checking, places
from maskflash.op.asking import Asking, asks_for_dropout
from maskflash.scores.sequences import ScoreInSequences

_OPERATION: Final = "varlen_attention"

Packed = tuple[Tensor, Tensor, Tensor]
"""q, k and v of all sequences, (1, heads, tokens, head_dim)."""


class Varlen(Asking):
    """What an attention op does with sequences of several lengths."""

    _of_tokens: Any = None  # the same op, of packed tokens

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *more: Never,
        q_offset: int | Tensor = 0,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        **mask_args: Any,
    ) -> Any:
        """Attend inside each of several sequences that are packed end to end: see `mf.varlen_attention`.

        Args:
            q: (T, Hq, D), the queries of all sequences.
            k: (Tk, Hkv, D).
            v: (Tk, Hkv, Dv).
            cu_seqlens_q: (R + 1,) integers on q's device: 0, where each next sequence begins in q, and T.
            cu_seqlens_k: likewise in k and v.
            q_offset: added to q inside each sequence: an int, or (R,) integers.
            sinks: as in a call.
            return_lse: also return the log-sum-exp.
            *more: none; what is passed there is answered by its name.
            **mask_args: the mask's own arguments, and the score function's.

        Returns:
            out: (T, Hq, Dv) in q's dtype.
            lse: if asked for, (Hq, T).

        Example:
            >>> import maskflash as mf
            >>> attn = mf.compile(mf.causal())
            >>> q, k, v = torch.randn(3, 8, 4, 64).unbind()
            >>> starts = torch.tensor([0, 3, 8])
            >>> attn.varlen(q, k, v, starts, starts).shape
            torch.Size([8, 4, 64])
        """
        if more:
            takes = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
            raise surplus("Attention.varlen", more, takes, (*self.mask.keywords, "q_offset"))
        _check_packed(q, k, v)
        return_lse = arguments.flag(_OPERATION, "return_lse", return_lse)
        packed = _as_batch(q, k, v)
        qkv.check(*packed, operation=_OPERATION)
        for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _check_starts(name, x, q.device)
        count = cu_seqlens_q.shape[0] - 1
        if cu_seqlens_k.shape[0] - 1 != count:
            raise ArgumentError(
                f"{_OPERATION}: cu_seqlens_q has {count} sequences and cu_seqlens_k {cu_seqlens_k.shape[0] - 1}; they "
                "must pair up, empty ones too"
            )
        return self._attend(packed, cu_seqlens_q, cu_seqlens_k, q_offset, sinks, return_lse, mask_args)

    def _jagged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | Tensor,
        kv_offset: int | Tensor,
        sinks: Tensor | None,
        return_lse: bool,
        mask_args: dict[str, Any],
    ) -> Any:
        """A call with jagged nested tensors, (R, j, H, D) or (R, H, j, D): out, and lse if asked for, in that form."""
        return_lse = arguments.flag("attention", "return_lse", return_lse)
        by_head = _check_jagged(q, k, v)
        if isinstance(kv_offset, Tensor) or kv_offset != 0:
            raise ArgumentError(
                "attention: kv_offset is given with nested tensors, expected 0: keys count from 0 in each sequence; "
                "q_offset moves queries"
            )
        by_token: list[Any] = [x.transpose(1, 2) if by_head else x for x in (q, k, v)]
        packed = _as_batch(*(x.values() for x in by_token))
        qkv.check(*packed)
        starts, kv_starts = by_token[0].offsets(), by_token[1].offsets()
        found = self._attend(packed, starts, kv_starts, q_offset, sinks, return_lse, mask_args)
        out, *lse = found if return_lse else (found,)
        nested = [torch.nested.nested_tensor_from_jagged(x, starts) for x in (out, *(x.T for x in lse))]
        nested = [x.transpose(1, 2) if by_head else x for x in nested]
        return tuple(nested) if return_lse else nested[0]

    def _attend(
        self,
        packed: Packed,
        starts: Tensor,
        kv_starts: Tensor,
        q_offset: int | Tensor,
        sinks: Tensor | None,
        return_lse: bool,
        mask_args: dict[str, Any],  # and what is said of dropout
    ) -> Any:
        """Out, and lse if asked for, of tensors (1, H, tokens, D) and checked starts."""
        q, k, _ = packed
        count, q_len, kv_len = starts.shape[0] - 1, q.shape[2], k.shape[2]
        dropped = [mask_args.pop(name, none) for name, none in (("dropout_p", 0), ("generator", None), ("seed", None))]
        if asks_for_dropout(*dropped):
            raise ArgumentError(
                f"{_OPERATION}: dropout is asked for, expected none: which pairs are dropped would be another function "
                "than that of each sequence alone; leave dropout_p and seed out, or pad the sequences"
            )
        q_offset = arguments.offset(_OPERATION, "q_offset", q_offset, count)
        if sinks is not None:
            qkv.check_sinks(sinks, q, _OPERATION)
        sizes = Sizes(q_len, kv_len, count, q.shape[1], q.device, operation=_OPERATION)
        arguments.mask_args(_OPERATION, mask_args, self.mask.keywords, self.mask.defaults)
        attn = self._for_tokens()
        self.given.implied(sizes)
        if self.score is not None:
            self.score.implied(sizes)
        if self.check and not torch.compiler.is_compiling():
            checking.check(_OPERATION, [("cu_seqlens_q", starts), ("cu_seqlens_k", kv_starts)])
        tables = places.find(starts, kv_starts, q_offset, q_len, kv_len)
        given = {**mask_args, **dict(zip(map(str, ARGUMENTS), tables, strict=True))}
        found = attn(*packed, sinks=sinks, return_lse=return_lse, **given)
        out, *lse = found if return_lse else (found,)
        out = out[0].transpose(0, 1).contiguous()
        return (out, lse[0][0]) if return_lse else out

    def _for_tokens(self) -> Any:
        """The op of packed tokens."""
        if torch.compiler.is_dynamo_compiling():  # perhaps it was made in this very graph
            return self._packed()
        self._keep_packed()
        return self._of_tokens

    def _packed(self) -> Any:
        """That, made now; its mask's traces are kept with the mask."""
        mask = self.given.twin(InSequences)
        score = None if self.score is None else self.score.twin(ScoreInSequences)
        packed: Any = self._as_asked(mask, score)  # type: ignore[arg-type]
        return packed

    @aside
    def _keep_packed(self) -> None:
        """Have it as `_of_tokens`, with all set in it that its first call would set: dynamo guards what it reads."""
        if self._of_tokens is None:
            attn = self._packed()
            attn.mask.look()
            self._of_tokens = attn


def _as_batch(q: Tensor, k: Tensor, v: Tensor) -> Packed:
    """Of (tokens, heads, head_dim) one batch row."""
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            fix = f"; torch.from_numpy({name}) makes one" if isinstance(x, np.ndarray) else ""
            raise ArgumentTypeError(f"{_OPERATION}: {name} is {arguments.by_type(x)}, expected a tensor{fix}")
        if x.is_nested:
            raise ArgumentTypeError(
                f"{_OPERATION}: {name} is nested, expected a dense tensor (tokens, heads, head_dim); mf.attention "
                "takes nested ones"
            )
        if x.ndim != 3:
            fix = f"; {name}.transpose(1, 2).flatten(0, 1) packs (batch, heads, tokens, head_dim)" * (x.ndim == 4)
            raise ArgumentError(
                f"{_OPERATION}: {name} has shape {tuple(x.shape)}, expected (tokens, heads, head_dim){fix}"
            )


def _check_starts(name: str, x: Any, device: torch.device) -> None:
    """Check where sequences begin, but for what the tensor holds."""
    arguments.instance(_OPERATION, name, x, Tensor, "where each sequence begins, and the total, such as [0, 3, 8]")
    arguments.int_table(_OPERATION, name, x, (1,))
    arguments.held(_OPERATION, name, x)
    if x.shape[0] == 0:
        raise ArgumentError(f"{_OPERATION}: {name} is empty, expected where each sequence begins, and the total")
    if x.device != device:
        raise ArgumentError(f"{_OPERATION}: {name} is on {x.device}, expected q's {device}; move it once")


def _check_jagged(q: Any, k: Any, v: Any) -> bool:
    """Check nested tensors of a call; whether heads come before tokens."""
    dims = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_nested or x.layout is not torch.jagged:
            got = f"of layout {x.layout}" if isinstance(x, Tensor) else arguments.by_type(x)
            raise ArgumentTypeError(
                f"attention: {name} is {got}, expected nested and of layout torch.jagged, as q, k and v are then all; "
                "torch.nested.nested_tensor(tensors, layout=torch.jagged) makes one"
            )
        jagged: Any = x
        ragged: int = jagged._ragged_idx
        if x.dim() != 4 or ragged not in (1, 2) or jagged.lengths() is not None:
            raise ArgumentError(
                f"attention: {name} is nested with {x.dim()} dimensions, of which {ragged} is ragged, expected (batch, "
                f"tokens, heads, head_dim) or (batch, heads, tokens, head_dim) without holes; {name}.contiguous() "
                "closes holes"
            )
        dims.append((ragged, x.size(0)))
    if len(set(dims)) > 1:
        said = ", ".join(f"{rows} sequences along dimension {ragged}" for ragged, rows in dims)
        raise ArgumentError(f"attention: q, k and v are nested with {said}; expected the same of all")
    return dims[0][0] == 2
