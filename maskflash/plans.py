"""Problems -> analyses, remembered until a length, a parameter or the contents of a table change."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from maskflash.blocks.problem import Problem
from maskflash.compiler import Analysis, Backend, analyse
from maskflash.expr.nodes import Expr

CAPACITY: Final = 64  # analyses; the least recently used goes first
MEMORY: Final = 1 << 30  # bytes of them; likewise, but the latest stays, however large


@dataclass(slots=True, eq=False)
class _Entry:
    """An analysis, its bytes when it was last weighed, and what tells when one of its tables dies."""

    analysis: Analysis
    nbytes: int
    alive: tuple[weakref.ref[Tensor], ...]


_lock = threading.RLock()  # of what follows; never held while a mask is analysed
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_turns: dict[Hashable, threading.Lock] = {}  # of threads that want an analysis which one of them is making
_latest: Hashable = None


def find(problem: Problem, backend: Backend) -> Analysis:
    """The analysis of a problem for a backend, made now or found; threads that want the same one make it once.

    A table counts as the same while it is the same tensor (or a view alike of it) at the same version, which every
    write through torch advances. Tensors of inference mode have no version: they are compared by content.
    """
    key = key_of(
        problem.expr,
        problem.inputs.params,
        problem.inputs.tables,
        problem.q_len,
        problem.kv_len,
        problem.batch,
        problem.heads,
        problem.block_size,
        problem.q_offset,
        problem.device,
        backend,
    )
    return get(key) or make(key, problem, backend)


def key_of(
    expr: Expr,
    params: Sequence[int],
    tables: Sequence[Tensor],
    q_len: int,
    kv_len: int,
    batch: int,
    heads: int,
    block_size: tuple[int, int],
    q_offset: int | Tensor,
    device: torch.device,
    backend: Backend,
) -> Hashable:
    """All that an analysis depends on; batch rows and heads count only where they are looked at."""
    per_row = isinstance(q_offset, Tensor)
    return (
        expr.text,
        backend,
        *params,
        q_len,
        kv_len,
        batch if per_row or "b" in expr.reads else 1,
        heads if "h" in expr.reads else 1,
        block_size,
        _fingerprint(q_offset) if per_row else q_offset,
        device,
        *map(_fingerprint, tables),
    )


def get(key: Hashable) -> Analysis | None:
    """The analysis stored under a key."""
    with _lock:
        entry = _entries.get(key)
        if entry is None:
            return None
        _entries.move_to_end(key)
        return entry.analysis


def make(key: Hashable, problem: Problem, backend: Backend) -> Analysis:
    """Analyse a problem, or wait for the thread that does, and store the result under its key."""
    with _lock:
        turn = _turns.setdefault(key, threading.Lock())
    with turn:
        found = get(key)
        if found is None:
            try:
                found = analyse(problem, backend)
                _keep(key, found, problem)
            finally:
                with _lock:
                    _turns.pop(key, None)
    return found


def invalidate(expressions: set[str]) -> None:
    """Forget the analyses of these expressions (canonical texts)."""
    with _lock:
        for key in [key for key in _entries if isinstance(key, tuple) and key[0] in expressions]:
            del _entries[key]


def _keep(key: Hashable, analysis: Analysis, problem: Problem) -> None:
    """Store an analysis, and drop those used least recently until count and bytes are within bounds."""
    global _latest
    tensors = problem.inputs.tables
    if isinstance(problem.q_offset, Tensor):
        tensors = (*tensors, problem.q_offset)
    with _lock:
        # A key holds ids, which a dead tensor's successor may inherit: so it goes when the first of them dies.
        alive = tuple(
            weakref.ref(_owner(tensor), lambda _: _forget(key)) for tensor in tensors if not tensor.is_inference()
        )
        if _latest in _entries:  # it has made schedules since
            _entries[_latest].nbytes = _entries[_latest].analysis.nbytes
        _entries[key], _latest = _Entry(analysis, analysis.nbytes, alive), key
        held = sum(entry.nbytes for entry in _entries.values())
        while len(_entries) > CAPACITY or (held > MEMORY and len(_entries) > 1):
            held -= _entries.popitem(last=False)[1].nbytes


def _forget(key: Hashable) -> None:
    with _lock:
        _entries.pop(key, None)


def _fingerprint(tensor: Tensor) -> Hashable:
    if tensor.is_inference():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
        return tensor.dtype, tensor.shape, hashlib.blake2b(content, digest_size=16).digest()
    place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return id(_owner(tensor)), tensor._version, place


def _owner(tensor: Tensor) -> Tensor:
    """The tensor whose version counts: a view shares its base's."""
    base = tensor._base
    return tensor if base is None else base
