"""A pass by tiles of our own -> what all of its tiles need, and what one tile is made of.

Tiles have their rows from the last to the first, as `programs.py` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from maskflash.backends.cpu.calls import Band, Call, Causal
from maskflash.backends.cpu.limits import Largest, are_limited
from maskflash.backends.cpu.matrices import reach
from maskflash.backends.cpu.plan import Plan
from maskflash.backends.cpu.programs import MOST_BOUNDED, Pairs, farthest, is_bounded, peeled, program_of
from maskflash.backends.cpu.values import Values
from maskflash.backends.cpu.views import prepared
from maskflash.backends.cpu.work import WIDTH, Work
from maskflash.expr.nodes import Expr
from maskflash.scores import dropout
from maskflash.scores.strength import Strength


class Buffers:
    """Memory of one job for its tiles."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is what this name had before, of the tiles' dtype unless another is given."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size, dtype=dtype or self._dtype)
        return held[:size].view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """What one pass computes.

    Attributes:
        plan: which pairs are seen.
        strength: how strongly they attend.
        q: (B, Hq, Sq, D), of the dtype that is computed in; rows dense.
        k: (B, Hkv, Skv, D), likewise.
        v: (B, Hkv, Skv, Dv), likewise.
        bounded: whether what hidden pairs compute is finite.
        limited: whether all values are so small that their exponentials need no running maximum.
        words: dropout's of rows and of columns; None without it.
        edges: masks of tiles on edges of bands.
    """

    plan: Plan
    strength: Strength
    q: Tensor
    k: Tensor
    v: Tensor
    bounded: bool
    limited: bool
    words: tuple[Tensor, Tensor] | None
    edges: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, strength: Strength, q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> Tiling:
        """That of tensors of any dtype and strides."""
        total = torch.float64 if q.dtype == torch.float64 else torch.float32
        words, score = None, strength.score
        if strength.dropout is not None:
            batch, heads, q_len, _ = q.shape
            words = dropout.words(strength.dropout, batch, heads, q_len, k.shape[2])
        q, k, v = (prepared(x, total, x.shape[3]) for x in (q, k, v))
        read = plan.read("backward" if backward else "forward")
        largest = Largest.of(strength.scale, q, k, read)
        bounded = largest.product < MOST_BOUNDED  # nor NaN
        if score is not None:
            program = score.derivatives.expr if backward else score.expr
            place = farthest(score, q, k)
            bounded = is_bounded(program, score.inputs, place, largest.product)
        limited = are_limited(strength, q, k, v, read, largest)
        if score is not None and limited and not backward:  # whose products with ds are of q and k as they are
            expr, factor = peeled(score.expr, score.inputs.params)
            strength = replace(strength, scale=strength.scale * factor, score=replace(score, expr=expr))
        return Tiling(plan, strength, q, k, v, bounded, limited, words)

    @property
    def keep(self) -> float:
        """The share of probabilities that dropout keeps."""
        return 1.0 if self.strength.dropout is None else 1.0 - self.strength.dropout.p

    def values(self, work: Work, call: Call, rows: slice, expr: Expr, roots: tuple[int, ...]) -> Values:
        """These nodes of the score's program, in a call's rows."""
        score = self.strength.score
        assert score is not None, "the program is the score's"
        q, kv = (int(x[work.batch_row]) if isinstance(x, Tensor) else x for x in (score.q_offset, score.kv_offset))
        tokens = call.rows.tokens()[rows] + q, call.columns.tokens() + kv
        program = program_of(expr, roots, len(score.inputs.tables), by_diagonals=is_dense(call))
        return Values(Pairs(score.inputs, work.batch_row, work.heads, *tokens), program)


def is_dense(call: Call) -> bool:
    """Whether neither rows nor columns have gaps, so that tiles have diagonals."""
    return call.rows.index is None and call.columns.index is None


