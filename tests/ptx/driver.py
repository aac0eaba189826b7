"""Triton without a GPU: real launches of compiled kernels on CPU tensors, which end in the emulator.

    maskflash's launch -> Triton's binder, specialisation and compiler -> PTX -> Launcher -> Kernel.launch

Signature, constants and divisibility are those of a real launch, since Triton makes them from the very arguments. Three
things are ours: the driver, which says what device there is; the last stage of compiling, which keeps PTX where ptxas
would make machine code of it; and what maskflash asks of its device.

Works with Triton 3.6 and 3.7, whose drivers and launchers are called alike.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import run
from maskflash.backends.triton.tiles import SHARED_LIMITS
from tests.ptx.faults import Unsupported
from tests.ptx.global_memory import Buffer
from tests.ptx.machine import Kernel
from tests.ptx.orders import TEXT, Order
from tests.ptx.tensor_maps import TensorMap
from tests.ptx.values import Array

_FILL: Final = 0xFF  # of memory that holds no value: NaN as a float, -1 as an integer
_SCRATCH: Final = 2  # parameters after the kernel's own: memory that Triton may ask for, and its profiler

kernel = lru_cache(maxsize=256)(Kernel.of)


@dataclass(frozen=True, slots=True)
class Call:
    """One launch, which can be repeated, and changed to see what is noticed.

    Attributes:
        name: of the kernel.
        text: its PTX.
        grid: blocks.
        values: arguments by name, without constants.
        kinds: Triton's types of them: "*bf16", "i64", "tensordesc<bf16[64, 64], ...>".
        shared: bytes of shared memory of a block.
        maps: of the tensor descriptors among them, in order: the box that Triton copies, and its swizzle.
    """

    name: str
    text: str
    grid: int
    values: dict[str, Any]
    kinds: dict[str, str]
    shared: int
    maps: tuple[dict[str, Any], ...] = ()

    def run(
        self,
        text: str | None = None,
        shift: dict[str, int] | None = None,
        order: Order | None = None,
        maps: tuple[dict[str, Any], ...] | None = None,
        **changed: Any,
    ) -> None:
        """Launch it.

        Args:
            text: PTX instead of its own.
            shift: bytes by which tensors, by name, are worse aligned than they are.
            order: who goes on when several could, instead of the device's.
            maps: instead of its own.
            **changed: arguments instead of its own, by name.
        """
        shift, layouts = shift or {}, iter(self.maps if maps is None else maps)
        params: list[Buffer | TensorMap | int] = []
        for name, value in (self.values | changed).items():
            if self.kinds[name].startswith("tensordesc"):
                params += _descriptor(name, value, next(layouts))
            else:
                params.append(_parameter(name, self.kinds[name], value, shift.get(name, 0)))
        kernel(text or self.text).launch(self.grid, params + [0] * _SCRATCH, self.shared, order or DEVICE.order)


@dataclass(slots=True)
class Device:
    """The emulated device: compute capability times ten, where launches are kept, if anywhere, and their order."""

    arch: int
    calls: list[Call] | None = None
    order: Order = TEXT


DEVICE: Final = Device(0)  # none, until `install`
_empty = torch.empty
_without_value: dict[int, int] = {}  # address of a tensor that nobody has written -> its bytes


def install(arch: int) -> None:
    """From here on maskflash's "triton" backend takes CPU tensors, as if they lay on a device of this architecture.

    For a whole process: Triton decides once whether it compiles or interprets.
    """
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="maskflash-ptx-")  # other binaries under the same keys
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.driver import driver

    DEVICE.arch = arch
    driver.set_active(_Driver())
    CUDABackend.make_cubin = lambda self, src, metadata, options, capability: src.encode()
    gpu.unavailable = run.unavailable = lambda device: None
    gpu.arch = lambda device: DEVICE.arch
    gpu.name = lambda device: f"emulated sm_{DEVICE.arch}"
    torch.empty = _filled_empty


def _filled_empty(*sizes: Any, **options: Any) -> Tensor:
    """torch.empty, known to hold no value."""
    out = _empty(*sizes, **options)
    if out.device.type == "cpu" and out.numel() and out.is_contiguous():
        ctypes.memset(out.data_ptr(), _FILL, out.nbytes)
        _without_value[out.data_ptr()] = out.nbytes
    return out


class _Utilities:
    """What Triton asks of a device's own library."""

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
        """No module; the PTX as the function; registers, spills and most threads of a block."""
        return None, binary.decode(), 0, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMITS[DEVICE.arch], "multiprocessor_count": 108, "warpSize": 32}


