"""Tensors that a mask has captured -> the same on the device of a call, copied once and again when written to.

And how to make a tensor that is to outlive the call which needs it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from maskflash import modes, transfer

_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # table -> {device: (version, upload)}


def on(table: Tensor, device: torch.device) -> Tensor:
    """A captured table on a device; the same object for as long as the table stays as it is.

    The copy goes when the table does. Tensors of inference mode have no version: they are copied at each call.
    """
    if table.device == device:
        return table
    if table.is_inference() or torch.compiler.is_compiling():
        return table.to(device)
    held: dict[torch.device, tuple[int, transfer.Upload]] = _copies.setdefault(table, {})
    version, upload = held.get(device, (None, None))
    current = table._version  # first: a write during the copy is noticed
    if upload is None or version != current:
        upload = transfer.Upload([table], device)
        held[device] = current, upload
        if table.device.type == "cpu":
            transfer.remember(upload.tensors[0], table, current)
    upload.lend()
    return upload.tensors[0]


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that any later call may take: those made in inference mode are of no use to training."""
    with modes.off():
        yield
