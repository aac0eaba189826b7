"""Problems -> analyses, remembered until a length, a parameter or the contents of a table change."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

import torch
from torch import Tensor

from maskflash.blocks.problem import Problem
from maskflash.compiler import Analysis, Backend, analyse

CAPACITY: Final = 64  # analyses; the least recently used goes first

_lock = threading.RLock()
_analyses: OrderedDict[Hashable, tuple[Analysis, tuple[weakref.ref[Tensor], ...]]] = OrderedDict()


def find(problem: Problem, backend: Backend) -> Analysis:
    """The analysis of a problem for a backend, made now or found.

    A table counts as the same while it is the same tensor (or a view alike of it) at the same version, which every
    write through torch advances. Tensors of inference mode have no version: they are compared by content.
    """
    tensors = problem.inputs.tables
    if isinstance(problem.q_offset, Tensor):
        tensors = (*tensors, problem.q_offset)
    key = _key(problem, backend, tensors)
    with _lock:
        found = _analyses.get(key)
        if found is not None:
            _analyses.move_to_end(key)
            return found[0]
    analysis = analyse(problem, backend)
    with _lock:
        # A key holds ids, which a dead tensor's successor may inherit: so it goes when the first of them dies.
        alive = tuple(
            weakref.ref(_owner(tensor), lambda _: _forget(key)) for tensor in tensors if not tensor.is_inference()
        )
        _analyses[key] = analysis, alive
        while len(_analyses) > CAPACITY:
            _analyses.popitem(last=False)
    return analysis


def invalidate(expressions: set[str]) -> None:
    """Forget the analyses of these expressions (canonical texts)."""
    with _lock:
        for key in [key for key in _analyses if isinstance(key, tuple) and key[0] in expressions]:
            del _analyses[key]


def _forget(key: Hashable) -> None:
    with _lock:
        _analyses.pop(key, None)


def _key(problem: Problem, backend: Backend, tensors: tuple[Tensor, ...]) -> Hashable:
    offset = None if isinstance(problem.q_offset, Tensor) else problem.q_offset
    return (
        problem.expr.text,
        backend,
        problem.inputs.params,
        problem.q_len,
        problem.kv_len,
        problem.shape[:2],
        problem.block_size,
        offset,
        problem.device,
        tuple(_fingerprint(tensor) for tensor in tensors),
    )


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
