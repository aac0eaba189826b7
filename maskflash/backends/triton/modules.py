"""Source text -> an imported module, its text kept in a file under its content's hash.

What runs is the text at hand: the file is for those who read kernels, debuggers and profilers. It is written anew by
each process and never read, so a folder that can't be written, or that others may write to, changes nothing that runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Final

VARIABLE: Final = "MASKFLASH_CACHE_DIR"
_MOST: Final = 1024  # modules held; the oldest goes first

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


def load(source: str) -> ModuleType:
    """The module of a source text: the same module for the same text, made once in a process."""
    key = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    with _lock:
        module = _modules.get(key)
        if module is None:
            if len(_modules) >= _MOST:
                _forget(next(iter(_modules)))
            module = _modules[key] = _imported(f"maskflash_kernel_{key}", _stored(f"{key}.py", source), source)
        return module


def folder() -> Path:
    """Where modules are kept: $MASKFLASH_CACHE_DIR, else $XDG_CACHE_HOME/maskflash, else ~/.cache/maskflash.

    Raises:
        RuntimeError: there is no home directory.
    """
    override = os.environ.get(VARIABLE)
    if override:
        return Path(override).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (home if home.is_absolute() else Path.home() / ".cache") / "maskflash"  # relative ones are to be ignored


def write(path: Path, text: str) -> None:
    """Make a file that only its owner may read, in a folder of the same kind: whole, or not at all.

    Many processes may do this at once: each writes a draft of its own, and the last one moved is what stays.

    Raises:
        OSError: the folder can't be made or written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _stored(name: str, source: str) -> str:
    """The path of the file with this text; a name in angle brackets where no file can be."""
    try:
        path = folder() / name
        write(path, source)
    except (OSError, RuntimeError):  # read-only, full, not a folder, no home
        return f"<maskflash kernel {name}>"
    return os.fspath(path)


def _imported(name: str, path: str, source: str) -> ModuleType:
    spec = importlib.util.spec_from_loader(name, loader=None, origin=path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path
    # Triton asks `inspect` for a kernel's source: a line cache without a time of change answers from here for good.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _forget(key: str) -> None:
    module = _modules.pop(key)
    sys.modules.pop(module.__name__, None)
    linecache.cache.pop(str(module.__file__), None)
