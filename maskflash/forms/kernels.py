"""flash-attention's arguments, and those of torch's varlen and SDPA <-> masks.

flash_attn          causal, window_size=(left, right)                  of each batch row, aligned to the bottom right
flash_attn_varlen   the same, of sequences: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
torch_varlen        window_size alone, where (-1, 0) is causal: cu_seq_q, cu_seq_k, max_q, max_k; seqused_k
sdpa                is_causal, aligned to the top left; or attn_mask

Sources: Dao, flash-attention 2.8, flash_attn_func and flash_attn_varlen_func, whose alignment is that of 2.1 and later;
torch 2.13, torch.nn.attention.varlen, torch.nn.attention.bias and scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.forms.sequences import Hulls, Sequences
from maskflash.forms.windows import AlignedWindow, PackedWindows, Side, as_flash_counts
from maskflash.ground import arguments, modes
from maskflash.masks.dense import dense_mask
from maskflash.masks.mask import Mask

_OPERATION: Final = "from_arguments"
_NO_WINDOW: Final = (-1, -1)


def propose_flash(hulls: Hulls, device: torch.device) -> Iterator[dict[str, Any]]:
    """What flash_attn_func would take."""
    left, right = hulls.window()
    if left is None and right == hulls.kv_len:  # which is an end only beside one to the left
        left = max(hulls.kv_len - 1, 0)
    yield causal_and_window(left, right)
    yield {"causal": False}
    yield {"causal": True}


def read_flash(*, causal: Any = False, window_size: Any = _NO_WINDOW) -> Mask:
    """The mask of flash_attn_func."""
    left, right = window_of(causal, window_size)
    return AlignedWindow(f"flash_attn({_said(left, right)})", left, right, flash=True)


def propose_flash_varlen(hulls: Hulls, device: torch.device) -> Iterator[dict[str, Any]]:
    """What flash_attn_varlen_func would take."""
    found = hulls.sequences()
    cu_q, cu_k, max_q, max_k = _packed(found, device)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    yield {**packed, **causal_and_window(found.left, found.right)}


def read_flash_varlen(
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    causal: Any = False,
    window_size: Any = _NO_WINDOW,
) -> Mask:
    """The mask of flash_attn_varlen_func."""
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    return _varlen("flash_attn_varlen", starts, longest, *window_of(causal, window_size))


def propose_torch_varlen(hulls: Hulls, device: torch.device) -> Iterator[dict[str, Any]]:
    """What torch.nn.attention.varlen.varlen_attn would take."""
    found = hulls.sequences()
    cu_q, cu_k, max_q, max_k = _packed(found, device)
    window = _sizes(found.left, found.right)
    packed = {"cu_seq_q": cu_q, "cu_seq_k": cu_k, "max_q": max_q, "max_k": max_k}
    yield packed if window == _NO_WINDOW else {**packed, "window_size": window}


def read_torch_varlen(
    *,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: Any = None,
    max_k: Any = None,
    window_size: Any = _NO_WINDOW,
    seqused_k: Any = None,
) -> Mask:
    """The mask of torch.nn.attention.varlen.varlen_attn."""
    starts, longest = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k}, {"max_q": max_q, "max_k": max_k}
    return _varlen("torch_varlen", starts, longest, *window_of(False, window_size), seqused_k)


def propose_sdpa(hulls: Hulls, device: torch.device) -> Iterator[dict[str, Any]]:
    """What scaled_dot_product_attention would take; nothing of whose rows without keys it would make NaN."""
    q_len = hulls.start.shape[1]
    yield {"is_causal": False}
    yield {"is_causal": True}
    if q_len < hulls.kv_len:
        from torch.nn.attention.bias import causal_lower_right  # which loads dynamo

        yield {"attn_mask": causal_lower_right(q_len, hulls.kv_len)}


def read_sdpa(*, attn_mask: Any = None, is_causal: Any = False) -> Mask:
    """The mask of scaled_dot_product_attention."""
    causal = arguments.flag(_OPERATION, "is_causal", is_causal)
    if attn_mask is None:
        return AlignedWindow(f"sdpa(is_causal={causal})", right=0 if causal else None, align="top_left")
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if causal:
        raise ArgumentError(f"{_OPERATION}: got attn_mask and is_causal=True, of which sdpa takes one; drop the other")
    arguments.instance(_OPERATION, "attn_mask", attn_mask, Tensor, "a bias is score=mf.scores.bias(x)")
    if not isinstance(attn_mask, CausalBias):
        return dense_mask(_OPERATION, attn_mask, above=3)
    lower = attn_mask.variant == CausalVariant.LOWER_RIGHT
    lengths = attn_mask.seq_len_q, attn_mask.seq_len_kv
    return AlignedWindow(
        f"sdpa({attn_mask.variant.name.lower()}{lengths})",
        right=0,
        align="bottom_right" if lower else "top_left",
        lengths=lengths,
    )


def integers(name: str, value: Any) -> Tensor:
    """(n,) int64 on the CPU, at least 0 each, read now."""
    with modes.off():
        found = torch.tensor(arguments.int_list(_OPERATION, name, value, (1,)), dtype=torch.int64, device="cpu")
        lowest = int(found.min()) if len(found) else 0
    if lowest < 0:
        raise ArgumentError(f"{_OPERATION}: {name} holds {lowest}, expected at least 0")
    return found


def refuse_unpaired(**lists: Tensor) -> None:
    """An error where lists of sequences differ in their lengths."""
    counts = {name: len(values) for name, values in lists.items()}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ArgumentError(f"{_OPERATION}: the sequences don't pair up: {got}; each needs an entry for every sequence")


def refuse_longer(name: str, most: int, what: str, lengths: Tensor) -> None:
    """An error where a length is more than there is room for."""
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > most:
        raise ArgumentError(f"{_OPERATION}: {name} is {most}, expected at least {longest}, the longest of {what}")


def _varlen(
    library: str,
    starts: dict[str, Any],
    longest: dict[str, Any],
    left: Side,
    right: Side,
    used: Any = None,
) -> Mask:
    """The mask of packed sequences, from where they start."""
    (q_name, q_starts), (kv_name, kv_starts) = ((name, _lengths(name, value)) for name, value in starts.items())
    refuse_unpaired(**{q_name: q_starts, kv_name: kv_starts})
    most: list[int] = []
    for (name, value), what, lengths in zip(longest.items(), starts, (q_starts, kv_starts), strict=True):
        length = int(lengths.max()) if len(lengths) else 0
        most.append(length if value is None else arguments.integer(_OPERATION, name, value))
        refuse_longer(name, most[-1], what, lengths)
    kv_stop = kv_starts.cumsum(0)
    kv_start, kv_total = kv_stop - kv_starts, int(kv_starts.sum())
    if used is not None:
        kept = integers("seqused_k", used)
        refuse_unpaired(**{kv_name: kv_starts, "seqused_k": kept})
        if bool((kept > kv_starts).any()):
            place = int((kept > kv_starts).nonzero()[0])
            raise ArgumentError(
                f"{_OPERATION}: seqused_k[{place}] is {int(kept[place])}, expected at most {int(kv_starts[place])}, "
                "the keys of its sequence"
            )
        kv_stop = kv_start + kept
    name = f"{library}({len(q_starts)} sequences, {_said(left, right)})"
    return PackedWindows(name, q_starts, kv_start, kv_stop, kv_total, *as_flash_counts(left, right, most[1]))


def _packed(found: Sequences, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where queries and keys of sequences start, and the most of each, by which a window to the right counts."""
    q_lengths, kv_lengths = found.end_to_end()
    max_k = int(kv_lengths.max())
    if found.right is not None:
        max_k = max(max_k, found.right + 1)
    elif found.left is not None:
        max_k = max(max_k, int(q_lengths.where(q_lengths > kv_lengths, 0).max()))
    return _starts(q_lengths, device), _starts(kv_lengths, device), int(q_lengths.max()), max_k


