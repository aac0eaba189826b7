"""Few rows, and a score function -> their attention, with all pairs' scores at once.

S = scale · q kᵀ        one product for each key head: query heads that share it are its rows
value = program(S)      of b, h, q and kv of each pair; -inf where the mask hides it
out = softmax(value) v
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from maskflash.backends.cpu.programs import look_up
from maskflash.backends.cpu.softmax import exponentials
from maskflash.backends.cpu.views import prepared
from maskflash.expr.evaluate import compute
from maskflash.ground.stretch import Numbers
from maskflash.scores.strength import BoundScore

_PAIRS: Final = 1 << 20  # whose scores are in memory at once, where a batch row has no more


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPairs:
    """A score function on the pairs of some rows.

    Attributes:
        score: the function.
        b: int64, as all indices; they broadcast to (batch rows, heads, rows, columns).
        h: the query heads.
        q: the rows' places.
        kv: the columns' places.
    """

    score: BoundScore
    b: Tensor
    h: Tensor
    q: Tensor
    kv: Tensor

    def part(self, batch: slice, heads: slice) -> ScoredPairs:
        """On some batch rows and query heads."""
        b, q, kv = (x if len(x) == 1 else x[batch] for x in (self.b, self.q, self.kv))
        return ScoredPairs(self.score, b, self.h[:, heads], q, kv)

    def columns(self, some: slice | Tensor | Numbers) -> ScoredPairs:
        """On some columns."""
        return replace(self, kv=self.kv[..., some])

    def check(self, visible: Tensor) -> None:
        """Check that what visible pairs look up is there; visible broadcasts to (batch rows, heads, rows, columns).

        Raises:
            MaskIndexError: a visible pair looks up what a table doesn't have, or divides by zero.
        """
        from maskflash.scores import reads  # with all of analysis, which importing maskflash doesn't load

        reads.check_pairs(self._places, visible, self.score.expr, self.score.inputs)

    def value(self, products: Tensor) -> Tensor:
        """What scaled products (batch rows, heads, rows, columns) become."""
        pairs = {**self._places, "score": products}
        return compute(self.score.expr, self.score.inputs, pairs, look_up)[0].to(products.dtype)

    @property
    def _places(self) -> dict[str, Tensor]:
        return {"b": self.b, "h": self.h, "q": self.q, "kv": self.kv}


def attend(
    scored: ScoredPairs, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to these columns, but for what is hidden.

    Args:
        scored: the score of their pairs.
        q: (n, heads, rows, D).
        k: (n, kv_heads, columns, D).
        v: (n, kv_heads, columns, Dv).
        hidden: bool (n or 1, heads or 1, rows, columns); None for nothing.
        scale: factor of the products.

    Returns:
        out (n, heads, rows, Dv) and lse (n, heads, rows), float32 (float64 for float64).
    """
    n, heads, rows, _ = q.shape
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (prepared(x, total, x.shape[3]) for x in (q, k, v))
    alike = all(x.stride(0) == k.shape[1] * x.stride(1) for x in (k, v))  # one stride from head to head
    step = max(1, _PAIRS // (heads * rows * k.shape[2])) if alike else 1
    if step >= n:
        return _attend(scored, q, k, v, hidden, scale)
    parts = []
    for first in range(0, n, step):
        some = slice(first, first + step)
        of = hidden if hidden is None or len(hidden) == 1 else hidden[some]
        parts.append(_attend(scored.part(some, slice(None)), q[some], k[some], v[some], of, scale))
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return out, lse


def _attend(
    scored: ScoredPairs, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    (n, heads, rows, head_dim), (kv_heads, columns) = q.shape, k.shape[1:3]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    queries = (q * scale).reshape(n * kv_heads, -1, head_dim)
    products = _product(queries, keys.mT).view(n, heads, rows, columns)
    value = scored.value(products).expand(n, heads, rows, columns)
    if hidden is not None:
        value = value.masked_fill(hidden, -torch.inf)
    highest = value.amax(-1, keepdim=True).clamp_min_(torch.finfo(value.dtype).min)
    p = value - highest
    exponentials(p)
    sums = p.sum(-1, keepdim=True)
    out = _product(p.view(n * kv_heads, -1, columns), values).view(n, heads, rows, -1)
    lse = (sums.log() + highest).squeeze(-1)
    return out.div_(sums.masked_fill_(sums == 0, 1.0)), lse  # a row that sees nothing: 0 and -inf


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The product of each two of a batch, in their own dtype: where a result is given, autocast casts nothing."""
    return torch.bmm(x, y, out=x.new_empty(x.shape[0], x.shape[1], y.shape[2]))
