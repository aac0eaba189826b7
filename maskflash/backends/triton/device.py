"""A device -> whether Triton's kernels run on it, and how their work is spread over it.

The only module that imports triton, and only when it is first needed. Under TRITON_INTERPRET=1 the same kernels run on
CPU tensors, slowly: that is how they are tested without a GPU, and what "cpu" means here.

Unmeasured: `heads_in_cache`, `part_of_group` and `programs` follow from what devices have, and have been timed on none.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, Final

import torch

from maskflash.backends.triton.tiles import AMD, SHARED_LIMITS, Arch
from maskflash.errors import BackendError
from maskflash.ground.transfer import capturing
from maskflash.scores.strength import Precision

_ADA: Final = 89  # the first compute capability, times ten, with e4m3


@cache
def library() -> ModuleType:
    """Triton itself.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module("triton")


def missing() -> str | None:
    """That Triton is not installed, with the fix; None where it is."""
    try:
        library()
    except ImportError:
        return "triton is not installed; torch for GPUs brings it along, else `pip install 'triton>=3.6'` (Linux only)"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why this backend can't serve tensors on a device, with the fix; None where it can."""
    if reason := missing():
        return reason
    if interprets() or _Compiling.arch:
        return None
    if device.type != "cuda":
        return f"its kernels run on CUDA tensors, got {device.type}; move q, k and v"
    found = arch(device)
    if isinstance(found, str):
        return None if found in AMD else f"of AMD's GPUs it serves {', '.join(AMD)}, got {found}"
    return None if found >= 80 else f"it needs compute capability 8.0 (Ampere) or later, got {found / 10}"


def interprets() -> bool:
    """Whether kernels are interpreted, on the CPU."""
    return bool(library().knobs.runtime.interpret)


def without_8_bits(device: torch.device) -> str | None:
    """Why kernels can't read float8_e4m3fn on a device, with the fix; None where they can."""
    if interprets():
        return None
    found = arch(device)
    if isinstance(found, str):
        return f"on AMD's GPUs no kernel with it has been compiled, got {found}; widen the pools to q's dtype"
    if found >= _ADA:
        return None
    return f"it needs compute capability 8.9 (Ada) or later, got {found / 10}; widen the pools to q's dtype"


def without_products_in_8_bits(device: torch.device) -> str | None:
    """Why a device has no products of 8 bits (e4m3), with the fix; None where it has."""
    if interprets():
        return "Triton's interpreter does not round to e4m3 as devices do; leave precision out"
    found = arch(device)
    if isinstance(found, str):
        return f"its kernels have 8-bit products on NVIDIA's GPUs alone, got {found}; leave precision out"
    if found >= _ADA:
        return None
    return f"it needs compute capability 8.9 (Ada, Hopper) or later, got {found / 10}; leave precision out"


def compile_only(arch: int) -> None:
    """From now on in this process, compile kernels for an architecture, and run none: calls take tensors of the CPU.

    What is compiled lies in Triton's cache on disk, under the key that a process on such a device looks for: it is
    made of the text, the arguments' types, triton itself and the architecture.

    Args:
        arch: compute capability times ten, one of `SHARED_LIMITS`.
    """
    library().runtime.driver.set_active(_NoDevice(arch))
    _Compiling.arch = arch


class _Compiling:
    """The architecture that is compiled for where nothing runs; None where kernels run."""

    arch: int | None = None


class _NoDevice:
    """A driver as Triton asks for one: it knows its target, loads no kernel and launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = self

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMITS[self.arch]}

    def load_binary(self, *kernel: Any) -> tuple[object, None, int, int, int]:
        return self, None, 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, *kernel: Any) -> Callable[..., None]:
        return lambda *arguments: None


@contextlib.contextmanager
def asked_for() -> Iterator[list[bool]]:
    """The kernels that Triton is asked for meanwhile and this process doesn't have: whether each lay on disk."""
    knobs, found = library().knobs.compilation, []
    before = knobs.listener
    knobs.listener = lambda *, cache_hit, **rest: found.append(cache_hit)
    try:
        yield found
    finally:
        knobs.listener = before


def kept_in() -> str:
    """The folder of Triton's cache on disk."""
    return str(library().knobs.cache.dir)


def without_gluon() -> str | None:
    """That this Triton has not what `templates/hopper.py.jinja` is written in; None where it has."""
    try:
        importlib.import_module(_GLUON)
    except ImportError:
        return f"it needs Triton 3.6 or later with Gluon, got {library().__version__}"
    return None