def _lengths(name: str, value: Any) -> Tensor:
    """(n,) int64 lengths of sequences that are given by where they start, and the total."""
    starts = integers(name, value)
    lengths = starts.diff()
    if not len(starts) or int(starts[0]) != 0 or bool((lengths < 0).any()):
        first = starts[:6].tolist()
        raise ArgumentError(
            f"{_OPERATION}: {name} begins with {first}, expected 0, where each next sequence starts, and the total"
        )
    if int(starts[-1]) > arguments.MOST_TOKENS:
        raise ArgumentError(
            f"{_OPERATION}: {name} reaches {int(starts[-1]):,} tokens, expected at most {arguments.MOST_TOKENS:,}"
        )
    return lengths


def _starts(lengths: Tensor, device: torch.device) -> Tensor:
    """Where sequences of these lengths start, and the total: (n + 1,) int32."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int().to(device)


def window_of(causal: Any, window_size: Any) -> tuple[Side, Side]:
    """A window as it is given, -1 for no end; causal has none to the right."""
    causal = arguments.flag(_OPERATION, "causal", causal)
    sizes = window_size if isinstance(window_size, (tuple, list)) else (window_size,)
    if len(sizes) != 2:
        raise ArgumentError(f"{_OPERATION}: window_size is {window_size!r}, expected (left, right), -1 for no end")
    left, right = (
        min(arguments.integer(_OPERATION, "an entry of window_size", size, low=-1), arguments.ENDLESS) for size in sizes
    )
    return (None if left < 0 else left), (0 if causal else None if right < 0 else right)


def _sizes(left: Side, right: Side) -> tuple[int, int]:
    """A window as it is passed."""
    return (-1 if left is None else left), (-1 if right is None else right)


def causal_and_window(left: Side, right: Side) -> dict[str, Any]:
    """A window as flash-attention's arguments, the plainest: none where causal says it all."""
    window = {} if left is None and not right else {"window_size": _sizes(left, right)}
    return {"causal": right == 0, **window}


def _said(left: Side, right: Side) -> str:
    return ", ".join(f"{name}={value}" for name, value in causal_and_window(left, right).items())
