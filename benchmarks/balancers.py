"""A mask and a number of ranks -> which tokens each rank holds, as others lay them out; nothing of a plan's own search.

    contiguous        0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3
    head and tail     0 0 1 1 2 2 3 3 3 3 2 2 1 1 0 0       torch's _HeadTailLoadBalancer, the zigzag of rings
    round robin       each W lines, by visited tiles         torch's _PTRRLoadBalancer
    heap              chunks by area to the idlest rank       MagiAttention's MinHeapDispatchAlg
    heap, affine      the same, of the idler half the one     MagiAttention's ToppHeapDispatchAlg with IOUAffinity
                      that needs most of the chunk's keys

torch's classes are called themselves. MagiAttention needs a GPU to be imported: its two rules are written anew here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
    _HeadTailLoadBalancer,
    _PerDocumentHeadTailLoadBalancer,
    _PTRRLoadBalancer,
)

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import IntArray
from maskflash.parallel.needs import Needs
from maskflash.parallel.routes import Shards

CHUNKS: Final = (512, 2048)  # tokens; MagiAttention's examples have both
FINEST: Final = 128
_TOP: Final = 0.5  # of the ranks, among which affinity decides: the share in MagiAttention's own tests


@dataclass(frozen=True, eq=False)
class Layout:
    """What balancers are told of a mask.

    Attributes:
        needs: area and needed keys of each line.
        visited: (lines,) full and partial tiles of each line of 128 rows.
        documents: their lengths, where the mask is made of causal documents alone.
    """

    needs: Needs
    visited: IntArray
    documents: Sequence[int] | None = None


Balancer = Callable[[Layout, int], Shards | None]
"""Shards for so many ranks; None where the balancer refuses the sizes."""


def visited_tiles(block_map: BlockMap) -> IntArray:
    """Full and partial tiles of each line of rows, all batch rows and heads together: what a BlockMask's counts are."""
    runs, lines = block_map.rows, block_map.shape[2]
    line = np.repeat(np.arange(len(runs.offsets) - 1), np.diff(runs.offsets.numpy())) % lines
    found = np.zeros(lines, dtype=np.int64)
    np.add.at(found, line, (runs.stop - runs.start).numpy().astype(np.int64))
    return found


def contiguous(layout: Layout, ranks: int) -> Shards | None:
    """The sequence cut into equal parts."""
    return _equal_parts(np.arange(layout.needs.seq_len), ranks)


def head_tail(layout: Layout, ranks: int) -> Shards | None:
    """Of 2W parts the r-th and the r-th last, by torch's class."""
    if layout.needs.seq_len % (2 * ranks):
        return None
    return _equal_parts(_order(_HeadTailLoadBalancer(layout.needs.seq_len, ranks, "cpu")), ranks)


def per_document(layout: Layout, ranks: int) -> Shards | None:
    """The same inside each document: torch's class for one document at a time, and each rank has its part of all.

    torch 2.13 puts the documents' orders one after the other and cuts them in W: see `per_document_as_cut`. Later ones
    give each rank its part of every document, which is what is meant.
    """
    if not _divide(layout.documents, 2 * ranks):
        return None
    rank_of, start = np.empty(layout.needs.seq_len, dtype=np.int64), 0
    for length in layout.documents or ():
        order = _order(_PerDocumentHeadTailLoadBalancer([[length]], ranks, "cpu"))
        rank_of[start + order] = np.arange(length) // (length // ranks)
        start += length
    return _shards(rank_of, 1, ranks, layout.needs.seq_len)


def per_document_as_cut(layout: Layout, ranks: int) -> Shards | None:
    """Torch's per-document balancer as the torch that is installed cuts it."""
    if not _divide(layout.documents, 2 * ranks):
        return None
    return _equal_parts(_order(_PerDocumentHeadTailLoadBalancer([list(layout.documents or ())], ranks, "cpu")), ranks)


