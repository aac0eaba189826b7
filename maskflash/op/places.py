"""Where packed sequences begin -> for each token its sequence, its place in it, and where it is along all of them.

    cu_seqlens    0     3           8
    token         0  1  2  3  4  5  6  7
    sequence      0  0  0  1  1  1  1  1
    place         0  1  2  0  1  2  3  4        of queries with their q_offset
    along         0  1  2  3  4  5  6  7        sequence by sequence, so far apart that it ascends for queries and keys

What is made of a tensor is kept for as long as that stays as it is, so that analyses of masks are found again. Graphs
of torch.compile make it in each call, by an op of torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import arguments, modes
from maskflash.ground.identity import Watch, state
from maskflash.ground.transfer import capturing

Places = tuple[Tensor, ...]
"""What `expr.sequences.TABLES` names, int64: sequence, place and along of q (T,), and of kv (Tk,)."""

_MOST: Final = 16  # kept; the first to come is the first to go
_LONGEST: Final = 2.0**61  # of all sequences one after the other: beyond it, nothing is far apart
_OPERATION: Final = "varlen_attention"

_kept: OrderedDict[Hashable, tuple[Places, Watch]] = OrderedDict()
_lock = threading.RLock()  # of it; nobody holds it while places are made

_library = torch.library.Library("maskflash", "FRAGMENT")
_library.define(
    "places(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt q_offset, Tensor? q_offsets, SymInt q_len, SymInt kv_len) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


def find(starts: Tensor, kv_starts: Tensor, q_offset: int | Tensor, q_len: int, kv_len: int) -> Places:
    """The places of tokens, made now or found.

    Args:
        starts: (R + 1,) integers, where the queries of each sequence begin, and their number.
        kv_starts: likewise of keys.
        q_offset: an int, or (R,) integers.
        q_len: queries of all sequences.
        kv_len: keys.

    Raises:
        ArgumentError: they don't begin with 0, don't ascend, or don't end with the number of tokens.
    """
    number, offsets = (0, q_offset) if isinstance(q_offset, Tensor) else (q_offset, None)
    tensors = [starts, kv_starts] if offsets is None else [starts, kv_starts, offsets]
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        op: Any = torch.ops.maskflash.places.default
        made: Places = op(starts, kv_starts, number, offsets, q_len, kv_len)
        return made
    if any(tensor.is_inference() for tensor in tensors):  # they have no version: analyses are found by what these hold
        with torch.inference_mode():
            return _make(starts, kv_starts, number, offsets, q_len, kv_len)
    key = *(state(tensor) for tensor in tensors), number, q_len, kv_len
    known = _kept.get(key)
    if known is not None:
        return known[0]
    with modes.off():
        made = _make(starts, kv_starts, number, offsets, q_len, kv_len)
    with _lock:
        for gone in [old for old, (_, watch) in _kept.items() if watch.expired()]:
            del _kept[gone]
        _kept[key] = made, Watch(tensors)
        while len(_kept) > _MOST:
            _kept.popitem(last=False)
    return made


def forget() -> None:
    """Make all places again when they are next needed."""
    with _lock:
        _kept.clear()


def _make(
    starts: Tensor, kv_starts: Tensor, q_offset: int, q_offsets: Tensor | None, q_len: int, kv_len: int
) -> Places:
    starts, kv_starts = starts.long(), kv_starts.long()
    lengths, kv_lengths = starts.diff(), kv_starts.diff()
    offsets = torch.full_like(lengths, q_offset) if q_offsets is None else q_offsets.long()
    if not capturing(starts.device):
        _check(starts, kv_starts, offsets, q_len, kv_len)
    lowest, end = offsets.clamp(max=0), offsets + lengths
    lowest, end = (x.masked_fill(lengths == 0, 0) for x in (lowest, end))
    length = torch.maximum(end, kv_lengths) - lowest
    base = length.cumsum(0) - length - lowest
    base = torch.where(length.double().sum() < _LONGEST, base, 0)
    numbers = torch.arange(len(lengths), device=starts.device)
    found: list[Tensor] = []
    for begin, of, tokens in ((starts[:-1] - offsets, lengths, q_len), (kv_starts[:-1], kv_lengths, kv_len)):
        sequence = numbers.repeat_interleave(of, output_size=tokens)
        place = torch.arange(tokens, device=starts.device) - begin[sequence]
        found += sequence, place, place + base[sequence]
    return tuple(found)


def _check(starts: Tensor, kv_starts: Tensor, offsets: Tensor, q_len: int, kv_len: int) -> None:
    """Check what tensors hold: the host waits for their device once."""
    on_host = torch.cat([starts, kv_starts, offsets]).cpu()
    starts, kv_starts, offsets = on_host.split([len(starts), len(kv_starts), len(offsets)])
    for name, whose, x, tokens in (("cu_seqlens_q", "q", starts, q_len), ("cu_seqlens_k", "k", kv_starts, kv_len)):
        if x[0] != 0:
            raise ArgumentError(
                f"{_OPERATION}: {name} begins with {int(x[0])}, expected 0, where each next sequence begins, and the "
                "total; of lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
            )
        falls = (x.diff() < 0).nonzero()[:, 0]
        if len(falls):
            place = int(falls[0])
            raise ArgumentError(
                f"{_OPERATION}: {name} goes from {int(x[place])} to {int(x[place + 1])} at {place + 1}, expected "
                "numbers that ascend; an empty sequence has that of the next"
            )
        if x[-1] != tokens:
            raise ArgumentError(
                f"{_OPERATION}: {name} ends with {int(x[-1])}, expected {tokens}, the tokens of {whose}; slice off "
                "those of no sequence"
            )
    arguments.offsets_in_range(_OPERATION, offsets)


def _of_meta(starts: Tensor, kv_starts: Tensor, q_offset: Any, q_offsets: Any, q_len: int, kv_len: int) -> Any:
    return tuple(starts.new_empty((tokens,), dtype=torch.int64) for tokens in (*[q_len] * 3, *[kv_len] * 3))


for _key in ("CPU", "CUDA"):
    _library.impl("places", _make, _key)
_library.impl("places", _of_meta, "Meta")
