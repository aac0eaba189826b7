"""xFormers' biases that are masks, by the names of their classes <-> masks.

    attn_bias="BlockDiagonalCausalMask", q_seqlen=[2, 3], kv_seqlen=[2, 3]

Arguments besides attn_bias are those of the class's own constructor: `from_seqlens` and its like for the block-diagonal
ones, whose sequences are packed in one batch row; the class itself for the others.

Source: xFormers 0.0.35, xformers.ops.fmha.attn_bias, which is MSLK's mslk.attention.fmha.attn_bias: the `materialize`
of each class, and what its `__post_init__` refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.forms.kernels import integers, refuse_longer, refuse_unpaired
from maskflash.forms.sequences import Hulls, Sequences
from maskflash.forms.windows import AlignedWindow, PackedWindows, Side
from maskflash.ground import arguments
from maskflash.masks.dense import dense_mask
from maskflash.masks.mask import Mask
from maskflash.presets.documents import Align

_OPERATION: Final = "from_arguments"

Keys = Literal["alone", "packed", "padded", "gappy"]
Kind = Literal["full", "causal", "causal_local", "local"]


class _Bias(NamedTuple):
    """What a class says.

    Attributes:
        keys: how the keys of sequences lie: one sequence for each batch row, packed end to end, each padded to the same
            length, or anywhere.
        window: of each sequence.
        align: with which corner.
        wide: whether no sequence may have more queries than keys.
    """

    keys: Keys
    window: Kind
    align: Align = "bottom_right"
    wide: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        """Arguments of its constructor."""
        sequences = {
            "alone": (),
            "packed": ("q_seqlen", "kv_seqlen"),
            "padded": ("q_seqlen", "kv_padding", "kv_seqlen"),
            "gappy": ("q_seqlen", "kv_seqstarts", "kv_seqlen"),
        }[self.keys]
        window = {"causal_local": ("window_size",), "local": ("window_left", "window_right")}.get(self.window, ())
        return (*sequences, *window)


BIASES: Final = {
    "LowerTriangularMask": _Bias("alone", "causal", "top_left"),
    "LowerTriangularFromBottomRightMask": _Bias("alone", "causal"),
    "LowerTriangularFromBottomRightLocalAttentionMask": _Bias("alone", "causal_local"),
    "LocalAttentionFromBottomRightMask": _Bias("alone", "local"),
    "BlockDiagonalMask": _Bias("packed", "full"),
    "BlockDiagonalCausalMask": _Bias("packed", "causal", "top_left"),
    "BlockDiagonalCausalFromBottomRightMask": _Bias("packed", "causal", wide=True),
    "BlockDiagonalCausalLocalAttentionMask": _Bias("packed", "causal_local", "top_left"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _Bias("packed", "causal_local", wide=True),
    "BlockDiagonalPaddedKeysMask": _Bias("padded", "full"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _Bias("padded", "causal"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _Bias("padded", "causal_local"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _Bias("padded", "local"),
    "BlockDiagonalGappyKeysMask": _Bias("gappy", "full"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _Bias("gappy", "causal"),
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": _Bias("gappy", "local"),
}
TAKES: Final = ("attn_bias", *dict.fromkeys(name for bias in BIASES.values() for name in bias.takes))


def propose(hulls: Hulls, device: torch.device) -> Iterator[dict[str, Any]]:
    """What memory_efficient_attention would take, the plainest first; nothing that its classes refuse."""
    left, right = hulls.window()
    yield {"attn_bias": None}
    yield {"attn_bias": "LowerTriangularMask"}
    reach = max(hulls.start.shape[1], hulls.kv_len)
    for name, bias in _fitting(left, right):
        if bias.keys == "alone":
            yield {"attn_bias": name, **_window_said(bias, left, right, reach)}
    corners: tuple[Align, ...] = ("bottom_right", "top_left")
    sequences = {align: hulls.sequences(align) for align in corners}
    for keys in ("padded", "packed", "gappy"):
        for align, found in reversed(sequences.items()):
            for name, bias in _fitting(found.left, found.right):
                if (bias.keys, bias.align) == (keys, align):
                    window = _window_said(bias, found.left, found.right, found.kv_total)
                    given = _sequences_said(bias, found, hulls, window)
                    if given is not None:
                        yield {"attn_bias": name, **given, **window}


def read(*, attn_bias: Any, **given: Any) -> Mask:
    """The mask of a bias: of the name of its class and what its constructor takes, or of xFormers' own object."""
    if attn_bias is None:
        _check(given, (), "attn_bias=None")
        return AlignedWindow("xformers(attn_bias=None)")
    if isinstance(attn_bias, Tensor) and type(attn_bias).__name__ not in BIASES:
        _check(given, (), "a tensor")
        return dense_mask(_OPERATION, attn_bias, above=3)
    name = attn_bias if isinstance(attn_bias, str) else type(attn_bias).__name__
    if name == "LowerTriangularMaskWithTensorBias":
        raise ArgumentError(
            f'{_OPERATION}: {name} is a mask and a bias; pass attn_bias="LowerTriangularMask" here, and the bias as '
            "score=mf.scores.bias(x)"
        )
    if name not in BIASES:
        fix = "there are no paged caches yet" if name.startswith("Paged") else f"one of {', '.join(BIASES)}"
        raise ArgumentError(f"{_OPERATION}: attn_bias is {name!r}, expected None or a class of xFormers' biases: {fix}")
    bias = BIASES[name]
    if not isinstance(attn_bias, str):
        _check(given, (), f"a {name}")
        given = _held(bias, attn_bias)
    _check(given, bias.takes, name)
    left, right = _window(bias, given)
    if bias.keys == "alone":
        sizes = ", ".join(str(given[x]) for x in bias.takes)
        return AlignedWindow(f"{name}({sizes})", left, right, bias.align)
    return _packed(name, bias, given, left, right)


