"""A stand-in for a GPU: tensors that say they are on "cuda:0", and a mode that notes what a real one would wait for.

The mode runs on the CPU what is asked of these tensors.
"""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten
ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # item, nonzero, x[mask] and the like


class OnDevice(torch.Tensor):
    """A tensor of the stand-in."""

    @staticmethod
    def __new__(cls, memory):
        layout = {"strides": memory.stride(), "storage_offset": memory.storage_offset(), "dtype": memory.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, memory.shape, device=CUDA, **layout)

    def __init__(self, memory):
        self.memory = memory

    # What follows torch has, but it would look for a GPU's driver before it asks the mode.

    def __getitem__(self, index):
        if any(isinstance(x, torch.Tensor) for x in tree_leaves(index)):
            return aten.index.Tensor(self, list(index) if isinstance(index, tuple) else [index])
        return OnDevice(self.memory[index])

    def copy_(self, source, non_blocking=False):
        return aten.copy_.default(self, source, non_blocking)

    def nonzero(self):
        return aten.nonzero.default(self)

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor of a device that is not there any more")


class Device(TorchDispatchMode):
    """A stand-in for a GPU.

    Attributes:
        waits: what the host would have waited for, in order.
        copies: copies between host and device, in order.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.copies, self.pinned = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [isinstance(x, OnDevice) for x in tensors]
        wanted = kwargs.pop("device", None)
        pinned = kwargs.pop("pin_memory", False)
        to_device = wanted == CUDA if wanted is not None else any(here)
        name = func.overloadpacket.__name__
        if func in (aten.copy_.default, aten._to_copy.default):
            source, target = here[-1], here[0] if func is aten.copy_.default else to_device
            if source != target:
                self.copies.append("to host" if source else "to device")
                free = args[-1] is True or kwargs.get("non_blocking", False)
                if source or not (free and tensors[-1].untyped_storage().data_ptr() in self.pinned):
                    self.waits.append(name)
                to_device = target
        else:
            mixed = [tuple(x.shape) for x, at in zip(tensors, here, strict=True) if not at and x.ndim]
            assert not (any(here) and mixed), f"{name} of tensors here and there: {mixed}"
            masks = [x.dtype == torch.bool for x in tree_leaves(args[1])] if name.startswith("index_put") else []
            if any(here) and (ASKS & set(func.tags) or any(masks)):
                self.waits.append(name)
        result = func(*self.memory(args), **self.memory(kwargs))
        if pinned:
            self.pinned.add(result.untyped_storage().data_ptr())
        if not to_device or name == "_local_scalar_dense":
            return result
        if name.endswith("_") and isinstance(args[0], OnDevice):
            return args[0]
        return tree_map_only(torch.Tensor, OnDevice, result)

    @staticmethod
    def memory(values):
        return tree_map_only(OnDevice, lambda x: x.memory, values)


class Stream:
    """Notes the events it was made to wait for."""

    def __init__(self):
        self.waited = []

    def record_event(self):
        return SimpleNamespace(of=self)

    def wait_event(self, event):
        self.waited.append(event)