def round_robin(layout: Layout, ranks: int) -> Shards | None:
    """Lines of 128 rows by their visited tiles, dealt out forth and back, by torch's own function."""
    lines = len(layout.visited)
    if lines % ranks or layout.needs.seq_len % 128:
        return None
    groups = _PTRRLoadBalancer.ptrr_scheduling(torch.from_numpy(layout.visited), ranks).numpy()
    rank_of = np.empty(lines, dtype=np.int64)
    rank_of[groups.ravel()] = np.repeat(np.arange(ranks), lines // ranks)
    return _shards(rank_of, 128, ranks, layout.needs.seq_len)


def heap(chunk: int) -> Balancer:
    """Chunks from the largest area to the smallest, each to the rank with least, as many chunks to each rank."""

    def balance(layout: Layout, ranks: int) -> Shards | None:
        area = _areas(layout.needs, chunk)
        if len(area) % ranks or layout.needs.seq_len % chunk:
            return None
        room = [len(area) // ranks] * ranks
        rank_of = np.empty(len(area), dtype=np.int64)
        idlest = [(0, rank) for rank in range(ranks)]
        for number in np.argsort(-area, kind="stable").tolist():
            work, rank = heapq.heappop(idlest)
            rank_of[number] = rank
            room[rank] -= 1
            if room[rank]:
                heapq.heappush(idlest, (work + int(area[number]), rank))
        return _shards(rank_of, chunk, ranks, layout.needs.seq_len)

    return balance


def affine_heap(chunk: int) -> Balancer:
    """The same, but of the half of the ranks with least area the one whose chunks' keys meet the chunk's keys most."""

    def balance(layout: Layout, ranks: int) -> Shards | None:
        area = _areas(layout.needs, chunk)
        if len(area) % ranks or layout.needs.seq_len % chunk:
            return None
        most, room = max(1, math.ceil(ranks * _TOP)), np.full(ranks, len(area) // ranks)
        needed = _needed(layout.needs, chunk)
        work, keys = np.zeros(ranks, dtype=np.int64), np.zeros((ranks, len(area)))
        rank_of = np.empty(len(area), dtype=np.int64)
        for number in np.argsort(-area, kind="stable").tolist():
            open_ranks = np.flatnonzero(room)
            idle = open_ranks[np.argsort(work[open_ranks], kind="stable")[:most]]
            some = np.flatnonzero(needed[number])
            meeting = keys[idle[:, None], some] @ needed[number, some]
            rank = idle[np.argmax(meeting)]
            rank_of[number] = rank
            room[rank] -= 1
            work[rank] += area[number]
            keys[rank] += needed[number] > 0
        return _shards(rank_of, chunk, ranks, layout.needs.seq_len)

    return balance


BALANCERS: Final[dict[str, Balancer]] = {
    "contiguous": contiguous,
    "head and tail": head_tail,
    "per document": per_document,
    "per document, as cut": per_document_as_cut,
    "round robin": round_robin,
    **{f"heap, {chunk}": heap(chunk) for chunk in (FINEST, *CHUNKS)},
    **{f"affine heap, {chunk}": affine_heap(chunk) for chunk in CHUNKS},
}


def _order(balancer: Any) -> IntArray:
    """The tokens in a balancer's order."""
    found: IntArray = balancer._generate_indices().flatten().numpy().astype(np.int64)
    return found


def _divide(documents: Sequence[int] | None, parts: int) -> bool:
    """Whether there are documents, and each has as many tokens in each part."""
    return documents is not None and all(length % parts == 0 for length in documents)


def _equal_parts(order: IntArray, ranks: int) -> Shards:
    """Tokens in some order, cut into equal parts."""
    rank_of = np.empty(len(order), dtype=np.int64)
    rank_of[order] = np.arange(len(order)) // -(-len(order) // ranks)
    return _shards(rank_of, 1, ranks, len(order))


def _shards(rank_of: IntArray, unit: int, ranks: int, seq_len: int) -> Shards:
    """The ranges of each rank, from the rank of each unit of tokens."""
    first = np.concatenate(([0], np.flatnonzero(np.diff(rank_of)) + 1))
    start, stop = first * unit, np.append(first[1:] * unit, seq_len)
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for rank, begin, end in zip(rank_of[first].tolist(), start.tolist(), stop.tolist(), strict=True):
        found[rank].append((begin, end))
    return tuple(tuple(ranges) for ranges in found)


def _areas(needs: Needs, chunk: int) -> IntArray:
    """The area of each chunk of whole lines."""
    return np.add.reduceat(needs.area, np.arange(0, len(needs.area), max(1, chunk // needs.tile)))


def _needed(needs: Needs, chunk: int) -> np.ndarray[Any, Any]:
    """(chunks, chunks) float64: how many keys of each chunk the lines of another need together."""
    lines, chunks = max(1, chunk // needs.tile), -(-needs.seq_len // chunk)
    found, edges = np.zeros((chunks, chunks)), np.arange(chunks + 1) * chunk
    for number in range(chunks):
        start, stop = needs.of(np.arange(number * lines, min((number + 1) * lines, len(needs.area))))
        # Tokens before each edge: those of all ranges that begin before it, less what the last of them has beyond it.
        begun = np.searchsorted(start, edges)
        before = np.concatenate(([0], (stop - start).cumsum()))[begun]
        before -= (np.concatenate(([0], stop))[begun] - edges).clip(0)
        found[number] = np.diff(before)
    return found
