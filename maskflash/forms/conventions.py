"""What libraries mean by the windows and chunks that their calls and configurations take <-> masks.

                       `n` of a window                              aligned to      chunks
flash_attn_3           n before, besides itself; -1 is no end       bottom right    attention_chunk
flash_attn_4           the same, but None is no end, -1 a number    bottom right
flashinfer_prefill     n before, besides itself; -1 is no end       bottom right
transformers           n with itself: n - 1 before; n on both       bottom right    attention_chunk_size
                       sides, besides itself, if not causal
vllm                   n with itself: n - 1 before; n - 1 on both   bottom right    attention_chunk_size
                       sides of an encoder's
paddle                 n before, besides itself                     equal lengths
jax                    n before, besides itself; an int both sides  top left

    window of 2, causal        besides itself: ■ ■ ■      with itself: · ■ ■      the last query of three

`kernels.py` has flash-attention 2, torch and xFormers are beside it. Sources, each read at the version named:

flash_attn_3           flash-attention 0251105: hopper/flash_api.cpp and mask.h
flash_attn_4           the same: flash_attn/cute/interface.py and mask.py
flashinfer_prefill     FlashInfer 0.6: include/flashinfer/attention/variants.cuh and prefill.cuh
transformers           Transformers 5.23: masking_utils.py
vllm                   vLLM 5704f34: v1/attention/backends/flash_attn.py; its chunks are Llama 4's
paddle                 Paddle: nn/functional/flash_attention.py, flashmask_attention
jax                    JAX 01c3657: jax/_src/nn/functions.py, the implementation "xla"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from maskflash.errors import ArgumentError
from maskflash.forms.kernels import causal_and_window, window_of
from maskflash.forms.sequences import Hulls
from maskflash.forms.windows import AlignedWindow, Side
from maskflash.ground import arguments
from maskflash.masks.mask import Mask

_OPERATION: Final = "from_arguments"
_ATTENTION: Final = ("decoder", "encoder_only")

Given = Iterator[dict[str, Any]]


def read_flash_3(*, causal: Any = False, window_size: Any = (-1, -1), attention_chunk: Any = 0) -> Mask:
    """The mask of FlashAttention 3's flash_attn_func."""
    left, right = window_of(causal, window_size)
    chunk = arguments.distance(_OPERATION, "attention_chunk", attention_chunk) or None
    said = causal_and_window(left, right) | ({} if chunk is None else {"attention_chunk": chunk})
    return AlignedWindow(_named("flash_attn_3", said), left, right, chunk=chunk)


def propose_flash_3(hulls: Hulls, device: torch.device) -> Given:
    """What FlashAttention 3's flash_attn_func would take."""
    yield from ({"causal": False}, {"causal": True}, causal_and_window(*hulls.window()))
    for chunk in hulls.chunk():
        yield from ({"causal": causal, "attention_chunk": chunk} for causal in (True, False))


def read_flash_4(*, causal: Any = False, window_size: Any = (None, None)) -> Mask:
    """The mask of FlashAttention 4's flash_attn_func."""
    causal = arguments.flag(_OPERATION, "causal", causal)
    left, right = (
        None if size is None else _number("an entry of window_size", size, -arguments.ENDLESS)
        for size in _pair("window_size", window_size, "(left, right), None for no end")
    )
    said = {"causal": causal} | ({"window_size": (left, right)} if left is not None or right is not None else {})
    right = 0 if causal else right
    if left is not None and right is not None and left + right < 0:  # which its interface drops
        left, right = None, 0 if causal else None
    return AlignedWindow(_named("flash_attn_4", said), left, right)


def propose_flash_4(hulls: Hulls, device: torch.device) -> Given:
    """What FlashAttention 4's flash_attn_func would take."""
    left, right = hulls.window()
    yield from ({"causal": False}, {"causal": True})
    yield {"causal": True, "window_size": (left, None)} if right == 0 else {"window_size": (left, right)}


def read_flashinfer(*, causal: Any = False, window_left: Any = -1) -> Mask:
    """The mask of FlashInfer's prefill kernels, single or planned for a batch."""
    causal = arguments.flag(_OPERATION, "causal", causal)
    left = _number("window_left", window_left, -1)
    said = {"causal": causal} | ({"window_left": left} if left >= 0 else {})
    return AlignedWindow(_named("flashinfer_prefill", said), left if left >= 0 else None, 0 if causal else None)


def propose_flashinfer(hulls: Hulls, device: torch.device) -> Given:
    """What FlashInfer's prefill kernels would take."""
    left, right = hulls.window()
    yield from ({"causal": False}, {"causal": True})
    if left is not None:
        yield {"causal": right == 0, "window_left": left}


def read_transformers(*, sliding_window: Any = None, attention_chunk_size: Any = None, is_causal: Any = True) -> Mask:
    """The mask of a layer of a Transformers model, whose queries are the last of its keys."""
    causal = arguments.flag(_OPERATION, "is_causal", is_causal)
    window, chunk = _window_or_chunk(sliding_window, attention_chunk_size, causal, "is_causal")
    said = _said(window, chunk) | ({} if causal else {"is_causal": False})
    left = window if window is None or not causal else window - 1
    return _of_layer(_named("transformers", said), left, causal, chunk)