class _Launcher:
    """The last step of a launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.names, self.kinds, self.shared = source.fn.arg_names, source.signature, metadata.shared
        self.maps = tuple(getattr(metadata, "tensordesc_meta", None) or ())

    def __call__(self, grid: int, second: int, third: int, stream: int, text: str, *rest: Any) -> None:
        """Rest: packed metadata, three hooks' worth of launch metadata, then the arguments in order."""
        if (second, third) != (1, 1):
            raise Unsupported("a grid of more than one dimension")
        given = dict(zip(self.names, rest[-len(self.names) :], strict=True))
        values = {name: value for name, value in given.items() if self.kinds[name] != "constexpr"}
        call = Call(text.split(".entry ")[1].split("(")[0], text, grid, values, self.kinds, self.shared, self.maps)
        if DEVICE.calls is not None:
            DEVICE.calls.append(call)
        call.run()
        for value in values.values():
            tensor = getattr(value, "base", value)
            if isinstance(tensor, Tensor):
                _forget_if_written(tensor)


class _Driver:
    """What Triton asks of a driver."""

    utils = _Utilities()
    launcher_cls = _Launcher

    @staticmethod
    def get_current_target() -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", DEVICE.arch, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_active_torch_device() -> torch.device:
        return torch.device("cpu")


def _parameter(name: str, kind: str, value: Any, shift: int) -> Buffer | int:
    """A tensor's memory, or the bits of a number."""
    if kind.startswith("*"):
        return _buffer(name, value, tuple(value.shape), value.stride(), shift)
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    if kind[0] in "iu" and kind[1:].isdigit():
        return int(value) & ((1 << int(kind[1:])) - 1)
    raise Unsupported(f"an argument of type {kind}")


def _buffer(name: str, tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], shift: int = 0) -> Buffer:
    empty, size = _holds_nothing(tensor), tensor.element_size()
    return Buffer(name, tensor.data_ptr(), shape, strides, size, empty=empty, shift=shift)


def _descriptor(name: str, value: Any, layout: dict[str, Any]) -> list[Buffer | TensorMap | int]:
    """A tensor descriptor as Triton's launcher expands it: a tensor map, the sizes, and the strides in elements."""
    shape, strides, size = tuple(value.shape), tuple(value.strides), layout["elem_size"]
    rounds = getattr(value, "round_f32_to_tf32", False)  # Triton 3.6 knows no such maps
    if layout["fp4_padded"] or rounds or value.padding != "zero":
        raise Unsupported("a descriptor of four bits, that rounds, or that fills with NaN")
    buffer = _buffer(name, value.base, shape, strides)
    steps = tuple(step * size for step in strides)
    box, swizzle = tuple(layout["block_size"]), (0, 32, 64, 128)[layout["swizzle"]]
    return [TensorMap(buffer, shape, steps, box, size, swizzle), *shape, *strides]


def _bytes(tensor: Tensor) -> Array:
    return np.frombuffer(memoryview((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())), np.uint8)


def _holds_nothing(tensor: Tensor) -> bool:
    """Whether it is all of what `torch.empty` gave, as it was: others may have that memory by now."""
    return _without_value.get(tensor.data_ptr()) == tensor.nbytes and bool((_bytes(tensor) == _FILL).all())


def _forget_if_written(tensor: Tensor) -> None:
    if math.prod(tensor.shape) and not _holds_nothing(tensor):
        _without_value.pop(tensor.data_ptr(), None)
