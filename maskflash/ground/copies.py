"""Tensors that a mask has captured -> the same on the device of a call, copied once and again when written to.

And how to make a tensor that is to outlive the call which needs it first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.ground import modes, transfer
from maskflash.ground.identity import Watch, state

_copies: dict[tuple[Hashable, torch.device], tuple[transfer.Upload, tuple[Any, ...], Watch]] = {}
"""By table and device: the copy, the table's state when it was made, and what tells that the table is gone."""


def on(table: Tensor, device: torch.device) -> Tensor:
    """A captured table on a device; the same object for as long as the table stays as it is.

    The copy of a table that is gone goes when the next is made. Tensors of inference mode have no version: they are
    copied at each call.
    """
    if table.device == device:
        return table
    if table.is_meta:
        raise ArgumentError(
            f"attention: a table {tuple(table.shape)} of {table.dtype} that the mask captures is on meta, which holds "
            "no data; give it data first, as module.to_empty() and load_state_dict do"
        )
    if table.is_inference() or torch.compiler.is_compiling():
        return table.to(device)
    key = id(table), device
    current = state(table)  # first: a write during the copy is noticed
    upload, known, _ = _copies.get(key, (None, None, None))
    if upload is None or known != current:
        for gone in [old for old, (_, _, watch) in list(_copies.items()) if watch.expired()]:
            _copies.pop(gone, None)
        upload = transfer.Upload([table], device)
        _copies[key] = upload, current, Watch([table])
        if table.device.type == "cpu":
            transfer.remember(upload.tensors[0], table, current[1])
    upload.lend()
    return upload.tensors[0]


def forget() -> None:
    """Copy every table again when it is next needed."""
    _copies.clear()


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that any later call may take: those made in inference mode are of no use to training."""
    with modes.off():
        yield
