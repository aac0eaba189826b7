"""q and k of a call -> what it makes of them before v: largest scores, probabilities of rows, the keys they go to.

Scores are computed again, in float32 (float64 for float64), by operations of torch, on the device of q and k. At no
time are there more of them than a few million: lines of the block map's tiles, or some rows, at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.errors import ArgumentError
from maskflash.expr.evaluate import compute
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments, qkv
from maskflash.op import autograd
from maskflash.op.asking import Asking
from maskflash.scores.strength import Strength

_PAIRS_AT_ONCE: Final = 1 << 22  # of all batch rows and heads together


class Inside(Asking):
    """What an attention op can tell of a call beside its out: the part of `Attention` that looks inside."""

    def max_logits(
        self, q: Tensor, k: Tensor, *, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0, **args: Any
    ) -> Tensor:
        """The largest score of a visible pair, of each batch row and head: after scale and score function.

        It visits the tiles that forward visits. Nothing is differentiable.

        Args:
            q: as in a call.
            k: as in a call.
            q_offset: as in a call.
            kv_offset: as in a call.
            **args: the mask's and the score function's own arguments.

        Returns:
            (B, Hq) float32 (float64 for float64); -inf where nothing is visible.

        Raises:
            ArgumentError: as a call.
            ArgumentTypeError: as a call.

        Source: what QK-clip looks at: Kimi Team, Kimi K2, 2025, section 2.1.

        Example:
            >>> import maskflash as mf
            >>> q, k = torch.zeros(2, 1, 2, 300, 16).unbind()
            >>> q[0, 1, 7], k[0, 1, 5] = 2.0, 3.0
            >>> attn = mf.compile(mf.causal())
            >>> attn.max_logits(q, k)  # 16 · 2 · 3 / sqrt(16)
            tensor([[ 0., 24.]])
        """
        look = self._look(q, k, q_offset, kv_offset, None, args)
        with look.quietly():
            return look.largest()

    def probabilities(
        self,
        q: Tensor,
        k: Tensor,
        rows: int | Sequence[int] | Tensor,
        *,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        sinks: Tensor | None = None,
        **args: Any,
    ) -> Tensor:
        """What chosen rows give to every key: softmax of their scores, 0 at hidden pairs. Not differentiable.

        Args:
            q: as in a call.
            k: as in a call.
            rows: which rows of q, from 0; negative ones count from the end.
            q_offset: as in a call.
            kv_offset: as in a call.
            sinks: as in a call: with them a row's probabilities add up to less than 1.
            **args: the mask's and the score function's own arguments.

        Returns:
            (B, Hq, number of rows, Skv) float32 (float64 for float64), before dropout; a row that sees nothing is 0.

        Raises:
            ArgumentError: as a call, or a row that q doesn't have.
            ArgumentTypeError: as a call, or rows that are no integers.

        Example:
            >>> import maskflash as mf
            >>> q, k = torch.zeros(2, 1, 1, 4, 16).unbind()
            >>> mf.compile(mf.causal()).probabilities(q, k, [1, -1])
            tensor([[[[0.5000, 0.5000, 0.0000, 0.0000],
                      [0.2500, 0.2500, 0.2500, 0.2500]]]])
        """
        look = self._look(q, k, q_offset, kv_offset, sinks, args)
        given = [rows] if isinstance(rows, int) else arguments.int_list("Attention.probabilities", "rows", rows, (1,))
        chosen = [look.row("Attention.probabilities", "rows", row) for row in given]
        with look.quietly():
            return look.probabilities(torch.tensor(chosen, dtype=torch.int64, device=q.device))

    def top_keys(
        self,
        q: Tensor,
        k: Tensor,
        row: int,
        n: int,
        *,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        sinks: Tensor | None = None,
        **args: Any,
    ) -> tuple[Tensor, Tensor]:
        """The keys that a row attends to most, and how much: the largest of its probabilities first.

        Args:
            q: as in a call.
            k: as in a call.
            row: of q, from 0; a negative one counts from the end.
            n: how many keys, at most Skv.
            q_offset: as in a call.
            kv_offset: as in a call.
            sinks: as in a call.
            **args: the mask's and the score function's own arguments.

        Returns:
            values: (B, Hq, n) probabilities, float32 (float64 for float64), descending.
            indices: (B, Hq, n) int64, the columns of k; of equal scores the first comes first. Where a row sees fewer
            than n keys the rest is 0 and -1.

        Raises:
            ArgumentError: as a call, or a row or number that there isn't.
            ArgumentTypeError: as a call, or a row that is no int.

        Example:
            >>> import maskflash as mf
            >>> q, k = torch.zeros(2, 1, 1, 4, 16).unbind()
            >>> mf.compile(mf.causal()).top_keys(q, k, row=1, n=3)
            (tensor([[[0.5000, 0.5000, 0.0000]]]), tensor([[[ 0,  1, -1]]]))
        """
        look = self._look(q, k, q_offset, kv_offset, sinks, args)
        chosen = look.row("Attention.top_keys", "row", row)
        arguments.integer("Attention.top_keys", "n", n, high=k.shape[2])
        with look.quietly():
            return look.top(torch.tensor([chosen], device=q.device), n)

    def _look(
        self,
        q: Tensor,
        k: Tensor,
        q_offset: int | Tensor,
        kv_offset: int | Tensor,
        sinks: Tensor | None,
        args: dict[str, Any],
    ) -> Look:
        """A call without v, its arguments checked and its mask analysed as those of a call are."""
        q, k, _ = qkv.as_autocast(q, k, k)
        qkv.check(q, k, k)
        if sinks is not None:
            qkv.check_sinks(sinks, q)
        spec = self._spec(self._sizes(q, k, q_offset, kv_offset), q, sinks, args)
        problem = spec.problem(Sizes.of(q, k))
        return Look(autograd.found(spec, q, k).block_map, problem, spec.strength, q.detach(), k.detach())


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """A call without v.

    Attributes:
        block_map: the tiles of its mask.
        problem: the mask, with the call's sizes and offsets.
        strength: how strongly visible pairs attend.
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Skv, D).
    """

    block_map: BlockMap
    problem: Problem
    strength: Strength
    q: Tensor
    k: Tensor

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Without gradients, and without autocast, which would round what is compared."""
        with torch.no_grad(), torch.autocast(self.q.device.type, enabled=False):
            yield

    def row(self, operation: str, name: str, value: Any) -> int:
        """A row of q from 0, of one that may be counted from the end."""
        number, length = arguments.integer(operation, name, value, low=None), self.problem.q_len
        if not -length <= number < length:
            raise ArgumentError(f"{operation}: {name} holds {number}, expected from {-length} to {length - 1}")
        return number % length

    def largest(self) -> Tensor:
        """See `Inside.max_logits`."""
        batch, heads = self.problem.batch, self.problem.heads
        found = self._zeros(batch, heads).fill_(-torch.inf)
        columns = torch.arange(self.problem.kv_len, device=self.q.device)
        rows = torch.arange(self.problem.q_len, device=self.q.device)
        for row, column, full in _pieces(self.block_map, self._at_once):
            found = torch.maximum(found, self._values(rows[row], columns[column], full).amax((2, 3)))
        return found

    def probabilities(self, rows: Tensor) -> Tensor:
        """See `Inside.probabilities`."""
        kv_len = self.problem.kv_len
        found = self._zeros(self.problem.batch, self.problem.heads, len(rows), kv_len)
        step = max(1, self._at_once // max(kv_len, 1))
        for start in range(0, len(rows) if kv_len else 0, step):
            part = slice(start, start + step)
            found[:, :, part] = self._shares(self._of_rows(rows[part]))
        return found

    def top(self, row: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """See `Inside.top_keys`."""
        values = self._of_rows(row)
        found, order = values.sort(dim=-1, descending=True, stable=True)
        shares = self._shares(values).gather(-1, order)
        order = order.masked_fill(found == -torch.inf, -1)
        return shares[:, :, 0, :n], order[:, :, 0, :n]

    @property
    def _at_once(self) -> int:
        """How many pairs of each batch row and head are looked at together."""
        return max(1, _PAIRS_AT_ONCE // max(1, self.problem.batch * self.problem.heads))

    def _zeros(self, *shape: int) -> Tensor:
        return self.q.new_zeros(shape, dtype=torch.promote_types(self.q.dtype, torch.float32))

    def _of_rows(self, rows: Tensor) -> Tensor:
        """Scores of rows with all keys; -inf where hidden."""
        return self._values(rows, torch.arange(self.problem.kv_len, device=self.q.device), False)

    def _values(self, rows: Tensor, columns: Tensor, full: bool) -> Tensor:
        """Scores of rows with columns, given by number: (B, Hq, rows, columns); -inf where hidden.

        `full` says that the mask hides none of them.
        """
        q, k = (x.index_select(2, of).to(self._zeros().dtype) for x, of in ((self.q, rows), (self.k, columns)))
        grouped = q.unflatten(1, (k.shape[1], -1))
        values: Tensor = (grouped @ k[:, :, None].mT).flatten(1, 2) * self.strength.scale
        b = torch.arange(self.problem.batch, device=rows.device)[:, None, None, None]
        h = torch.arange(self.problem.heads, device=rows.device)[:, None, None]
        score = self.strength.score
        if score is not None:
            pairs = {**self.problem.indices(b, h, rows[:, None], columns), "score": values}
            values = compute(score.expr, score.inputs, pairs)[0].to(values.dtype).expand(values.shape)
        if full:
            return values
        return values.masked_fill(~self.problem.visible(b, h, rows[:, None], columns), -torch.inf)

    def _shares(self, values: Tensor) -> Tensor:
        """The softmax of scores over their keys and the sink; 0 in rows that see nothing."""
        lse = values.logsumexp(-1, keepdim=True)
        if self.strength.sinks is not None:
            lse = torch.logaddexp(lse, self.strength.sinks.to(lse.dtype)[:, None, None])
        return (values - lse.masked_fill(lse == -torch.inf, 0.0)).exp()


def _pieces(block_map: BlockMap, at_once: int) -> Iterator[tuple[slice, slice, bool]]:
    """Rows and columns of tiles that some batch row and head visits, at most so many pairs; whether all see them all.

    Line by line, since all kinds of a long mask's tiles would be many.
    """
    _, _, n_q, n_kv = block_map.shape
    bq, bkv = block_map.block_size
    offsets, start, stop, full = (x.cpu().numpy() for x in block_map.rows.tensors)
    units = (len(offsets) - 1) // max(n_q, 1)
    step = max(1, at_once // (bq * bkv))
    for i in range(n_q):
        kinds = np.zeros((units, n_kv), dtype=np.int8)
        for unit in range(units):
            line = unit * n_q + i
            for run in range(offsets[line], offsets[line + 1]):
                kinds[unit, start[run] : stop[run]] = FULL if full[run] else PARTIAL
        kind = np.where((kinds == FULL).all(0), FULL, np.where((kinds != SKIP).any(0), PARTIAL, SKIP))
        ends = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), n_kv]
        rows = slice(i * bq, min((i + 1) * bq, block_map.q_len))
        for first, last in itertools.pairwise(ends):
            for j in range(first, last, step) if kind[first] != SKIP else ():
                columns = slice(j * bkv, min(min(j + step, last) * bkv, block_map.kv_len))
                yield rows, columns, bool(kind[first] == FULL)