def _packed(name: str, bias: _Bias, given: dict[str, Any], left: Side, right: Side) -> Mask:
    """The mask of sequences packed in one batch row."""
    q_lengths, kv_lengths = integers("q_seqlen", given["q_seqlen"]), integers("kv_seqlen", given["kv_seqlen"])
    refuse_unpaired(q_seqlen=q_lengths, kv_seqlen=kv_lengths)
    if bias.keys == "padded":
        room = arguments.length(_OPERATION, "kv_padding", given["kv_padding"])
        refuse_longer("kv_padding", room, "kv_seqlen", kv_lengths)
        kv_start = torch.arange(len(kv_lengths)) * room
        kv_total = len(kv_lengths) * room
    elif bias.keys == "gappy":
        starts = integers("kv_seqstarts", given["kv_seqstarts"])
        if len(starts) != len(kv_lengths) + 1:
            raise ArgumentError(
                f"{_OPERATION}: kv_seqstarts has {len(starts)} entries, expected {len(kv_lengths) + 1}: where the keys "
                "of each sequence start, and the total"
            )
        kv_start, kv_total = starts[:-1], int(starts[-1])
        if bool((kv_start + kv_lengths > kv_total).any()):
            raise ArgumentError(f"{_OPERATION}: kv_seqlen goes beyond the total of kv_seqstarts, {kv_total} keys")
    else:
        kv_start, kv_total = kv_lengths.cumsum(0) - kv_lengths, int(kv_lengths.sum())
    if bias.wide and bool((kv_lengths < q_lengths).any()):
        place = int((kv_lengths < q_lengths).nonzero()[0])
        raise ArgumentError(
            f"{_OPERATION}: {name} has {int(q_lengths[place])} queries and {int(kv_lengths[place])} keys in sequence "
            f"{place}, expected no fewer keys than queries"
        )
    name = f"{name}({len(q_lengths)} sequences)"
    return PackedWindows(name, q_lengths, kv_start, kv_start + kv_lengths, kv_total, left, right, bias.align)


