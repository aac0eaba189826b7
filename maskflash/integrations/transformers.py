"""Hugging Face Transformers' attention and mask interfaces -> maskflash: `attn_implementation="mf"`.

    model's forward     mask function, padding, cache lengths        -> LayerMask, once for all layers of a kind
    every layer         query, key, value and the LayerMask          -> `maskflash.attention`

No dense mask is made. Transformers builds its masks of closures; those of one structure are traced once, with their
tensors as arguments, so that other documents, paddings, windows of a cache and offsets never trace again.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn

from maskflash.api import attention
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.integrations.closures import Unknown, lifted
from maskflash.integrations.layer_mask import HERE, LayerMask
from maskflash.integrations.layers import score_of, with_sinks
from maskflash.integrations.shards import ShardMask, attend
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask as as_mask
from maskflash.presets.basic import causal

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
except ImportError as error:
    raise ImportError(
        f"maskflash.integrations.transformers: transformers can't be imported ({error}); "
        "pip install 'maskflash[transformers]'"
    ) from error

NAME: Final = "mf"  # Transformers takes every name with "flash" in it for a FlashAttention of its own

_RESERVED: Final = ("flash", "sdpa", "flex_attention", "eager", "|", "/")  # names with these mean Transformers' own
_WITHOUT_EFFECT: Final = frozenset(  # what layers are handed, and what the mask already says or attention doesn't read
    (
        *("sliding_window", "position_ids", "cache_position", "seq_idx", "use_cache", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits", "return_dict", "deterministic"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # compared with the mask instead
    )
)
_FIXES: Final = {
    "output_attentions": "use eager to look at attention weights",
}


def register(name: str = NAME) -> str:
    """Add maskflash to Transformers through the library's own interfaces; again is no harm.

    Afterwards `AutoModelForCausalLM.from_pretrained(..., attn_implementation="mf")` or
    `model.set_attn_implementation("mf")`. Causal, sliding, chunked and bidirectional masks, padding on either side,
    packed position ids, dynamic and static caches work as with "eager"; docs/integrations.md has what was checked.
    A row that sees nothing, such as padding on the left, gives 0, where "eager" averages over all keys.

    A model whose attention is not taken from `AttentionInterface` can't be given any other: it says so in a warning,
    and computes as if it had not been asked for one.

    Args:
        name: what models will ask for.

    Returns:
        The name.

    Raises:
        ArgumentError: the name is Transformers' own, or somebody else's, or would be taken for a kernel of its own.
        ArgumentTypeError: the name is no string.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=register()))
        >>> model(torch.arange(8)[None]).logits.shape
        torch.Size([1, 8, 64])
    """
    _check_name(name)
    AttentionInterface.register(name, attention_forward)
    outside = torch.compiler.disable(layer_mask, reason="masks of Transformers are made outside of what is compiled")
    AttentionMaskInterface.register(name, outside)
    if not hasattr(PreTrainedModel.get_correct_attn_implementation, "knows_maskflash"):
        PreTrainedModel.get_correct_attn_implementation = _or_its_own(PreTrainedModel.get_correct_attn_implementation)
    return name


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{HERE}.register: name is {name!r}, expected a str; leave it out for {NAME!r}")
    found = next((part for part in _RESERVED if part in name), None)
    if found is not None or not name.strip():
        without = f'one without "{found}"' if found else "one that is not empty"
        why = ": Transformers takes such a name for an attention of its own" if found else ""
        raise ArgumentError(f"{HERE}.register: name is {name!r}, expected {without}{why}; leave it out for {NAME!r}")
    if AttentionInterface._global_mapping.get(name, attention_forward) is not attention_forward:
        raise ArgumentError(
            f"{HERE}.register: name is {name!r}, which is registered for another attention; leave it out for {NAME!r}"
        )


def _or_its_own(chosen: Callable[..., str]) -> Callable[..., str]:
    """Transformers' choice of a model's attention, but the model's own where it could not be given ours."""

    @wraps(chosen)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        name = chosen(self, requested_attention, is_init_check)
        if AttentionInterface._global_mapping.get(name) is not attention_forward or not _brings_its_own(type(self)):
            return name
        own = chosen(self, None, is_init_check)
        warnings.warn(
            f"{HERE}: {type(self).__name__} brings its own attention, which can't be replaced: attn_implementation="
            f"{name!r} has no effect on it, and it runs {own!r}",
            stacklevel=2,
        )
        return own

    get_correct_attn_implementation.knows_maskflash = True  # type: ignore[attr-defined]
    return get_correct_attn_implementation


