"""Tiles measured on this machine -> one small file for each choice, beside the cached kernels.

A choice holds for one device, version of triton, pass, dtype, head dim and mask structure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from maskflash.backends.triton import modules
from maskflash.backends.triton.tiles import Tile

Key = tuple[str, ...]

_known: dict[Key, Tile | None] = {}


def find(key: Key) -> Tile | None:
    """The choice for a key, made in this process or kept by an earlier one."""
    if key not in _known:
        _known[key] = _read(key)
    return _known[key]


def keep(key: Key, tile: Tile) -> None:
    """Remember a choice, here and, where the folder can be written, for later processes."""
    _known[key] = tile
    with contextlib.suppress(OSError, RuntimeError):  # read-only, full, no home
        path = _path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"key": key, "tile": asdict(tile)}, file, indent=1)
        os.replace(draft, path)


def candidates(tile: Tile) -> Iterable[Tile]:
    """The table's tile and its neighbours: one thing changed at a time."""
    yield tile
    for stages in (tile.stages - 1, tile.stages + 1):
        if stages:
            yield replace(tile, stages=stages)
    yield replace(tile, warps=4 if tile.warps == 8 else 8)
    for side in ("block_m", "block_n"):
        tokens = getattr(tile, side)
        if tokens > 16:
            yield replace(tile, **{side: tokens // 2})
        if tokens < 128:
            yield replace(tile, **{side: tokens * 2})


def _read(key: Key) -> Tile | None:
    """What a file says; a file that is not there, or broken, says nothing."""
    try:
        held = json.loads(_path(key).read_text(encoding="utf-8"))
        tile = Tile(**{name: int(value) for name, value in held["tile"].items()})
        sides = tile.block_m, tile.block_n
        sound = all(side in (16, 32, 64, 128) for side in sides) and tile.warps in (4, 8) and 1 <= tile.stages <= 9
        return tile if sound and tuple(held["key"]) == key else None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _path(key: Key) -> Path:
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    return modules.folder() / "tiles" / f"{name}.json"
