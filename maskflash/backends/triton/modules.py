"""Source text -> an imported module, its text kept in a file under its content's hash.

What runs is the text at hand, never what a file says: the file is for those who read kernels, debuggers and profilers.
So a folder that can't be written costs nothing else. A file that somebody else could have written is still refused:
whoever reads a kernel should read the one that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import linecache
import os
import re
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Final

from maskflash.errors import BackendError

VARIABLE: Final = "MASKFLASH_CACHE_DIR"
_DRAFT: Final = re.compile(r"[0-9a-f]{32}.*\.tmp")
_ABANDONED: Final = 24 * 3600.0  # seconds after which no process writes a draft any more

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


def load(source: str) -> ModuleType:
    """The module of a source text: the same module for the same text, made once in a process.

    Raises:
        BackendError: the folder or the entry belongs to somebody else, or others may write to it.
    """
    key = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    with _lock:
        module = _modules.get(key)
        if module is None:
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


def _stored(name: str, source: str) -> str:
    """The path of the file with this text, written if need be; a name in angle brackets where no file can be."""
    try:
        path = folder() / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_shared_folder(path.parent)
        if _read(path, len(source.encode())) != source:
            _write(path, source)
    except (OSError, RuntimeError) as error:  # read-only, full, not a folder, no home
        if isinstance(error, BackendError):
            raise
        return f"<maskflash kernel {name}>"
    return os.fspath(path)


def _read(path: Path, size: int) -> str | None:
    """What an entry of so many bytes says; None where it is missing, longer or no text."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise (_refusal(path, "is a link") if path.is_symlink() else error) from None
    try:
        status = os.fstat(handle)  # of what was opened, whatever the path means by now
        _refuse_shared(path, status)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(path, "is no file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            found = file.read(size + 1)
        return found.decode() if len(found) <= size else None
    except UnicodeDecodeError:
        return None
    finally:
        os.close(handle)


def _write(path: Path, source: str) -> None:
    """Many processes may do this at once: each writes its own draft, and the last move wins with the same text."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source.encode())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    _clear(path.parent)


def _clear(kept: Path) -> None:
    """Remove drafts of processes that were killed while they wrote."""
    for draft in kept.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if _DRAFT.match(draft.name) and time.time() - draft.lstat().st_mtime > _ABANDONED:
                draft.unlink()


def _refuse_shared_folder(path: Path) -> None:
    """An error unless the folder is private; it may be reached by a link, if that is the user's own."""
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode) and hasattr(os, "getuid") and link.st_uid != os.getuid():
        raise _refusal(path, "is another user's link")
    _refuse_shared(path, path.stat())


def _refuse_shared(path: Path, status: os.stat_result) -> None:
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise _refusal(path, "belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refusal(path, "may be written by others")


def _refusal(path: Path, why: str) -> BackendError:
    return BackendError(
        f"kernel cache: {path} {why}, so its kernels may not be yours. Make it your own (chmod go-w), remove it, or "
        f"set {VARIABLE} to a private folder"
    )


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