_GLUON: Final = "triton.experimental.gluon.nvidia.hopper"


def described(dtype: torch.dtype, rows: int, columns: int) -> tuple[list[int], Any]:
    """What is copied at once of a tensor (B, heads, tokens, n): a block, and its layout in shared memory."""
    language = importlib.import_module("triton.experimental.gluon.language")
    block = [1, 1, rows, columns]
    kind = {torch.float16: language.float16, torch.bfloat16: language.bfloat16}[dtype]
    return block, language.NVMMASharedLayout.get_default_for(block, kind)


def descriptor(x: torch.Tensor, rows: int, columns: int) -> Any:
    """A tensor map of a tensor (B, heads, tokens, n): copies are `rows` of one head, `columns` numbers of each."""
    block, layout = described(x.dtype, rows, columns)
    # A dimension of one element may have any step, of which the driver may refuse some: it gets one of a whole vector.
    steps = [step if n > 1 else x.shape[3] for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return importlib.import_module(_GLUON).TensorDescriptor(x, list(x.shape), [*steps, 1], block, layout)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, on its current stream.

    While that stream records a CUDA graph, what would compile raises BackendError.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return _recording(device) if capturing(device) else torch.cuda.device(device)


@contextlib.contextmanager
def _recording(device: torch.device) -> Iterator[None]:
    """Launches into a CUDA graph. To load a kernel the driver allocates memory, which a capture forbids."""
    runtime = library().knobs.runtime
    before = runtime.jit_cache_hook

    def refuse(**asked: Any) -> Any:
        if capturing(device):  # other threads may compile
            raise BackendError(
                "attention: a CUDA graph is being captured, and a kernel of this call has not run yet with such "
                "tensors; run the same call once before the capture, with backward if the graph has it, or `warm` "
                "the op for it"
            )
        return before(**asked) if before else None

    runtime.jit_cache_hook = refuse
    try:
        with torch.cuda.device(device):
            yield
    finally:
        runtime.jit_cache_hook = before


def is_too_large(error: Exception) -> bool:
    """Whether an error of a compilation or a launch says that a tile asks too much: a smaller one may pass."""
    errors = library().runtime.errors
    if isinstance(error, (errors.OutOfResources, errors.PTXASError)):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _TOO_LARGE)


# A pass of Triton's that gave a kernel up; the driver's CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES.
_TOO_LARGE: Final = ("PassManager::run failed", "too many resources requested for launch")


def name(device: torch.device) -> str:
    """What kind of device it is: measured tiles hold for it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def arch(device: torch.device) -> Arch:
    """Compute capability times ten; of AMD's GPUs, which torch calls CUDA too, the name without its features."""
    if device.type != "cuda":
        return _Compiling.arch or 80  # interpreted: any family's tiles will do
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
    """How many heads to run side by side: as many as leave half of the L2 cache to everything else.

    A group at least. Its heads read the same keys, tile after tile, so what one of them has loaded serves the others
    even where all keys of the sequence don't fit.
    """
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(heads, group * max(1, cache_bytes // 2 // max(bytes_per_head, 1)))


def part_of_group(device: torch.device, group: int, programs: int) -> int:
    """How many of a group's heads one dK/dV program sums over: all, unless that leaves processors idle."""
    if device.type != "cuda":
        return group if programs % 2 else 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    divisors = [n for n in range(group, 0, -1) if group % n == 0]
    return next((part for part in divisors if programs * (group // part) >= wanted), 1)


def programs(device: torch.device) -> int:
    """How many programs should share the keys of few rows: two for each processor, so that one loads as one waits."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype, asked: Precision = "full") -> str:
    """float32 products in full, unless a call asks for three of TF32, or torch's own setting for one.

    torch's setting goes by its new name or by its old ones. Only one of AMD's architectures has TF32, so there products
    are always in full.

    Raises:
        BackendError: three of TF32 are asked for, of another dtype or on AMD's GPUs.
    """
    amd = torch.version.hip is not None
    if asked == "tf32x3":
        if dtype != torch.float32 or amd:
            got = "AMD's" if amd else str(dtype).removeprefix("torch.")
            raise BackendError(
                'attention: precision="tf32x3" can\'t serve this call: it is for float32, whose products have no '
                f"tensor cores otherwise, on NVIDIA's GPUs, got {got}; leave precision out"
            )
        return asked
    if dtype != torch.float32 or amd:
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
