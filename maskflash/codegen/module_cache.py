"""Source text -> an imported module, kept in files under its content's hash.

Triton reads a kernel's source from its file, so a module has to lie in one. Files are private to the user: importing
one runs it, so whatever others could have written is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Final

from maskflash.errors import BackendError

VARIABLE: Final = "MASKFLASH_CACHE_DIR"

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


def load(source: str) -> ModuleType:
    """The module of a source text: the same module for the same text, made once in a process.

    Raises:
        BackendError: the folder or the entry belongs to somebody else, or others may write to it.
    """
    name = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    with _lock:
        module = _modules.get(name)
        if module is None:
            module = _modules[name] = _imported(name, _stored(folder() / f"{name}.py", source))
        return module


def folder() -> Path:
    """Where modules are kept: $MASKFLASH_CACHE_DIR, else $XDG_CACHE_HOME/maskflash, else ~/.cache/maskflash."""
    override = os.environ.get(VARIABLE)
    if override:
        return Path(override)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "maskflash"


def _stored(path: Path, source: str) -> Path:
    """The file with this text: as it is if it holds it, else written whole and moved into place."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_shared(path.parent)
    try:
        _refuse_shared(path)
        if path.read_text(encoding="utf-8") == source:
            return path
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    # Many processes may do this at once: each writes its own file, and the last move wins with the same text.
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return path


def _refuse_shared(path: Path) -> None:
    """An error unless the path is the user's own and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BackendError(
            f"kernel cache: {path} is a link, belongs to another user, or others may write to it; importing it could "
            f"run foreign code. Make it your own (chmod go-w), or set {VARIABLE} to a private folder"
        )


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"maskflash_kernel_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
