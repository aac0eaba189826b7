"""An attention op and lengths -> what can be had before a call: explanations, kernels' text, analyses, warm kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments, qkv
from maskflash.op import cache
from maskflash.op.asking import Asking
from maskflash.scores.seeds import probability
from maskflash.scores.told import told

if TYPE_CHECKING:
    from maskflash.backends.triton.signature import PassName
    from maskflash.op.explain import Explanation


class Ahead(Asking):
    """What an attention op tells, or does, ahead of a call."""

    def source(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        pass_name: PassName = "forward",
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        dropout_p: float = 0.0,
        **mask_args: Any,
    ) -> str:
        """The Triton text that a call with these tensors runs on a GPU; it can be had without one.

        Args:
            q: as in a call.
            k: as in a call.
            v: as in a call.
            pass_name: "forward", "delta", "dkdv", "dq", or "dtables", of what a score's tables learn. Of few rows over
                many keys "forward" is "split", and "combine" joins what pieces of the keys have given. "hopper",
                "hopper_dkdv" and "hopper_dq" are for compute capability 9.0; "forward" is "hopper" where `kernels`, or
                the environment, asks for it and it serves the call. Without a GPU the text is that of a GPU with such
                kernels.
            q_offset: as in a call.
            kv_offset: as in a call.
            dropout_p: as in a call.
            **mask_args: the mask's own arguments, and the score function's.

        Raises:
            BackendError: the mask or the score uses an operation that Triton can't express as it should; or `kernels`
                asks for what doesn't serve the call.

        Example:
            >>> import torch
            >>> import maskflash as mf
            >>> q, k, v = torch.randn(3, 1, 4, 512, 64).unbind()
            >>> text = mf.compile(lambda b, h, q, kv: (q ^ kv) & 3 == 0).source(q, k, v)
            >>> [line.strip() for line in text.splitlines() if "x2 =" in line][0]
            'x2 = q[:, None] ^ kv[None, :]'
        """
        from maskflash.analysis.classify import classify
        from maskflash.backends.triton import kernel_choice
        from maskflash.backends.triton import run as triton
        from maskflash.backends.triton.signature import FEW, HOPPER, PASSES

        qkv.check(q, k, v)
        arguments.choice("Attention.source", "pass_name", pass_name, (*PASSES, *HOPPER, *FEW, "dtables"))
        if q.is_meta:
            raise ArgumentError("Attention.source: q is on meta, expected tensors with data: the mask is analysed")
        p = probability("Attention.source", dropout_p)
        sizes = self._sizes(q, k, q_offset, kv_offset)
        problem = self._problem(sizes, mask_args)
        dims, score = (q.shape[3], v.shape[3]), self._score_in(sizes, q.dtype, mask_args)
        if pass_name == "dtables" and not (score is not None and any(score.wanted)):
            raise ArgumentError("Attention.source: pass_name is 'dtables', but no table of a score requires gradients")
        if pass_name == "forward" and not (
            p == 0 and self.precision != "fp8" and triton.few.are_few(problem.q_len, problem.kv_len)
        ):
            pass_name = kernel_choice.of_text(problem, q, v, self.kernels, self.precision).pass_name
        return triton.source(
            problem, classify(problem), *dims, pass_name, score, dropout=p > 0, precision=self.precision
        )

    def explain(self, q_len: int, kv_len: int, **call: Any) -> Explanation:
        """What was decided for these lengths, and why: str() for people, .to_dict() for tools.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device (where a call would run) and the mask's own arguments:
                see `Mask.at`.

        Example:
            >>> import maskflash as mf
            >>> print(mf.compile(mf.sliding_window(256)).explain(4096, 4096))  # doctest: +ELLIPSIS
            sliding_window(256)
              visible            ((q - 256) <= kv) and (kv <= q)
              rows of column j   [j, j + 257)
              reads              q, kv: one block map for all batch rows and heads
              tiles              31 full, 62 partial, 931 skip of 128 x 128 tokens (90.9 % skipped)
              decided            1024 tiles by formulas
              backend            cpu, since the tensors are on cpu
              forward float32    ... dense calls, ... masked, 0 gathered, ... pairs, in float32
              ...
        """
        from maskflash.op.explain import Explanation

        sight = self.mask.at_call("Attention.explain", q_len, kv_len, call)
        problem = sight.tiled(self.block_size)
        backend = self._backend_for(problem.device)
        why = f"since the tensors are on {problem.device.type}" if self.backend == "auto" else "as asked for"
        score = None if self.score is None else told(self.score, sight.sizes, sight.mask_args)
        asked = score, self.splits, self.kernels, self.precision
        return Explanation(self.name, problem, cache.of_problem(problem, backend), backend, why, *asked)

    def prepare(self, q_len: int, kv_len: int, **call: Any) -> None:
        """Analyse the mask for calls to come: those with the same sizes and tables only look the analysis up.

        It needs no q, k or v, so it can run in a thread while the step before is computed.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: as in `explain`; of tables the very tensors of the calls.

        Raises:
            MaskIndexError: the mask reads a table out of range, or divides by zero, where no guard excludes it.

        Example:
            >>> import maskflash as mf
            >>> attn = mf.compile(mf.causal() & mf.document([200, 312]))
            >>> attn.prepare(512, 512)
        """
        problem = self.mask.at_call("Attention.prepare", q_len, kv_len, call).tiled(self.block_size)
        cache.of_problem(problem, self._backend_for(problem.device))
