"""A mask, and how to run it -> the attention op that users call: its arguments checked, its backend chosen here."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, Literal, Never, overload

import torch
from torch import Tensor

from maskflash.errors import MaskIndexError
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments, qkv
from maskflash.ground.identity import state
from maskflash.ground.names import surplus
from maskflash.ground.transfer import capturing
from maskflash.op import autograd, cache, later
from maskflash.op.ahead import Ahead
from maskflash.op.analyse import Analysis
from maskflash.op.asking import KEPT, asks_for_dropout, dropout_of
from maskflash.op.few_rows import FewRows, may_be
from maskflash.op.inside import Inside
from maskflash.op.paged import Paged
from maskflash.op.spec import ENGINES, Spec
from maskflash.op.varlen import Varlen

_TOLD: Final = frozenset((Tensor, int, bool, float, type(None)))  # a call's arguments, by identity or by value


class Attention(Ahead, Inside, Varlen, Paged):
    """Attention under one mask: call it with q, k and v.

    It holds no tensors of a call. Analyses of the mask are remembered per lengths, parameters and tables, for all
    attention ops together, and made again when a table has been written to.
    """

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
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
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **others: Any
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **others: Any) -> Any: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *more: Never,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        sinks: Tensor | None = None,
        dropout_p: float = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        return_lse: bool = False,
        **mask_args: Any,
    ) -> Any:
        """Attend: out = softmax(score(scale · q kᵀ) over the visible keys) v.

        Under autocast q, k and v are cast as for torch's own attention. torch.compile takes the call whole.

        Args:
            q: (B, Hq, Sq, D) float32, bfloat16, float16 or float64; any strides; Sq may be 0. Or all three nested, of
                layout torch.jagged: (R, j, H, D), or (R, H, j, D); b is the sequence then, and out and lse are nested
                likewise: see docs/serving.md.
            k: (B, Hkv, Skv, D), Hkv divides Hq (grouped queries share a key head without a copy); Skv may be 0.
            v: (B, Hkv, Skv, Dv).
            q_offset: added to row numbers before the mask sees them: an int, or an int tensor (B,); one element serves
                all rows.
            kv_offset: added to column numbers before the mask sees them, likewise: k and v may be a part of something
                longer, whose start is out of reach.
            sinks: floating tensor (Hq,), for each head the score of one more key whose value is 0, which every row
                sees: it takes a share of the softmax and adds nothing. -inf is none.
            dropout_p: probability of dropping a pair's weight, 0 <= dropout_p < 1; the others are divided by
                1 - dropout_p, and lse stays what it is without. Which pairs are kept is a function of the seed and the
                pair's position alone: see docs/numerics.md.
            generator: draws the seed; None for torch's own.
            seed: an int, or an int64 tensor of one element, instead of one that is drawn.
            return_lse: also return the log-sum-exp of the scores, the sink's among them.
            *more: none; what is passed there is answered by its name.
            **mask_args: the mask's own arguments, and the score function's.

        Returns:
            out: (B, Hq, Sq, Dv) in q's dtype; 0 in rows that see nothing.
            lse: if asked for, (B, Hq, Sq), natural logarithm of summed exponentials of scaled scores, float32
            (float64 for float64), -inf (or the sink) in rows that see nothing. Both are differentiable in q, k, v,
            sinks and what floating-point tensors the score function looks up.

        Raises:
            ArgumentError: shapes, devices or ranges that don't fit.
            ArgumentTypeError: types or dtypes that don't fit.
            BackendError: the chosen backend can't run here.
            MaskIndexError: the mask reads a table out of range, or divides by zero, where no guard excludes it.

        Source: Dao, FlashAttention-2, 2023, algorithms 1 and 2, visiting only the tiles that the block map keeps.
        """
        if more:
            raise surplus("attention", more, ("q", "k", "v"), (*self.mask.keywords, "q_offset"))
        if getattr(q, "is_nested", False):
            mask_args |= {"dropout_p": dropout_p, "generator": generator, "seed": seed}
            offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
            return self._jagged(q, k, v, **offsets, sinks=sinks, return_lse=return_lse, mask_args=mask_args)
        q, k, v = qkv.as_autocast(q, k, v)
        if return_lse is not True and return_lse is not False:
            return_lse = arguments.flag("attention", "return_lse", return_lse)
        spec = stamp = name = None
        analysis: Analysis | FewRows | None = None
        dropout = KEPT  # the default of dropout_p is an int, since torch.compile would make a float an input
        if asks_for_dropout(dropout_p, generator, seed):
            qkv.check(q, k, v)
            dropout = dropout_of("attention", dropout_p, generator, seed, q.device)
        plain = self.score is None and dropout.seed is None
        is_seen = torch.compiler.is_compiling() or autograd.watched(*((q, k, v) if sinks is None else (q, k, v, sinks)))
        if plain and not (is_seen or self.check or self.backend in ENGINES or may_be(q, k)):
            stamp = self.mask.look()
            name = self._name(q, k, v, q_offset, kv_offset, sinks, mask_args, stamp)
            analysis = None if name is None else cache.named(name)
        if analysis is None:  # else every check has passed for a call like this
            qkv.check(q, k, v)
            if sinks is not None:
                qkv.check_sinks(sinks, q)
            sizes = self._sizes(q, k, q_offset, kv_offset)
            spec = self._spec(sizes, q, sinks, mask_args, stamp, dropout, check=self.check)
            self._refuse(spec, q, k, v, return_lse)
            try:
                if is_seen or autograd.watched(*(x for x in spec.tensors if x is not None)):
                    out, lse = autograd.dispatch(spec, q, k, v)
                    return (out, autograd.natural(spec, lse)) if return_lse else out
                analysis = autograd.prepared(spec, q, k)
            except MaskIndexError:  # of a mask with this text; the same again, from the user's own lines
                from maskflash.analysis.classify import classify

                classify(self._problem(sizes, mask_args))
                raise
            if self.tune and spec.backend == "triton" and not capturing(q.device):
                self._tune(analysis, spec, q, k, v)
            if name is not None and all(table.device == q.device for table in self.mask.held()):
                tensors = [x for x in (*mask_args.values(), q_offset, kv_offset) if isinstance(x, Tensor)]
                cache.note(name, [*self.mask.held(), *tensors], spec, sizes)
        if plain and not return_lse and sinks is None:
            scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
            at_once: Tensor | None = autograd.at_once(analysis, scale, q, k, v)
            if at_once is not None:
                return at_once
        if spec is None:
            spec = self._spec(self._sizes(q, k, q_offset, kv_offset), q, sinks, mask_args, stamp)
        out, lse = autograd.attend(analysis, spec, q, k, v)
        return (out, autograd.natural(spec, lse)) if return_lse else out

    def _name(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offset: int | Tensor,
        kv_offset: int | Tensor,
        sinks: Tensor | None,
        mask_args: dict[str, Any],
        stamp: int,
    ) -> Hashable | None:
        """All that a call's spec and analysis depend on, tables by their state; None if it can't be told at once."""
        if q.is_nested or k.is_nested or v.is_nested:  # which have no shape
            return None
        mask = self.mask
        given: list[Any] = [mask.identity, stamp]
        if sinks is not None:  # its values are no part of what is kept
            if not isinstance(sinks, Tensor) or sinks.is_nested:
                return None
            given += sinks.shape, sinks.dtype, sinks.device, sinks.layout
        for tensor in mask.held():
            if tensor.is_inference():
                return None
            given += state(tensor)
        for value in (q_offset, kv_offset, *mask_args.values()):
            kind = type(value)
            if kind is int:
                given += kind, value
            elif isinstance(value, Tensor):
                if value.is_inference() or value.is_nested or value.layout is not torch.strided:
                    return None
                given += state(value)
            elif kind in _TOLD:
                given += kind, value.hex() if kind is float else value  # 0.0 == -0.0
            else:
                return None
        return (
            *(self.backend, self.block_size, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype),
            *(q.device, k.device, v.device, q.layout, k.layout, v.layout, *mask_args, *given),
            *((self.kernels, self.precision) if self.tune else ()),  # else others' calls have nothing measured for it
        )

    def _tune(self, analysis: Analysis | FewRows, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Measure which tiles of the kernels are fastest for calls like this one, unless that is known."""
        if isinstance(analysis, FewRows):
            analysis.forward(spec, q.detach(), k.detach(), v.detach(), tuning=True)
            return
        from maskflash.backends.triton import run as triton

        assert isinstance(analysis.plan, triton.DevicePlan), "the backend's own"
        problem = spec.problem(Sizes.of(q, k))
        triton.tune(analysis.plan, problem, q.detach(), k.detach(), v.detach(), spec.strength)

    def warm(
        self,
        q_len: int,
        kv_len: int,
        *,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        backward: bool = True,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> None:
        """Do now what the first of many calls would wait for: run one on zeros.

        On a GPU kernels are compiled and loaded, and Triton keeps them on disk for later processes. They depend on
        the mask's structure, dtype, head dims, block size and whether heads are grouped. They don't depend on lengths,
        batch or numbers. A CUDA graph may be captured next. `maskflash warm` compiles on several cores.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            head_dim: of q and k.
            v_head_dim: of v; None for that of k.
            dtype: of q, k and v.
            batch: batch rows.
            heads: query heads.
            kv_heads: heads of k and v, a divisor of `heads`; None for as many.
            backward: the gradients too.
            q_offset: as in a call.
            kv_offset: as in a call.
            device: where the calls will run.
            **mask_args: the mask's own arguments.

        Raises:
            ArgumentError: what a call with such tensors would raise.
            BackendError: likewise.

        Example:
            >>> import maskflash as mf
            >>> mf.compile(mf.causal()).warm(512, 512, head_dim=64, heads=8, kv_heads=2)
        """
        operation = "Attention.warm"
        kv_heads = heads if kv_heads is None else kv_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        on, dtype = arguments.device(operation, device), arguments.dtype(operation, dtype)
        counts = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads, "kv_heads": kv_heads}
        for name, count in {**counts, "head_dim": head_dim, "v_head_dim": v_head_dim}.items():
            arguments.length(operation, name, count)
        sizes = (
            (batch, heads, q_len, head_dim),
            (batch, kv_heads, kv_len, head_dim),
            (batch, kv_heads, kv_len, v_head_dim),
        )
        with torch.inference_mode(False), torch.set_grad_enabled(backward):
            q, k, v = (torch.zeros(size, dtype=dtype, device=on, requires_grad=backward) for size in sizes)
            out = self(q, k, v, q_offset=q_offset, kv_offset=kv_offset, **mask_args)
            if backward:
                torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))

    def invalidate(self) -> None:
        """Forget what is known of the mask's tables: needed only after a write that torch didn't see.

        `maskflash.invalidate` does so for all masks, and says which writes these are.
        """
        derived = (attn for attn in (self._of_tokens, self._of_requests) if attn is not None)
        cache.invalidate(self.mask.traces.texts.union(*(attn.mask.traces.texts for attn in derived)))

    def __dir__(self) -> list[str]:
        """What users may use."""
        return [name for name in dir(Attention) if not name.startswith("_")]

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score={self.score.name}"
        return f"Attention({self.name}{score}, backend={self.backend!r}, block_size={self.block_size})"


later.follow("torch._dynamo", "maskflash.op.eager")
