"""Turns the kinds of a mask's tiles into a BlockMap: runs of equal tiles, by rows for forward, by columns for backward.

A tile is skip (no pair of it is visible), full (every pair inside the lengths is) or partial. Runs leave the
skipped tiles out and merge neighbours of one kind, so a map's memory follows the mask's boundary, not its area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from maskflash.analysis.runs import FULL, SKIP, Runs
from maskflash.errors import ArgumentError
from maskflash.ground import arguments, transfer


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
        (batch, heads, n_q, n_kv), counts = self.shape, self.counts
        return (
            f"BlockMap({self.q_len} x {self.kv_len} tokens, tiles of {self.block_size[0]} x {self.block_size[1]}, "
            f"shape ({batch}, {heads}, {n_q}, {n_kv}), {counts['full']} full, {counts['partial']} partial, "
            f"{counts['skip']} skip, {100 * self.sparsity:.1f} % skipped, {self.nbytes} bytes)"
        )

    def __str__(self) -> str:
        from maskflash.visualize import notebook

        return f"{self!r}\n{notebook.picture(self)}"

    def _repr_html_(self) -> str:
        from maskflash.visualize import notebook

        return notebook.of_map(self)
