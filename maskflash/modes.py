"""Modes that a caller is in (a default device, FakeTensorMode, inference) -> none, for tensors that outlive them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def off() -> Iterator[None]:
    """Make plain tensors, with data and on the CPU unless told otherwise, that any later call may take."""
    no_functions = torch._C.DisableTorchFunction()  # default devices are such modes
    with torch.inference_mode(False), torch.no_grad(), no_functions, _no_dispatch():
        yield


def _no_dispatch() -> AbstractContextManager[Any]:
    if not (torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch()):
        return nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes  # it imports dynamo's tracing

    return _disable_current_modes()
