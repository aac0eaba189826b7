"""Problems -> analyses, remembered until a length, a parameter or the contents of a table change."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.functions.fingerprint import contents
from maskflash.ground import copies
from maskflash.ground.copies import lasting
from maskflash.ground.identity import Watch, owner, state
from maskflash.op import checking
from maskflash.op.analyse import Analysis, Backend, analyse

CAPACITY: Final = 64  # analyses; the least recently used goes first
_CALLS: Final = 4 * CAPACITY  # remembered: the keys of their analyses
MEMORY: Final = 1 << 30  # bytes of them; likewise, but the latest stays, however large


@dataclass(slots=True, eq=False)
class _Entry:
    """An analysis, its bytes when last weighed, its key for saved tensors, and what keeps the addresses in its keys."""

    analysis: Analysis
    nbytes: int
    saved_key: Hashable
    watch: Watch


_lock = threading.RLock()  # of what follows; never held while a mask is analysed
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_keys: dict[Hashable, Hashable] = {}  # of entries, by their keys for saved tensors
_calls: dict[Hashable, tuple[Hashable, Watch]] = {}  # keys, by calls
_turns: dict[Hashable, threading.Lock] = {}  # of threads that want an analysis which one of them is making
_latest: Hashable = None  # key of the last analysis made


def find(problem: Problem, backend: Backend, *, saved: bool = False) -> Analysis:
    """The analysis of a problem for a backend, made now or found; threads that want the same one make it once.

    A table counts as the same while it is the same tensor (or a view alike of it) at the same version, which every
    write through torch advances. Tensors of inference mode have no version: they are compared by content.

    With `saved` the tensors come from autograd, which has made sure that they are unchanged since forward, but may
    give out others of the same storage.
    """
    key = _key(problem, backend)
    found = _get(key)
    if found is None and saved:
        found = _get(_keys.get(_key(problem, backend, saved=True)))
    return _make(key, problem, backend) if found is None else found


def again(call: Hashable) -> Analysis | None:
    """The analysis of a call like one before, as `note` was told; None where it has to be looked for."""
    known = _calls.get(call)
    return None if known is None else _get(known[0])


def note(call: Hashable, tensors: Sequence[Tensor], problem: Problem, backend: Backend) -> None:
    """Have `again` find the analysis of a problem.

    Args:
        call: all that the problem depends on; of tensors their `state`, from before the analysis was looked for.
        tensors: those.
        problem: of which `find` has made the analysis.
        backend: it was made for.
    """
    if any(tensor.is_inference() for tensor in problem.inputs.tables):
        return
    with _lock:
        if len(_calls) >= _CALLS:
            _calls.clear()
        _calls[call] = _key(problem, backend), Watch(tensors)


def invalidate(expressions: set[str] | None = None) -> None:
    """Forget the analyses of these expressions (canonical texts), or all; and what was copied or seen of any table."""
    copies.forget()
    checking.forget()
    with _lock:
        for key in list(_entries):
            if expressions is None or (isinstance(key, tuple) and key[0] in expressions):
                _forget(key)


def _get(key: Hashable) -> Analysis | None:
    with _lock:
        try:
            _entries.move_to_end(key)
            return _entries[key].analysis
        except KeyError:
            return None


def _make(key: Hashable, problem: Problem, backend: Backend) -> Analysis:
    """Analyse, or wait for the thread that does."""
    with _lock:
        turn = _turns.setdefault(key, threading.Lock())
    with turn:
        found = _get(key)
        if found is None:
            try:
                with lasting():
                    found = analyse(problem, backend)
                _keep(key, found, problem, backend)
            finally:
                with _lock:
                    _turns.pop(key, None)
    return found


def _keep(key: Hashable, analysis: Analysis, problem: Problem, backend: Backend) -> None:
    """Store an analysis, and drop those used least recently until count and bytes are within bounds."""
    global _latest
    tensors = problem.inputs.tables
    if isinstance(problem.q_offset, Tensor):
        tensors = (*tensors, problem.q_offset)
    with _lock:
        while stale := [call for call, (_, watch) in _calls.items() if watch.expired()]:  # a view keeps its base
            for call in stale:
                del _calls[call]
        for gone in [old for old, entry in _entries.items() if entry.watch.expired()]:
            _forget(gone)
        counted = [tensor for tensor in tensors if not tensor.is_inference()]
        watch = Watch(map(owner, counted))
        latest = _entries.get(_latest)
        if latest is not None:  # it has made schedules since
            latest.nbytes = latest.analysis.nbytes
        saved_key = _key(problem, backend, saved=True)
        _entries[key] = _Entry(analysis, analysis.nbytes, saved_key, watch)
        _keys[saved_key] = _latest = key
        nbytes = sum(entry.nbytes for entry in _entries.values())
        while len(_entries) > CAPACITY or (nbytes > MEMORY and len(_entries) > 1):
            oldest, entry = _entries.popitem(last=False)
            nbytes -= entry.nbytes
            _forget_saved(oldest, entry)


def _forget(key: Hashable) -> None:
    with _lock:
        entry = _entries.pop(key, None)
        if entry is not None:
            _forget_saved(key, entry)


def _forget_saved(key: Hashable, entry: _Entry) -> None:
    if _keys.get(entry.saved_key) == key:
        del _keys[entry.saved_key]


def _key(problem: Problem, backend: Backend, *, saved: bool = False) -> Hashable:
    """All that an analysis depends on; batch rows and heads count only where they are looked at."""
    reads, offset = problem.expr.reads, problem.q_offset
    per_row = isinstance(offset, Tensor)
    return (
        problem.expr.text,
        backend,
        *problem.expr.coded(problem.inputs.params),
        problem.q_len,
        problem.kv_len,
        problem.batch if per_row or "b" in reads else 1,
        problem.heads if "h" in reads else 1,
        problem.block_size,
        _fingerprint(offset, saved) if isinstance(offset, Tensor) else offset,
        problem.device,
        *[_fingerprint(table, saved) for table in problem.inputs.tables],
    )


def _fingerprint(tensor: Tensor, saved: bool) -> Hashable:
    if tensor.is_inference():
        return tensor.dtype, tensor.shape, hashlib.blake2b(contents(tensor), digest_size=16).digest()
    if saved:
        place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        return tensor.untyped_storage()._cdata, tensor._version, place
    return id(owner(tensor)), *state(tensor)[1:]
