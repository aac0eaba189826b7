"""A device -> whether Triton's kernels run on it, and how their work is spread over it.

The only module that imports triton, and only when it is first needed. Under TRITON_INTERPRET=1 the same kernels run on
CPU tensors, slowly: that is how they are tested without a GPU, and what "cpu" means here.

Unmeasured: `heads_in_cache` and `part_of_group` follow from what devices have, and have been timed on none.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from maskflash.backends.triton.tiles import AMD, Arch


@cache
def library() -> ModuleType:
    """Triton itself.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module("triton")


def unavailable(device: torch.device) -> str | None:
    """Why this backend can't serve tensors on a device, with the fix; None where it can."""
    try:
        triton = library()
    except ImportError:
        return "triton is not installed; `pip install triton` (Linux only)"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"its kernels run on CUDA tensors, got {device.type}; move q, k and v"
    found = arch(device)
    if isinstance(found, str):
        return None if found in AMD else f"of AMD's GPUs it serves {', '.join(AMD)}, got {found}"
    return None if found >= 80 else f"it needs compute capability 8.0 (Ampere) or later, got {found / 10}"


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def name(device: torch.device) -> str:
    """What kind of device it is: measured tiles hold for it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def arch(device: torch.device) -> Arch:
    """Compute capability times ten; of AMD's GPUs, which torch calls CUDA too, the name without its features."""
    if device.type != "cuda":
        return 80  # any family's tiles will do
    if torch.version.hip is not None:
        full: str = torch.cuda.get_device_properties(device).gcnArchName  # "gfx942:sramecc+:xnack-"
        return full.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_limit(device: torch.device) -> int | None:
    """Bytes of shared memory that one program may ask for; None for what the architecture has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


def heads_in_cache(device: torch.device, bytes_per_head: int, group: int, heads: int) -> int:
    """How many heads to run side by side: as many as leave half of the L2 cache to everything else."""
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(heads, group * (cache_bytes // 2 // max(bytes_per_head, 1))))


def part_of_group(device: torch.device, group: int, programs: int) -> int:
    """How many of a group's heads one dK/dV program sums over: all, unless that leaves processors idle."""
    if device.type != "cuda":
        return group if programs % 2 else 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    divisors = [n for n in range(group, 0, -1) if group % n == 0]
    return next((part for part in divisors if programs * (group // part) >= wanted), 1)


def precision(dtype: torch.dtype) -> str:
    """float32 products in full, unless torch's own setting asks for TF32, by its new name or by its old ones.

    Only one of AMD's architectures has TF32, so there it is always in full.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """The median of a few runs, after one that compiles."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    with current(device):  # whose clock it is
        found: float = library().testing.do_bench(function, warmup=10, rep=50, return_mode="median") / 1e3
    return found
