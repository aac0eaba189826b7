"""Tables of a call -> an error where one holds something else than when it was last seen, though torch noted no write.

A mode to look for such writes with: it reads every table at every call.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from typing import Final

from torch import Tensor

from maskflash.errors import ArgumentError
from maskflash.functions.fingerprint import contents
from maskflash.ground.identity import Watch, owner, state

ALWAYS: Final = os.environ.get("MASKFLASH_CHECK", "") not in ("", "0")
_MOST: Final = 1024  # tables

_seen: dict[object, tuple[bytes, Watch]] = {}  # digest of a table's contents by its state
_lock = threading.Lock()


def check(operation: str, tables: Iterable[tuple[str, Tensor]]) -> None:
    """Compare tables with what they held in earlier calls.

    Args:
        operation: what messages call it.
        tables: name and tensor of each; those of inference mode are always compared by what they hold.

    Raises:
        ArgumentError: one has been written to by something that torch doesn't see.
    """
    for name, table in tables:
        if table.is_inference():
            continue
        base = owner(table)
        key = id(base), *state(table)[1:]
        digest = hashlib.blake2b(contents(table), digest_size=16).digest()
        with _lock:
            known, _ = _seen.get(key, (None, None))
            if known is None:
                _keep(key, digest, base)
        if known is not None and known != digest:
            raise ArgumentError(
                f"{operation}: table {name} holds something else than in an earlier call, but torch has noted no write "
                "to it, so the analysis of what it held before would be used. Write to it through torch, not through "
                "numpy, .data or another process, or call mf.invalidate() after such a write"
            )


def forget() -> None:
    """Let all tables be as they are now."""
    with _lock:
        _seen.clear()


def _keep(key: object, digest: bytes, base: Tensor) -> None:
    for gone in [old for old, (_, watch) in _seen.items() if watch.expired()]:
        del _seen[gone]
    while len(_seen) >= _MOST:
        del _seen[next(iter(_seen))]
    _seen[key] = digest, Watch([base])
