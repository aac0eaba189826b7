"""An op on shards of tokens -> the mask to give a model of Transformers, whose layers then attend across ranks.

    model(own_tokens, attention_mask=on_shards(attn), position_ids=own_positions)

The model runs on its rank's tokens, and each of its layers calls the op. Transformers hands a mask of four dimensions
on as it is, so nothing is patched, and layers of different masks have an op each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments
from maskflash.integrations.layer_mask import LayerMask
from maskflash.masks.predicate import mask as as_mask
from maskflash.parallel import ShardedAttention


class ShardMask(LayerMask):
    """A mask that says by which op of several ranks a layer attends.

    Attributes:
        attn: the op.
    """

    attn: ShardedAttention


def on_shards(attn: ShardedAttention, *, device: torch.device | str = "cpu", **mask_args: Any) -> ShardMask:
    """What a model gets as `attention_mask`, so that its layers attend across the ranks of a plan.

    All ranks call the model, each with its own tokens and their positions: `plan.shard(tokens, rank, dim=1)` and
    `plan.positions(rank)[None]`. Its mask is the op's alone: paddings and documents belong in there. A model that has
    layers of several kinds takes a dict of such masks, by the names of its config's `layer_types`.

    Args:
        attn: of `maskflash.parallel.compile`, with the layers' own `scale`, and a `score` that holds their softcap.
        device: of the model's tokens.
        **mask_args: the mask's own arguments, and the score function's: for all tokens, the same on every rank.

    Returns:
        A tensor of four dimensions that holds no pairs.

    Raises:
        ArgumentTypeError: attn is no such op.

    Example:
        >>> import torch
        >>> import maskflash as mf
        >>> from maskflash.integrations.transformers import register
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=register()))
        >>> plan = mf.parallel.plan(mf.causal(), 200, 1)  # of one rank, so that this runs alone
        >>> attn = mf.parallel.compile(mf.causal(), plan)
        >>> tokens = torch.arange(200)[None] % 64
        >>> own, positions = plan.shard(tokens, 0, dim=1), plan.positions(0)[None]
        >>> logits = model(own, position_ids=positions, attention_mask=on_shards(attn)).logits
        >>> torch.equal(logits, model(tokens).logits)
        True
    """
    operation = "integrations.on_shards"
    arguments.instance(operation, "attn", attn, ShardedAttention, "maskflash.parallel.compile makes one")
    tokens = attn.plan.seq_len  # each rank's own are checked by the op, so that all ranks hear of a mistake
    at = arguments.device(operation, device)
    made = ShardMask(as_mask(attn.given), (0, 0), mask_args, (1, 1, tokens, tokens), at)
    made.attn = attn
    return made


def attend(
    mask: ShardMask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    sinks: Tensor | None,
    softcap: float | None,
    refused: dict[str, Any],
    layer: str,
) -> Tensor:
    """A layer's attention across ranks.

    Args:
        mask: which op.
        q: (B, Hq, Sr, D), of this rank's tokens.
        k: (B, Hkv, Sr, D).
        v: (B, Hkv, Sr, Dv).
        scaling: the layer's; it has to be the op's.
        dropout: probability of dropping a weight.
        sinks: (Hq,), or None.
        softcap: the layer's; the op has to have a score function for it.
        refused: what else the layer asks for, by name; all has to be None.
        layer: for messages.

    Returns:
        (B, Sr, Hq, Dv).

    Raises:
        ArgumentError: the layer asks for something else than the op computes.
    """
    attn, default = mask.attn, q.shape[-1] ** -0.5
    for name, wish in refused.items():
        if wish is not None:
            raise ArgumentError(
                f"{layer} asks for {name}, which is of one rank's tokens; let the mask or the score function of "
                "parallel.compile say it, by positions in the whole sequence"
            )
    wanted, own = (default if x is None else float(x) for x in (scaling, attn.scale))
    if not math.isclose(wanted, own):
        raise ArgumentError(
            f"{layer} scales its scores by {wanted:.6g}, but the op on shards by {own:.6g}; pass scale={wanted!r} to "
            "parallel.compile"
        )
    if softcap is not None and attn.score is None:
        raise ArgumentError(
            f"{layer} asks for softcap, and the op on shards has no score function; pass "
            f"score=mf.scores.softcap({softcap!r}) to parallel.compile"
        )
    out: Tensor = attn(q, k, v, sinks=sinks, dropout_p=dropout, **mask.mask_args)
    return out.transpose(1, 2).contiguous()