def _brings_its_own(model: type[PreTrainedModel]) -> bool:
    """Whether the module that a model's attention is from never asks Transformers' interface for one."""
    for module in (sys.modules.get(each.__module__) for each in model.__mro__ if issubclass(each, PreTrainedModel)):
        here = list(vars(module).values()) if module is not None else []
        if any(isinstance(value, AttentionInterface) for value in here):
            return False
        if any(inspect.isclass(value) and _is_attention(value, module) for value in here):
            return True
    return False


def _is_attention(found: type, module: Any) -> bool:
    return "Attention" in found.__name__ and nn.Module in found.__bases__ and found.__module__ == module.__name__


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
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
        config: the model's.
        **_: what other implementations need.

    Raises:
        MaskTraceError: a custom mask function that can't become an expression.
    """
    documents = _documents(mask_function)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not padding.all():
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    try:
        mask, tables = lifted(mask_function, masking_utils)
    except Unknown:  # the user's own function may read anything: it is traced at each forward pass
        mask, tables = as_mask(mask_function), {}
    shape = batch_size, 1, q_length, kv_length
    kind = getattr(config, "model_type", "")
    return LayerMask(mask, (int(q_offset), int(kv_offset)), tables, shape, device, kind, documents)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, as Transformers' attention interface asks for it.

    Args:
        module: the layer.
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Skv, D); Hkv divides Hq.
        value: (B, Hkv, Skv, Dv).
        attention_mask: what `layer_mask` made, or a dense mask, the user's or the model's own, (B, Hq, Sq, Skv) or
            1 in place of any: bool, or what is added to the scores, where -inf and the dtype's lowest
            number hide a pair; None where the model made none; or `shards.on_shards` of an op of ranks.
        scaling: factor of the scores; None for 1/sqrt(D).
        dropout: probability of dropping a weight while the layer is trained; the seed is drawn from torch's default
            generator.
        is_causal: what None means for the mask; the module's own where left out.
        s_aux: (Hq,), attention sinks.
        sinks: (B, Hq, Sq, 1) or 1 in place of any, likewise, but each row's own.
        softcap: scores are softcap · tanh(score / softcap); None for the scores themselves.
        position_bias: floating (B, Hq, Sq, Skv), or 1 in place of any, added to the scores. It gets its gradient.
        **asked: what else the model wants.

    Returns:
        (B, Sq, Hq, Dv), and None for the weights.

    Raises:
        ArgumentError: the model asks for what maskflash doesn't compute, by name.
    """
    for name, wish in asked.items():
        if wish is not None and wish is not False and name not in _WITHOUT_EFFECT:
            raise ArgumentError(
                f"{HERE}: {type(module).__name__} asks for {name}, which maskflash doesn't compute; "
                f"{_FIXES.get(name, 'use another attn_implementation for this model')}"
            )
    layer = f"{HERE}: {type(module).__name__}"
    dropout = dropout if module.training else 0.0  # as eager does, whatever the model passes
    if isinstance(attention_mask, ShardMask):
        documents = {name: asked.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        refused = {"position_bias": position_bias, "sinks": sinks, **documents}
        return attend(attention_mask, query, key, value, scaling, dropout, s_aux, softcap, refused, layer), None
    lengths = query.shape[0], query.shape[2], key.shape[2]
    mask, (q_offset, kv_offset), mask_args = _mask_of(module, attention_mask, is_causal, lengths)
    if asked.get("cu_seq_lens_q") is not None or asked.get("cu_seq_lens_k") is not None:
        _check_documents(module, attention_mask, asked.get("cu_seq_lens_q"), asked.get("cu_seq_lens_k"))
    shape = (lengths[0], query.shape[1], *lengths[1:])
    score, score_args = score_of(softcap, position_bias, shape, (q_offset, kv_offset), layer)
    found: Any = attention(
        query,
        key,
        value,
        mask,
        score=score,
        scale=scaling,
        q_offset=q_offset,
        kv_offset=kv_offset,
        sinks=s_aux,
        dropout_p=dropout,
        return_lse=sinks is not None,
        **mask_args,
        **score_args,
    )
    out: Tensor = found if sinks is None else with_sinks(found, sinks, layer)
    return out.transpose(1, 2).contiguous(), None


def _mask_of(
    module: nn.Module, given: Tensor | None, is_causal: bool | None, lengths: tuple[int, int, int]
) -> tuple[Mask | Tensor | None, tuple[int, int], dict[str, Any]]:
    """The mask of a layer's call, its offsets and arguments."""
    batch, q_len, kv_len = lengths
    if isinstance(given, LayerMask):
        if (given.shape[0], *given.shape[2:]) != lengths:
            raise ArgumentError(
                f"{HERE}: {type(module).__name__} has {q_len} queries, {kv_len} keys and batch {batch}, but its mask "
                f"was made for {given.shape[2]}, {given.shape[3]} and {given.shape[0]}"
            )
        return given.mask, given.offsets, given.mask_args
    if given is not None:
        _check_dense(module, given)
        return given, _AT_ZERO, {}
    follows = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not follows or q_len == 1:
        return None, _AT_ZERO, {}
    if q_len != kv_len:
        raise ArgumentError(
            f"{HERE}: {type(module).__name__} has no mask, and {q_len} queries with {kv_len} keys don't say which are "
            "causal to which; use another attn_implementation for this model"
        )
    return _CAUSAL, _AT_ZERO, {}


def _check_dense(module: nn.Module, given: Any) -> None:
    """A mask of all pairs is taken as torch's attention takes it: bool, or floats that are added."""
    if not isinstance(given, Tensor) or given.ndim != 4:
        got = f"a tensor of {given.ndim} dimensions" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ArgumentTypeError(
            f"{HERE}: {type(module).__name__} has {got} as attention_mask, expected the mask that Transformers makes; "
            "pass the model its padding as (batch, tokens), documents as position_ids, a mask of all pairs as (batch, "
            "1, queries, keys) of bool, or None"
        )
    if given.dtype != torch.bool and not given.is_floating_point():
        raise ArgumentTypeError(
            f"{HERE}: {type(module).__name__} has a mask of {given.dtype}, expected torch.bool, True where a pair is "
            "visible, or floats that are added to the scores"
        )


def _check_documents(module: nn.Module, mask: Any, *given: Tensor | None) -> None:
    """FlashAttention's boundaries of documents are taken where the mask has the same."""
    if isinstance(mask, LayerMask):
        agreed = mask.agreed
        if agreed is not None and all(one is other for one, other in zip(agreed, given, strict=True)):
            return
        batch, _, *lengths = mask.shape
        expected = (_boundaries(mask.documents, batch, length) for length in lengths)
        if all(x is None or x.unique().tolist() == own for x, own in zip(given, expected, strict=True)):
            mask.agreed = given
            return
    raise ArgumentError(
        f"{HERE}: {type(module).__name__} is given cu_seq_lens whose documents are not those of its mask; give the "
        "position_ids that start again where a document does, without attention_mask and cache, or leave the "
        "cu_seq_lens out"
    )


def _boundaries(documents: Tensor | None, batch: int, length: int) -> list[int]:
    """Where documents start and end, all batch rows in one."""
    rows = range(0, batch * length + 1, length) if length else [0]
    if documents is None:
        return list(rows)
    turns = (documents.diff() != 0).nonzero()
    starts = turns[:, 0] * length + turns[:, 1] + 1
    return sorted({*rows, *starts.tolist()})


def _documents(function: Any) -> Tensor | None:
    """The document of each token, where a mask function of Transformers keeps documents apart."""
    if not isinstance(function, FunctionType) or function.__globals__ is not vars(masking_utils):
        return None
    held = inspect.getclosurevars(function).nonlocals
    if "packed_sequence_mask" in held:
        documents: Tensor = held["packed_sequence_mask"]
        return documents
    both = held.get("mask_functions", ()) if function.__qualname__.startswith("and_masks.") else ()
    return next((found for each in both if (found := _documents(each)) is not None), None)


_AT_ZERO: Final = (0, 0)
_CAUSAL: Final = causal()
