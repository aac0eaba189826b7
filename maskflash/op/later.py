"""A module that may never be imported -> one of ours, imported right after it: it costs nothing where it isn't used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def follow(module: str, ours: str) -> None:
    """Have one of our modules imported as soon as another has been.

    Args:
        module: its name; it need not exist.
        ours: the module to import after it, now if it is there already.
    """
    if module in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Finder(module, ours))


class _Finder(MetaPathFinder):
    """Finds one module as others would, once, and has it followed by ours."""

    def __init__(self, module: str, ours: str) -> None:
        self.module = module
        self.ours = ours

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, whose loader then imports ours."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(self.ours)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
