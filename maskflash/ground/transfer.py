"""Tensors of one device -> the same on another: one copy for all, and the host waits only for what comes to it.

To a GPU they go from page-locked memory, since from other memory the driver may wait for the stream. Torch keeps that
memory from being used again until the copy has run. See docs/decisions/0015.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from maskflash.errors import BackendError

_CPU: Final = torch.device("cpu")
_LINE: Final = 128  # bytes of a cache line: each tensor begins with one, as in memory of its own

# copy -> (an alias of its original; the versions of both)
_originals: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Upload:
    """Tensors copied to a device, for work on any of its streams.

    Attributes:
        tensors: the copies, as strides and memory suit: expanded dimensions stay expanded, the rest is contiguous.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Copy them on the current stream.

        Raises:
            BackendError: that stream is recording a CUDA graph, which the copies would become part of.
        """
        self.tensors: list[Tensor] = moved(tensors, device)
        self._device = device
        made = stream(device)
        self._copied = None if made is None else made.record_event()
        self._readers = {made}

    def lend(self) -> None:
        """Let the current stream read the copies.

        One that records a CUDA graph needs no wait, and may have none: `torch.cuda.graph` has waited for the device.
        """
        reader = stream(self._device)
        if reader is None or reader in self._readers or capturing(self._device):
            return
        assert self._copied is not None, "a device has streams, or it has none"
        reader.wait_event(self._copied)
        for tensor in self.tensors:
            tensor.record_stream(reader)  # its memory is not given away before the reader is done
        self._readers.add(reader)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.nbytes for tensor in self.tensors)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a device as they are on the CPU; those that are unchanged copies of tensors there need no copy back.

    Raises:
        BackendError: a CUDA graph is being recorded, in which nothing can be waited for.
    """
    known = [_original(tensor) for tensor in tensors]
    copies = iter(moved([x for x, own in zip(tensors, known, strict=True) if own is None], _CPU))
    return [next(copies) if own is None else own for own in known]


def remember(copy: Tensor, original: Tensor, version: int) -> None:
    """Have `to_host` answer a copy by its original, for as long as neither is written to.

    Args:
        copy: as it is from now on.
        original: what it was made of.
        version: of the original, from before the copy was made.
    """
    _originals[copy] = original.detach(), version, copy._version


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one device on another, in one copy; themselves where they are there.

    Copies are no tensors of inference mode, in it either: they outlive it.
    """
    if not tensors or tensors[0].device == device:
        return list(tensors)
    if capturing(device) or capturing(tensors[0].device):
        raise BackendError(
            "attention: a CUDA graph is being captured, and this mask has not yet run at these lengths; run the "
            "same call once before the capture, with backward if the graph has it"
        )
    to_gpu = device.type == "cuda"
    with torch.inference_mode(False), torch.no_grad():
        held = [_unexpanded(tensor) for tensor in tensors]
        ends = accumulate((-(-x.nbytes // _LINE) * _LINE for x in held), initial=0)
        *places, size = ends
        pinned = to_gpu and tensors[0].device == _CPU
        packed = torch.empty(size, dtype=torch.uint8, device=tensors[0].device, pin_memory=pinned)
        for place, x in zip(places, held, strict=True):
            _part(packed, place, x).copy_(x)
        arrived = packed.to(device, non_blocking=to_gpu)
        parts = (_part(arrived, place, x) for place, x in zip(places, held, strict=True))
        return [part.expand(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def numbered(device: torch.device) -> torch.device:
    """A device as its tensors name it: "cuda" is the current GPU."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that copies and launches go to; None where there is none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def capturing(device: torch.device) -> bool:
    """Whether launches are recorded into a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _original(copy: Tensor) -> Tensor | None:
    """What a copy was made of, if neither has been written to since."""
    original, *known = _originals.get(copy, (None,))
    unwritten = original is not None and [original._version, copy._version] == known
    return original if unwritten else None


def _unexpanded(tensor: Tensor) -> Tensor:
    """One of each element that a dimension repeats."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _part(packed: Tensor, place: int, like: Tensor) -> Tensor:
    """The bytes from a place on, as a tensor of another's dtype and shape."""
    return packed[place : place + like.nbytes].view(like.dtype).view(like.shape)