class CallPart:
    """Some rows and columns of a call, as its job computes them."""

    def __init__(self, problem: Tiling, work: Work, call: Call, values: Values | None, first: int) -> None:
        self.problem, self.work, self.call = problem, work, call
        self.values, self.first = values, first  # of the rows that `values` has
        self.buffers = Buffers(problem.q.dtype)
        self.keys, self.v = (call.columns.take(work.of_kv_heads(x)[None])[0] for x in (problem.k, problem.v))
        self.tokens = call.rows.tokens()
        self.words: tuple[Tensor, Tensor] | None = None
        if problem.words is not None:
            rows, columns = (work.of_heads(x) for x in problem.words)
            self.words = rows, columns.index_select(1, call.columns.tokens())

    def rows(self, low: int, high: int) -> Iterator[tuple[slice, Tensor, list[slice]]]:
        """Rows of the call, a tile high each: where they are, their tokens from the last to the first, and columns."""
        for top in range(low, high, height := self.work.height(self.call)):
            rows = slice(top, min(top + height, high))
            first, last = reach(self.call, rows)
            columns = [slice(x, min(x + WIDTH, last)) for x in range(first, last, WIDTH)]
            yield rows, self.tokens[rows].flip(0), columns

    def queries(self, tokens: Tensor, x: Tensor, factor: float) -> Tensor:
        """These rows of x (B, Hq, Sq, ...), for one product with each key head: (key heads, group x rows, ...)."""
        picked = self.work.of_heads(x).index_select(1, tokens)
        return (picked * factor if factor != 1.0 else picked).view(len(self.work.kv_heads), -1, x.shape[3])

    def values_of(self, rows: slice, columns: slice, queries: Tensor) -> list[Tensor]:
        """The roots of the score's program on a tile: first its value, of shape (heads, rows, columns)."""
        width = columns.stop - columns.start
        found = self.buffers.take("score", *queries.shape[:2], width)
        torch.bmm(queries, self.keys[:, columns].mT, out=found)
        score = found.view(len(self.work.heads), -1, width)
        if self.values is None:
            return [score]
        value, *others = self.values.of(slice(rows.start - self.first, rows.stop - self.first), columns, score)
        return [value.to(score.dtype).expand_as(score), *others]

    def hidden(self, rows: slice, columns: slice) -> Tensor | None:
        """What is added to the tile's values, or if they are limited what their exponentials are multiplied by.

        Returns:
            (rows, columns) of 0 where a pair is seen and -inf elsewhere, or of 1 and 0; None where all are seen.
        """
        mask = Band(0, 1, 1) if isinstance(self.call.mask, Causal) else self.call.mask
        if not isinstance(mask, Band):
            return self._hidden(rows, columns)
        # Tiles lie alike along an edge.
        start_step, stop_step, wide = mask.start_step, mask.stop_step, mask.width
        start, stop = start_step * rows.start - columns.start, wide + stop_step * rows.start - columns.start
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if start + start_step * (height - 1) <= 0 and stop >= width:
            return None
        key = start_step, mask.stop_step, start, stop, height, width
        edges = self.problem.edges
        if key not in edges:
            found = self._hidden(rows, columns)
            assert found is not None, "some pairs are hidden"
            edges[key] = found
        return edges[key]

    def _hidden(self, rows: slice, columns: slice) -> Tensor | None:
        found = self.problem.plan.tile(self.call, rows, columns)
        if found is None:
            return None
        found = found.flip(0)
        return found.add_(1).clamp_min_(0) if self.problem.limited else found

    def add_product(self, total: Tensor, x: Tensor, y: Tensor) -> None:
        """Add x y to a total: as one term, since adding each of its own to the total rounds twice as much."""
        total.add_(torch.bmm(x, y, out=self.buffers.take("product", *total.shape)))

    def row_words(self, tokens: Tensor) -> Tensor | None:
        """Dropout's words of these rows, (heads, rows, 1); None without dropout."""
        return None if self.words is None else self.words[0].index_select(1, tokens)[..., None]

    def products(self, row_words: Tensor | None, columns: slice) -> Tensor | None:
        """Of dropout's words, (heads, rows, columns), by which pairs are dropped; None without dropout."""
        if row_words is None or self.words is None:
            return None
        of_columns = self.words[1][:, None, columns]
        room = self.buffers.take("words", *row_words.shape[:2], of_columns.shape[2], dtype=row_words.dtype)
        return torch.mul(row_words, of_columns, out=room)

    def drop(self, x: Tensor, products: Tensor | None) -> None:
        """Zero what is dropped of x (heads, rows, columns), in place."""
        if products is not None and self.problem.strength.dropout is not None:
            dropout.drop(x, products, dropout.threshold(self.problem.strength.dropout.p))
