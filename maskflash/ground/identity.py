"""A tensor -> what tells it from all others, and from itself once it has been written to or given other memory.

Ids and addresses are given away again, so whoever keeps them has to know that the tensor is still there. Weak
references won't do: torch refuses to exchange the contents of tensors that have one, which is how some modules load
their state. So a tensor is kept, once for all who watch it, and is taken for gone when nobody else has it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_ONLY_OURS: Final = 2  # references: the one that is kept, and the argument of what counts them


def state(tensor: Tensor) -> tuple[Any, ...]:
    """The tensor, its version, which every write through torch advances, its memory and how it is laid out.

    Not for tensors of inference mode, which have no version.
    """
    place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return id(tensor), tensor._version, tensor.untyped_storage()._cdata, *place


def owner(tensor: Tensor) -> Tensor:
    """The tensor whose version counts: a view shares its base's."""
    base = tensor._base
    return tensor if base is None else base


class Watch:
    """Keeps the ids of tensors, and the addresses of their memory, from being given away."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        held = list(tensors)
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in held]
        self._ids = [id(tensor) for tensor in held]
        with _lock:
            for tensor in held:
                _kept.setdefault(id(tensor), _Kept(tensor)).watches += 1

    def expired(self) -> bool:
        """Whether nobody else has one of the tensors any more."""
        with _lock:
            return any(
                sys.getrefcount(_kept[name].tensor) <= _ONLY_OURS and _kept[name].tensor._use_count() == 1  # type: ignore[attr-defined]
                for name in self._ids
            )

    def __del__(self) -> None:
        with _lock:
            for name in self._ids:
                _kept[name].watches -= 1
                if not _kept[name].watches:
                    del _kept[name]


@dataclass(slots=True, eq=False)
class _Kept:
    """A tensor, and how many watch it."""

    tensor: Tensor
    watches: int = 0


_kept: dict[int, _Kept] = {}  # by id
_lock = threading.RLock()  # a watch may end while another begins