def propose_transformers(hulls: Hulls, device: torch.device) -> Given:
    """What the configuration of a Transformers model would say."""
    left, _ = hulls.window()
    yield from ({"is_causal": True}, {"is_causal": False})
    if left is not None:
        yield {"sliding_window": left + 1}
        if left and hulls.square:
            yield {"sliding_window": left, "is_causal": False}
    yield from ({"attention_chunk_size": chunk} for chunk in hulls.chunk())


def read_vllm(*, sliding_window: Any = None, attention_chunk_size: Any = None, attn_type: Any = "decoder") -> Mask:
    """The mask of a layer of a vLLM model, whose queries are the last of its keys."""
    arguments.choice(_OPERATION, "attn_type", attn_type, _ATTENTION)
    causal = attn_type == "decoder"
    window, chunk = _window_or_chunk(sliding_window, attention_chunk_size, causal, "attn_type")
    said = _said(window, chunk) | ({} if causal else {"attn_type": attn_type})
    left = None if window is None else window - 1
    return _of_layer(_named("vllm", said), left, causal, chunk)


def propose_vllm(hulls: Hulls, device: torch.device) -> Given:
    """What a layer of a vLLM model would take."""
    left, _ = hulls.window()
    yield from ({"attn_type": kind} for kind in _ATTENTION)
    if left is not None:
        yield {"sliding_window": left + 1}
        if hulls.square:
            yield {"sliding_window": left + 1, "attn_type": "encoder_only"}
    yield from ({"attention_chunk_size": chunk} for chunk in hulls.chunk())


def read_paddle(*, causal: Any = False, window_size: Any = None) -> Mask:
    """The mask of Paddle's flash_attention and flashmask_attention; vectors are `ColumnIntervals.from_flashmask`'s."""
    causal = arguments.flag(_OPERATION, "causal", causal)
    if window_size is None:
        return AlignedWindow(_named("paddle", {"causal": causal}), right=0 if causal else None)
    left, right = _reaches("window_size", window_size)
    name = _named("paddle", {"causal": causal, "window_size": (left, right)})
    return AlignedWindow(
        name, left, 0 if causal else right, lengths="equal"
    )  # its vectors have an entry for each query


def propose_paddle(hulls: Hulls, device: torch.device) -> Given:
    """What Paddle's flashmask_attention would take."""
    yield from ({"causal": False}, {"causal": True})
    left, right = hulls.window()
    if hulls.square and (left is not None or right is not None):
        wide = hulls.kv_len
        yield {"causal": right == 0, "window_size": tuple(wide if side is None else side for side in (left, right))}


def read_jax(*, is_causal: Any = False, local_window_size: Any = None) -> Mask:
    """The mask of jax.nn.dot_product_attention, which XLA computes."""
    causal = arguments.flag(_OPERATION, "is_causal", is_causal)
    left: Side = None
    right: Side = None
    said: dict[str, Any] = {"is_causal": causal}
    if local_window_size is not None:
        left, right = _reaches("local_window_size", local_window_size)
        said["local_window_size"] = left, right
    return AlignedWindow(_named("jax", said), left, 0 if causal else right, "top_left")


def propose_jax(hulls: Hulls, device: torch.device) -> Given:
    """What jax.nn.dot_product_attention would take."""
    yield from ({"is_causal": False}, {"is_causal": True})
    left, right = hulls.window("top_left")
    wide = max(hulls.kv_len, hulls.start.shape[1])
    if left is not None or right is not None:
        sides = tuple(wide if side is None else side for side in (left, right))
        yield {"is_causal": right == 0, "local_window_size": sides}


def _of_layer(name: str, left: Side, causal: bool, chunk: int | None) -> Mask:
    """The mask of a model's layer: causal behind a cache, or an encoder's, which has as many queries as keys."""
    if causal or left is None:
        return AlignedWindow(name, left, 0 if causal else None, chunk=chunk)
    return AlignedWindow(name, left, left, lengths="equal")


def _window_or_chunk(window: Any, chunk: Any, causal: bool, by: str) -> tuple[int | None, int | None]:
    """A window and a chunk in tokens, of which a causal layer has one and another no chunk."""
    given = {"sliding_window": window, "attention_chunk_size": chunk}
    found = [
        None if value is None else arguments.distance(_OPERATION, name, value, low=1) for name, value in given.items()
    ]
    if None not in found:
        raise ArgumentError(f"{_OPERATION}: got sliding_window and attention_chunk_size, expected one of them")
    if found[1] is not None and not causal:
        raise ArgumentError(
            f"{_OPERATION}: {by} is of layers that aren't causal, expected no attention_chunk_size there"
        )
    return found[0], found[1]


def _said(window: int | None, chunk: int | None) -> dict[str, Any]:
    sizes = {"sliding_window": window, "attention_chunk_size": chunk}
    return {name: size for name, size in sizes.items() if size is not None}


def _number(name: str, value: Any, low: int) -> int:
    """A size that may be negative."""
    return min(arguments.integer(_OPERATION, name, value, low=low), arguments.ENDLESS)


def _pair(name: str, value: Any, expected: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentError(f"{_OPERATION}: {name} is {value!r}, expected {expected}")
    return value[0], value[1]


def _reaches(name: str, value: Any) -> tuple[int, int]:
    """How far a window reaches to both sides; an int is for both."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    left, right = _pair(name, pair, "an int, or (left, right)")
    return arguments.distance(_OPERATION, name, left), arguments.distance(_OPERATION, name, right)


def _named(library: str, said: dict[str, Any]) -> str:
    return f"{library}({', '.join(f'{name}={value!r}' for name, value in said.items())})"
