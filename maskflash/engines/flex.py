"""The flex engine -> torch's FlexAttention, compiled, with our BlockMask, and our score function as its score_mod.

On a GPU it has forward and backward. On the CPU torch has forward alone, without lse. One compiled function serves all
calls of one mask, score function and dtype: new tables and numbers compile nothing, new lengths once more on a GPU, and
each on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.engines.engine import Engine, Formed, Prepared
from maskflash.errors import BackendError
from maskflash.forms.modifiers import modifier
from maskflash.scores.strength import Strength

_KEPT: Final = 64  # compiled functions; the least recently used goes first


class Flex(Engine):
    """See the module."""

    name = "flex"
    package = "torch"
    install = "pip install torch"
    form = "BlockMask"
    by_batch = False
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = dict.fromkeys(
        ("cuda", "cpu"), (torch.float32, torch.bfloat16, torch.float16)
    )
    scores = True

    def formed(self, block_map: BlockMap, problem: Problem) -> Formed:
        """A BlockMask without its function, which holds tables."""
        from maskflash.forms.flex import of_block_map

        block_mask = of_block_map(block_map, _no_function, problem.device)
        full, partial = block_mask.full_kv_num_blocks, block_mask.kv_num_blocks
        assert full is not None, "of_block_map lists them"
        counts = {"full tiles": int(full.sum()), "partial tiles": int(partial.sum())}
        tensors = (x for x in block_mask.as_tuple(flatten=True) if isinstance(x, Tensor))
        return Formed(block_mask, counts, sum(x.nbytes for x in tensors))

    def attend(
        self, form: Any, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """FlexAttention's out and lse."""
        block_mask, score, score_mod = copy.copy(form), strength.score, None
        block_mask.mask_mod = modifier(
            problem.expr, problem.inputs, problem.q_offset, problem.kv_offset, problem.device
        )
        if score is not None:
            score_mod = modifier(score.expr, score.inputs, score.q_offset, score.kv_offset, q.device)
        text = "" if score is None else score.expr.text
        has_lse = q.device.type in self.with_lse
        # What torch 2.13 writes in C++ for any length doesn't compile for many masks.
        any_length = q.device.type != "cpu"
        lengths = () if any_length else (q.shape[0], q.shape[2], k.shape[2])
        sizes = q.shape[1], k.shape[1], q.shape[3], v.shape[3], *lengths
        compiled = _compiled((problem.expr.text, text, q.dtype, q.device, sizes), any_length)
        from torch._dynamo.exc import TorchDynamoException

        try:
            out, lse = compiled(q, k, v, score_mod, block_mask, strength.scale, has_lse)
        except TorchDynamoException as error:
            raise BackendError(
                f"attention: torch can't compile FlexAttention for this call ({str(error).partition(chr(10))[0]}); let "
                'backend="auto" run it'
            ) from error
        return out, out.new_full(out.shape[:3], math.nan, dtype=torch.float32) if lse is None else lse


@lru_cache(maxsize=_KEPT)
def _compiled(kind: Hashable, any_length: bool) -> Callable[..., Any]:
    """FlexAttention compiled for one kind of call: its code is a copy, since dynamo limits what it keeps of one."""
    own = FunctionType(_attend.__code__.replace(), globals())
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=None if any_length else False)
    return compiled


def _attend(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any, scale: float, has_lse: bool
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    grouped = q.shape[1] != k.shape[1]
    if not has_lse:
        out = flex_attention(q, k, v, score_mod, block_mask, scale, enable_gqa=grouped)
        return out, None
    request = AuxRequest(lse=True)
    out, aux = flex_attention(q, k, v, score_mod, block_mask, scale, enable_gqa=grouped, return_aux=request)
    return out, aux.lse


def _no_function(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    raise AssertionError("each call gives its own")
