"""A kernel to run -> its tile: what fitted before in this process, else what was measured here, else the table's.

Measured tiles outlive the process: one small file for each, beside the kernels. All others are the table's, which has
only been compiled (see `tiles.py`), or what is left of one that did not fit the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import modules
from maskflash.backends.triton.signature import PassName
from maskflash.backends.triton.tiles import LEAST_RING, Tile, choose

_MOST: Final = 1024  # choices held; the oldest goes first, and costs a look at its file


@dataclass(frozen=True, slots=True)
class Case:
    """What a tile is chosen for.

    Attributes:
        device: where the kernel runs.
        pass_name: which.
        dtype: of the call.
        dims: its (D, Dv).
        block_size: of the map.
        mask: the mask as the kernel has it.
        strength: likewise the score, whether there is dropout, and keys in 8 bits; empty without all.
        of_pairs: real numbers that the score looks up for each pair.
        products: how those of float32 are computed, as Triton calls it.
    """

    device: torch.device
    pass_name: PassName
    dtype: torch.dtype
    dims: tuple[int, int]
    block_size: tuple[int, int]
    mask: str
    strength: str = ""
    of_pairs: int = 0
    products: str = "ieee"

    @property
    def key(self) -> list[str]:
        """What a measured tile holds for, in all processes: the kind of device, and the version of triton too."""
        return [
            gpu.name(self.device),
            gpu.library().__version__,
            self.pass_name,
            str(self.dtype),
            str(self.dims),
            str(self.block_size),
            self.mask,
            *([self.strength] if self.strength else []),
            *([self.products] if self.products != "ieee" else []),
        ]


@dataclass(frozen=True, slots=True)
class Choice:
    """A tile, and whether it was measured to be the fastest."""

    tile: Tile
    measured: bool


_known: dict[Case, Choice] = {}


def find(case: Case) -> Choice:
    """The choice for a case.

    Raises:
        BackendError: no row of the table serves it.
    """
    found = _known.get(case)
    if found is None:
        tile = _read(case)
        found = remember(case, tile or listed(case), measured=tile is not None)
    return found


def listed(case: Case) -> Tile:
    """The table's tile."""
    device = case.device
    shared_limit = gpu.shared_limit(device)
    kind = gpu.arch(device), case.pass_name, case.dtype, max(case.dims), case.block_size
    return choose(*kind, shared_limit, case.of_pairs)


def remember(case: Case, tile: Tile, *, measured: bool = False) -> Choice:
    """Make a tile the choice of this process."""
    if len(_known) >= _MOST:
        _known.pop(next(iter(_known)), None)
    choice = _known[case] = Choice(tile, measured)
    return choice


def keep(case: Case, tile: Tile) -> None:
    """Make a measured tile the choice here and, where the folder can be written, in later processes."""
    remember(case, tile, measured=True)
    with contextlib.suppress(OSError, RuntimeError):  # read-only, full, no home
        modules.write(_path(case), json.dumps({"key": case.key, "tile": asdict(tile)}, indent=1))


def _read(case: Case) -> Tile | None:
    """What a file says; a file that is not there, or broken, says nothing."""
    try:
        held = json.loads(_path(case).read_text(encoding="utf-8"))
        numbers: dict[str, Any] = {name: value and int(value) for name, value in held["tile"].items()}
        tile = Tile(**numbers)
        sound = all(side in (16, 32, 64, 128) for side in (tile.block_m, tile.block_n))
        own = listed(case)
        if own.consumers:  # warps and registers are those of its roles
            sound &= replace(tile, stages=own.stages) == own and LEAST_RING <= tile.stages <= 9
        else:
            sound &= tile.consumers == 0 and tile.warps in (4, 8)
            sound &= 1 <= tile.stages <= 9 and tile.registers in (None, *range(32, 256))
        return tile if sound and held["key"] == case.key else None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _path(case: Case) -> Path:
    name = hashlib.blake2b(json.dumps(case.key).encode(), digest_size=16).hexdigest()
    return modules.folder() / "tiles" / f"{name}.json"
