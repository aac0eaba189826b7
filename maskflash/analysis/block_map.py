"""Turns the kinds of a mask's tiles into a BlockMap: runs of equal tiles, by rows for forward, by columns for backward.

A tile is skip (no pair of it is visible), full (every pair inside the lengths is) or partial. Runs leave the
skipped tiles out and merge neighbours of one kind, so a map's memory follows the mask's boundary, not its area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from maskflash.analysis.runs import FULL, PARTIAL, SKIP, Runs
from maskflash.errors import ArgumentError
from maskflash.ground import arguments, html, transfer

_TEXT_SIDE: Final = 32  # cells of a picture; larger maps are shrunk to at most this
_DRAWN_SIDE: Final = 64  # of one in a notebook
_SHADES: Final = "·▒█"  # by kind


@dataclass(frozen=True, slots=True, eq=False)
class BlockMap:
    """Which tiles of a (B, H, q_len, kv_len) mask to visit, and which of these need the mask itself.

    Attributes:
        q_len: rows of the mask, in tokens.
        kv_len: columns of the mask, in tokens.
        block_size: (bq, bkv), a tile's rows and columns in tokens; the last tile may be ragged.
        shape: (B, H, nQ, nKV) in tiles; B or H is 1 where the mask does not look at it.
        rows: runs of column tiles along each row of tiles (what forward and dQ walk).
        columns: runs of row tiles along each column of tiles (what dK and dV walk).
    """

    q_len: int
    kv_len: int
    block_size: tuple[int, int]
    shape: tuple[int, int, int, int]
    rows: Runs
    columns: Runs

    @staticmethod
    def from_kinds(kinds: Tensor, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMap:
        """Builds the map from every tile's kind.

        Args:
            kinds: (B, H, nQ, nKV) int8, 0 skip, 1 partial, 2 full.
            q_len: rows in tokens; nQ is ceil(q_len / bq) and may be 0.
            kv_len: columns in tokens; nKV is ceil(kv_len / bkv) and may be 0.
            block_size: (bq, bkv) in tokens.

        Returns:
            The map, on the device of `kinds`.

        Raises:
            ArgumentTypeError: they are no integers.
            ArgumentError: the lattice does not fit the lengths, or holds another number.
        """
        operation = "BlockMap.from_kinds"
        kinds = arguments.int_table(operation, "kinds", kinds, range(9))
        arguments.held(operation, "kinds", kinds)
        rows, columns = arguments.block_size(operation, block_size)
        q_len, kv_len = (
            arguments.integer(operation, name, length) for name, length in (("q_len", q_len), ("kv_len", kv_len))
        )
        expected = -(-q_len // rows), -(-kv_len // columns)
        if kinds.ndim != 4 or tuple(kinds.shape[2:]) != expected:
            raise ArgumentError(
                f"{operation}: kinds has shape {tuple(kinds.shape)}, "
                f"expected (B, H, {expected[0]}, {expected[1]}) for {q_len} x {kv_len} tokens "
                f"in tiles of {rows} x {columns}"
            )
        low, high = (int(end) for end in torch.aminmax(kinds)) if kinds.numel() else (SKIP, FULL)
        if low < SKIP or high > FULL:
            wrong = low if low < SKIP else high
            raise ArgumentError(f"{operation}: kinds holds {wrong}, expected 0 (skip), 1 (partial) or 2 (full)")
        batch, heads, n_q, n_kv = kinds.shape
        return BlockMap(
            q_len=q_len,
            kv_len=kv_len,
            block_size=(rows, columns),
            shape=(batch, heads, n_q, n_kv),
            rows=Runs.from_lattice(kinds.reshape(batch * heads * n_q, n_kv)),
            columns=Runs.from_lattice(kinds.transpose(2, 3).reshape(batch * heads * n_kv, n_q)),
        )

    def kinds(self) -> Tensor:
        """Every tile's kind: (B, H, nQ, nKV) int8, 0 skip, 1 partial, 2 full. Materialised: for people and tests."""
        return self.rows.lattice(self.shape[3]).reshape(self.shape)

    def turned(self) -> BlockMap:
        """The map with the roles of rows and columns swapped."""
        (batch, heads, n_q, n_kv), (rows, columns) = self.shape, self.block_size
        shape = batch, heads, n_kv, n_q
        return BlockMap(self.kv_len, self.q_len, (columns, rows), shape, rows=self.columns, columns=self.rows)

    def partial_tiles(self) -> Tensor:
        """(b, h, i, j) of every partial tile: (partial, 4) int64, ordered by row of tiles."""
        _, heads, n_q, _ = self.shape
        line, j = self.rows.tiles(full=False)
        row = line // max(n_q, 1)
        return torch.stack((row // heads, row % heads, line % max(n_q, 1), j), dim=1)

    @property
    def counts(self) -> dict[str, int]:
        """How many tiles are full, partial and skip."""
        length = self.rows.stop - self.rows.start
        full = int(length[self.rows.full].sum())
        partial = int(length.sum()) - full
        return {"full": full, "partial": partial, "skip": math.prod(self.shape) - full - partial}

    @property
    def sparsity(self) -> float:
        """Fraction of tiles skipped; 0 for a map without tiles."""
        return self.counts["skip"] / max(math.prod(self.shape), 1)

    @property
    def nbytes(self) -> int:
        """Bytes held by both sets of runs."""
        return self.rows.nbytes + self.columns.nbytes

    @property
    def device(self) -> torch.device:
        """Where the runs live."""
        return self.rows.start.device

    def to(self, device: torch.device | str) -> BlockMap:
        """The same map with its runs on a device; itself if they are there."""
        on = transfer.numbered(arguments.device("BlockMap.to", device))
        if self.device == on:
            return self
        runs = iter(transfer.moved([*self.rows.tensors, *self.columns.tensors], on))
        rows, columns = (Runs(*islice(runs, 4)) for _ in range(2))
        return replace(self, rows=rows, columns=columns)

    def __repr__(self) -> str:
        batch, heads, n_q, n_kv = self.shape
        return (
            f"BlockMap({self.q_len} x {self.kv_len} tokens, tiles of {self.block_size[0]} x {self.block_size[1]}, "
            f"shape ({batch}, {heads}, {n_q}, {n_kv}), {self._summary()})"
        )

    def __str__(self) -> str:
        return "\n".join((repr(self), *_picture(self)))

    def _repr_html_(self) -> str:
        cells, legend = _cells(self, _DRAWN_SIDE)
        return html.lines(repr(self), ()) + html.tiles(cells, legend)

    def _summary(self) -> str:
        counts = self.counts
        return (
            f"{counts['full']} full, {counts['partial']} partial, {counts['skip']} skip, "
            f"{100 * self.sparsity:.1f} % skipped, {self.nbytes} bytes"
        )


def _picture(block_map: BlockMap) -> list[str]:
    """The first batch row's and head's tiles as text, under a legend."""
    cells, legend = _cells(block_map, _TEXT_SIDE)
    key = f"{_SHADES[SKIP]} skip  {_SHADES[PARTIAL]} partial  {_SHADES[FULL]} full"
    return ["  ".join(filter(None, (key, legend))), *("".join(_SHADES[kind] for kind in row) for row in cells)]


def _cells(block_map: BlockMap, most: int) -> tuple[list[list[int]], str]:
    """The kinds of at most `most` x `most` cells of the first map, and what a cell is."""
    batch, heads, n_q, n_kv = block_map.shape
    side = max(1, math.ceil(max(n_q, n_kv) / most))
    facts = [f"one cell is {side} x {side} tiles"] * (side > 1)
    facts += [f"batch row 0, head 0 of {batch} x {heads}"] * (batch * heads > 1)
    legend = f"({'; '.join(facts)})" if facts else ""
    if math.prod(block_map.shape) == 0:
        return [], legend
    return block_map.rows.cells(0, n_q, n_kv, side).tolist(), legend
