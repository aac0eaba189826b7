"""Modes that a caller is in (a default device, FakeTensorMode, inference) -> none, for tensors that outlive them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


@contextmanager
def off() -> Iterator[None]:
    """Make plain tensors, with data and on the CPU unless told otherwise, that any later call may take."""
    with torch.inference_mode(False), torch.no_grad(), _no_default_device(), _no_fakes():
        yield


def _no_default_device() -> AbstractContextManager[Any]:
    if torch._C._len_torch_function_stack() == 0:
        return nullcontext()
    devices = any(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    return torch.device("cpu") if devices else nullcontext()


def _no_fakes() -> AbstractContextManager[Any]:
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # it imports dynamo's tracing

    return unset_fake_temporarily()
