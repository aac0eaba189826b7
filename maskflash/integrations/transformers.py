"""Hugging Face Transformers' attention and mask interfaces -> maskflash: `attn_implementation="mf"`.

    model's forward     mask function, padding, cache lengths        -> LayerMask, once for all layers of a kind
    every layer         query, key, value and the LayerMask          -> `maskflash.attention`

No dense mask is made. Transformers builds its masks of closures; those of one structure are traced once, with their
tensors as arguments, so that other documents, paddings, windows of a cache and offsets never trace again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from maskflash.api import attention
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.integrations.closures import Unknown, lifted
from maskflash.masks.base import Mask
from maskflash.masks.mask import Predicate
from maskflash.presets.basic import causal

NAME: Final = "mf"  # Transformers takes every name with "flash" in it for a FlashAttention of its own

_HERE: Final = "maskflash.integrations.transformers"
_WITHOUT_EFFECT: Final = frozenset(  # what layers are handed, and what the mask already says or attention doesn't read
    (
        *("sliding_window", "position_ids", "cache_position", "seq_idx", "use_cache", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits", "return_dict", "deterministic"),
    )
)
_FIXES: Final = {
    "dropout": "set the config's attention dropout to 0",
    "softcap": "use eager or flex_attention",
    "s_aux": "use eager or flex_attention",
    "output_attentions": "use eager to look at attention weights",
    "cu_seq_lens_q": "leave the cu_seq_lens out: position_ids that start again say where documents start",
}


class LayerMask(Tensor):
    """What models hand on from layer to layer: a mask in the shape of a dense one, (B, 1, Sq, Skv), without its pairs.

    It can be passed on and asked for its shape. Computing with it is an error.

    Attributes:
        mask: which pairs may attend.
        q_offset: of the first row.
        mask_args: the mask's own arguments.
    """

    mask: Mask
    q_offset: int
    mask_args: dict[str, Any]

    @staticmethod
    def __new__(
        cls,
        mask: Mask,
        q_offset: int,
        mask_args: dict[str, Any],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> LayerMask:
        """A mask at the lengths of a forward pass."""
        at = torch.device(device)
        made: LayerMask = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.bool, device=at)
        made.mask, made.q_offset, made.mask_args = mask, q_offset, mask_args
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Hand it on; refuse everything else."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise ArgumentTypeError(
            f"{_HERE}: the model computes {func} of its attention mask, which holds no pairs; use another "
            "attn_implementation for this model"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LayerMask({self.mask}, shape={tuple(self.shape)}, q_offset={self.q_offset})"


def register(name: str = NAME) -> str:
    """Add maskflash to Transformers through the library's own interfaces; again is no harm.

    Afterwards `AutoModelForCausalLM.from_pretrained(..., attn_implementation="mf")` or
    `model.set_attn_implementation("mf")`. Causal, sliding, chunked and bidirectional masks, padding on either side,
    packed position ids, dynamic and static caches work as with "eager"; docs/integrations.md has what was checked.
    A row that sees nothing, such as padding on the left, gives 0, where "eager" averages over all keys.

    Args:
        name: what models will ask for.

    Returns:
        The name.

    Raises:
        ArgumentError: the name contains "flash": Transformers would look for a FlashAttention of that name.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=register()))
        >>> model(torch.arange(8)[None]).logits.shape
        torch.Size([1, 8, 64])
    """
    if "flash" in name:
        raise ArgumentError(
            f'{_HERE}.register: name is {name!r}, expected one without "flash": Transformers takes such a name for a '
            f"FlashAttention kernel; leave it out for {NAME!r}"
        )
    AttentionInterface.register(name, attention_forward)
    outside = torch.compiler.disable(layer_mask, reason="masks of Transformers are made outside of what is compiled")
    AttentionMaskInterface.register(name, outside)
    return name


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> LayerMask:
    """The mask of a forward pass, as Transformers' mask interface asks for it.

    Args:
        batch_size: batch rows.
        q_length: rows in tokens.
        kv_length: columns in tokens; those of the cache, where there is one.
        q_offset: number of the first row.
        kv_offset: number of the first column: a window's cache has dropped the columns before.
        mask_function: `f(b, h, q, kv) -> bool` of row and column numbers.
        attention_mask: (B, tokens) bool, False at padding.
        device: of the mask's tables.
        **_: what other implementations need.

    Raises:
        MaskTraceError: a custom mask function that can't become an expression.
    """
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not padding.all():
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    try:
        mask, tables = lifted(mask_function, masking_utils)
    except Unknown:  # the user's own function may read anything: it is traced at each forward pass
        mask, tables = _shifted(mask_function), {}
    shape = batch_size, 1, q_length, kv_length
    return LayerMask(mask, int(q_offset), {**tables, "kv_offset": int(kv_offset)}, shape, device)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, as Transformers' attention interface asks for it.

    Args:
        module: the layer.
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Skv, D); Hkv divides Hq.
        value: (B, Hkv, Skv, Dv).
        attention_mask: what `layer_mask` made; None where the model made none.
        scaling: factor of the scores; None for 1/sqrt(D).
        dropout: 0.
        is_causal: what None means for the mask; the module's own where left out.
        **asked: what else the model wants.

    Returns:
        (B, Sq, Hq, Dv), and None for the weights.

    Raises:
        ArgumentError: the model asks for what maskflash doesn't compute, by name.
    """
    for name, wish in {"dropout": dropout or None, **asked}.items():
        if wish is not None and wish is not False and name not in _WITHOUT_EFFECT:
            raise ArgumentError(
                f"{_HERE}: {type(module).__name__} asks for {name}, which maskflash doesn't compute; "
                f"{_FIXES.get(name, 'use another attn_implementation for this model')}"
            )
    lengths = query.shape[0], query.shape[2], key.shape[2]
    mask, q_offset, mask_args = _mask_of(module, attention_mask, is_causal, lengths)
    out = attention(query, key, value, mask, scale=scaling, q_offset=q_offset, **mask_args)
    return out.transpose(1, 2).contiguous(), None


def _mask_of(
    module: nn.Module, given: Tensor | None, is_causal: bool | None, lengths: tuple[int, int, int]
) -> tuple[Mask | None, int, dict[str, Any]]:
    """The mask of a layer's call, its offset and arguments."""
    batch, q_len, kv_len = lengths
    if isinstance(given, LayerMask):
        if (given.shape[0], *given.shape[2:]) != lengths:
            raise ArgumentError(
                f"{_HERE}: {type(module).__name__} has {q_len} queries, {kv_len} keys and batch {batch}, but its mask "
                f"was made for {given.shape[2]}, {given.shape[3]} and {given.shape[0]}"
            )
        return given.mask, given.q_offset, given.mask_args
    if given is not None:
        raise ArgumentTypeError(
            f"{_HERE}: attention_mask is a {type(given).__name__} of {given.ndim} dimensions, expected the mask that "
            "Transformers makes; pass the model its padding as (batch, tokens), documents as position_ids, or None"
        )
    follows = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not follows or q_len == 1:
        return None, 0, {}
    if q_len != kv_len:
        raise ArgumentError(
            f"{_HERE}: {type(module).__name__} has no mask, and {q_len} queries with {kv_len} keys don't say which are "
            "causal to which; use another attn_implementation for this model"
        )
    return _CAUSAL, 0, {}


def _shifted(function: Callable[..., Any]) -> Mask:
    """A function of column numbers as a mask of columns."""
    return Predicate(
        lambda b, h, q, kv, *, kv_offset: function(b, h, q, kv + kv_offset), getattr(function, "__name__", "mask")
    )


_CAUSAL: Final = causal()