def _fitting(left: Side, right: Side) -> list[tuple[str, _Bias]]:
    """The classes that have such a window, by name."""
    kinds: tuple[Kind, ...] = ("local",)
    if right == 0:
        kinds = ("causal",) if left is None else ("causal_local", "local")  # of which some classes have only the latter
    elif left is None and right is None:
        kinds = ("full",)
    return [(name, bias) for kind in kinds for name, bias in BIASES.items() if bias.window == kind]


def _window_said(bias: _Bias, left: Side, right: Side, reach: int) -> dict[str, int]:
    """A window as a class takes it; what has no end reaches over all tokens."""
    if bias.window == "causal_local":
        assert left is not None
        return {"window_size": left + 1}
    if bias.window == "local":
        return {"window_left": reach if left is None else left, "window_right": reach if right is None else right}
    return {}


def _window(bias: _Bias, given: dict[str, Any]) -> tuple[Side, Side]:
    """How far a class's window reaches from the key that a query is aligned with."""
    if bias.window == "full":
        return None, None
    if bias.window == "causal":
        return None, 0
    if bias.window == "causal_local":  # counts the query's own key
        return arguments.distance(_OPERATION, "window_size", given["window_size"], low=1) - 1, 0
    left, right = (arguments.distance(_OPERATION, name, given[name]) for name in ("window_left", "window_right"))
    return left, right


def _sequences_said(bias: _Bias, found: Sequences, hulls: Hulls, window: dict[str, int]) -> dict[str, Any] | None:
    """Sequences as a class takes them; None where it doesn't."""
    if bias.keys == "padded":
        batch, q_len = hulls.start.shape
        alike = len(found.q_lengths) == batch > 0 and bool((found.q_lengths == q_len).all())
        if not alike or not torch.equal(found.kv_start, torch.arange(batch) * hulls.kv_len):
            return None
        kv_seqlen = found.kv_lengths.tolist()
        return {"q_seqlen": found.q_lengths.tolist(), "kv_padding": hulls.kv_len, "kv_seqlen": kv_seqlen}
    if bias.keys == "gappy":
        kv_starts = [*found.kv_start.tolist(), found.kv_total]
        kv_seqlen = found.kv_lengths.tolist()
        if not kv_seqlen:
            return None
        return {"q_seqlen": found.q_lengths.tolist(), "kv_seqstarts": kv_starts, "kv_seqlen": kv_seqlen}
    q_lengths, kv_lengths = found.end_to_end()
    if bias.wide and bool((kv_lengths < q_lengths).any()):
        return None
    if bias.align == "top_left" and bool((q_lengths - kv_lengths >= window.get("window_size", math.inf)).any()):
        return None
    return {"q_seqlen": q_lengths.tolist(), "kv_seqlen": kv_lengths.tolist()}


def _held(bias: _Bias, held: Any) -> dict[str, Any]:
    """What an object of a class was made from."""
    given: dict[str, Any] = {}
    if bias.keys != "alone":
        queries, keys = held.q_seqinfo.seqstart_py, held.k_seqinfo
        given["q_seqlen"] = torch.tensor(queries).diff()
        given["kv_seqlen"] = torch.tensor(keys.seqstart_py).diff() if bias.keys == "packed" else keys.seqlen_py
    if bias.keys == "padded":
        given["kv_padding"] = keys.padding
    if bias.keys == "gappy":
        given["kv_seqstarts"] = keys.seqstart_py
    if bias.window == "causal_local":
        given["window_size"] = held._window_size
    if bias.window == "local":
        given |= {"window_left": held.window_left, "window_right": held.window_right}
    return given


def _check(given: dict[str, Any], takes: tuple[str, ...], what: str) -> None:
    """Refuse what a class doesn't take, and too little of what it does."""
    if set(given) != set(takes):
        got = ", ".join(given) or "none"
        raise ArgumentError(
            f"{_OPERATION}: {what} takes {', '.join(takes) or 'no other arguments'}, got {got}; pass exactly these"
        )
