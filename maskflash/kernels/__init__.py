"""A block map, q, k and v -> out, lse and gradients: by a module for each backend, which never import one another.

A backend is loaded when first asked for, `kernels.cpu` say: `import maskflash` costs next to nothing beside torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskflash.kernels import cpu as cpu
    from maskflash.kernels import triton as triton
else:

    def __getattr__(name: str) -> Any:
        if name in ("cpu", "triton"):
            return import_module(f"maskflash.kernels.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
