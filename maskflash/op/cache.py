"""Specs at the sizes of calls -> analyses, remembered until a length, a number or the contents of a table change."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.functions.fingerprint import contents
from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import expression
from maskflash.ground import copies
from maskflash.ground.identity import Watch, owner, state
from maskflash.op import checking, places
from maskflash.op.analyse import Analysis, analyse
from maskflash.op.spec import Backend, Spec

CAPACITY: Final = 64  # analyses; the least recently used goes first
MEMORY: Final = 1 << 30  # bytes of them; the latest stays, however large
_MOST_NAMES: Final = 5 * CAPACITY  # other names of analyses; the oldest goes first


@dataclass(slots=True, eq=False)
class _Entry:
    """An analysis, its bytes when last weighed, and what keeps the ids in its key from being given away."""

    analysis: Analysis
    nbytes: int
    watch: Watch


_lock = threading.RLock()  # of all that is kept here; nobody holds it while a mask is analysed
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_names: OrderedDict[Hashable, tuple[Hashable, Watch]] = OrderedDict()
"""Keys of entries by their other names: calls like one before, and the storages that backward is given."""
_sound: OrderedDict[Hashable, Watch] = OrderedDict()
"""Calls whose score function was found to look up what is there."""
_turns: dict[Hashable, threading.Lock] = {}  # of threads that want an analysis which one of them is making
_latest: Hashable = None  # key of the last analysis made
_forgotten = 0  # how often something was forgotten because someone asked for it


def find(spec: Spec, sizes: Sizes, *, saved: bool = False) -> Analysis:
    """The analysis of a spec, made now or found; threads that want the same one make it once.

    A table counts as the same while it is the same tensor (or a view alike of it) at the same version, which every
    write through torch advances. Tensors of inference mode have no version: they are compared by content.

    Args:
        spec: what is attended.
        sizes: the sizes of the call.
        saved: the tensors come from autograd. It has made sure that they are unchanged since forward, but may give out
            others of the same storage.
    """
    key = key_of(spec, sizes)
    found = _get(key)
    if found is None and saved:
        found = named(key_of(spec, sizes, saved=True))
    return _make(key, spec, sizes) if found is None else found


def key_of(spec: Spec, sizes: Sizes, *, saved: bool = False) -> Hashable:
    """All that an analysis depends on; batch rows and heads count only where they are looked at."""
    reads = expression(spec.expr).reads
    per_row = not (spec.q_offsets is None and spec.kv_offsets is None)
    return (
        spec.expr,
        spec.backend,
        *spec.block_size,
        *spec.params,
        sizes.q_len,
        sizes.kv_len,
        sizes.batch if per_row or "b" in reads else 1,
        sizes.heads if "h" in reads else 1,
        spec.q_offset,
        spec.kv_offset,
        sizes.device,
        saved,
        *[None if x is None else identity(x, saved) for x in spec.of_mask],
    )


def identity(tensor: Tensor, saved: bool = False) -> Hashable:
    """What tells a tensor from others and from itself after a write."""
    if tensor.is_inference():
        return tensor.dtype, tensor.shape, hashlib.blake2b(contents(tensor), digest_size=16).digest()
    if saved:
        place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        return tensor.untyped_storage()._cdata, tensor._version, place
    return id(owner(tensor)), *state(tensor)[1:]


def of_problem(problem: Problem, backend: Backend) -> Analysis:
    """The analysis that calls with this mask at these sizes will find."""
    sizes = Sizes(problem.q_len, problem.kv_len, problem.batch, problem.heads, problem.device)
    return find(Spec.of_problem(problem, backend), sizes)


def named(name: Hashable) -> Analysis | None:
    """The analysis that was given this name; None where there is none any more."""
    known = _names.get(name)
    return None if known is None else _get(known[0])


def note(name: Hashable, tensors: Iterable[Tensor], spec: Spec, sizes: Sizes) -> None:
    """Give the analysis of a spec another name.

    Args:
        name: all that the spec depends on; of tensors their `state`, from before the analysis was looked for.
        tensors: those.
        spec: of which `find` has made the analysis.
        sizes: the sizes of the call.
    """
    if any(table.is_inference() for table in spec.tables):
        return
    _name(name, key_of(spec, sizes), Watch(tensors))


def check_reads(spec: Spec, sizes: Sizes) -> None:
    """Check that what a spec's score looks up is there, unless a call like this one was found to be right.

    Raises:
        MaskIndexError: a visible pair looks up what a table doesn't have.
    """
    if not spec.score:
        return
    # Numbers in a floating-point table change with each step of training, and decide nothing here.
    whole = [table for table in spec.score_tables if not table.is_floating_point()]
    shapes = tuple([table.shape for table in spec.score_tables])
    decides = tuple([identity(table) for table in whole])
    key = key_of(spec, sizes), spec.score, *spec.score_params, shapes, decides
    known = _sound.get(key)
    if known is not None and not known.expired():
        return
    from maskflash.scores import reads

    score = spec.strength.score
    assert score is not None, "its text is not empty"
    reads.check(spec.problem(sizes), score.expr, score.inputs)
    with _lock:
        watch = Watch(owner(x) for x in (*whole, *spec.of_mask) if x is not None and not x.is_inference())
        _sound[key] = watch
        while len(_sound) > _MOST_NAMES:
            _sound.popitem(last=False)


def invalidate(expressions: set[str] | None = None) -> None:
    """Forget the analyses of these expressions (canonical texts), or all; and what was copied or seen of any table."""
    global _forgotten
    copies.forget()
    checking.forget()
    places.forget()
    with _lock:
        _forgotten += 1
        _sound.clear()
        for key in list(_entries):
            if expressions is None or (isinstance(key, tuple) and key[0] in expressions):
                _forget(key)


def epoch() -> int:
    """A number that is another one after each `invalidate`: in the keys of what others keep of tables."""
    return _forgotten


def _get(key: Hashable) -> Analysis | None:
    with _lock:
        try:
            _entries.move_to_end(key)
            return _entries[key].analysis
        except KeyError:
            return None


def _make(key: Hashable, spec: Spec, sizes: Sizes) -> Analysis:
    """Analyse, or wait for the thread that does."""
    with _lock:
        turn = _turns.setdefault(key, threading.Lock())
    with turn:
        found = _get(key)
        if found is None:
            try:
                with copies.lasting():
                    found = analyse(spec.problem(sizes), spec.backend)
                _keep(key, found, spec, sizes)
            finally:
                with _lock:
                    _turns.pop(key, None)
    return found


def _keep(key: Hashable, analysis: Analysis, spec: Spec, sizes: Sizes) -> None:
    """Store an analysis, and drop those used least recently until count and bytes are within bounds."""
    global _latest
    with _lock:
        _forget_the_gone()
        watch = Watch(owner(x) for x in spec.of_mask if x is not None and not x.is_inference())
        latest = _entries.get(_latest)
        if latest is not None:  # it has made schedules since
            latest.nbytes = latest.analysis.nbytes
        _entries[key] = _Entry(analysis, analysis.nbytes, watch)
        _latest = key
        _name(key_of(spec, sizes, saved=True), key, watch)
        nbytes = sum(entry.nbytes for entry in _entries.values())
        while len(_entries) > CAPACITY or (nbytes > MEMORY and len(_entries) > 1):
            oldest = next(iter(_entries))
            nbytes -= _entries[oldest].nbytes
            _forget(oldest)


def _forget_the_gone() -> None:
    """Drop what was made of tensors that nobody has any more."""
    while gone := [name for name, (_, watch) in _names.items() if watch.expired()]:  # a view keeps its base
        for name in gone:
            _names.pop(name)
    for key in [key for key, entry in _entries.items() if entry.watch.expired()]:
        _forget(key)


def _name(name: Hashable, key: Hashable, watch: Watch) -> None:
    with _lock:
        if key in _entries:
            _names[name] = key, watch
        while len(_names) > _MOST_NAMES:
            _names.popitem(last=False)


def _forget(key: Hashable) -> None:
    with _lock:
        _entries.pop(key, None)
        for name in [name for name, (known, _) in _names.items() if known == key]:
            del _names[name]
