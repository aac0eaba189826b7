"""q, k and v, and how strongly they attend -> whether exponentials of all values fit in float32 as they are.

Softmax subtracts each row's highest value, since the exponential of a large one overflows and those of a row of small
ones all underflow. Where no value is far from zero it needs no highest one: no pass to find it, none to subtract it,
and nothing to rescale.

    |score|  <=  scale · largest |q| · largest |k|      Cauchy and Schwarz
    |value|  <=  by the program's interval              50 · tanh(score / 50) is within 50, or what the score allows
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from maskflash.expr.bounds import interval
from maskflash.expr.intervals import Interval
from maskflash.scores.strength import BoundScore, Strength

_MOST: Final = 34.0  # exp(34) 2^24 < 2^74, and exp(-34 - 34 - log 2^24) > 2^-123, of a value less lse
_LARGEST: Final = 2.0**48  # of v: sums of products with such exponentials don't overflow
_LEAST: Final = 2.0**-76  # of v's numbers but 0: their products with exp(-34) are no less than float32 holds
_PRODUCT: Final = 2.0**100  # of scale, |q| and |k|: `peeled` makes it 2^20 times as large, and no term overflows
_KEY: Final = 2.0**50  # a key's norm: what is lost of a number of q that is scaled below 2^-126 stays below 2^-99


class Largest(NamedTuple):
    """What no pair's product exceeds, hidden ones too, and the largest norm of a key."""

    product: float
    key: float

    @staticmethod
    def of(scale: float, q: Tensor, k: Tensor, read: tuple[Tensor, Tensor]) -> Largest:
        """Those of tokens that are read: NaN if one of them has a NaN."""
        if not (q.numel() and k.numel()):
            return Largest(0.0, 0.0)
        key = _largest(k, read[1], 2)
        return Largest(abs(scale) * _largest(q, read[0], 2) * key * 1.001, key)


def are_limited(
    strength: Strength, q: Tensor, k: Tensor, v: Tensor, read: tuple[Tensor, Tensor], largest: Largest
) -> bool:
    """Whether no exponential of a value, or of a value less its row's lse, overflows or underflows.

    Args:
        strength: the score and its scale.
        q: (B, Hq, Sq, D), and no other than finite numbers are read if the answer is yes.
        k: (B, Hkv, Skv, D), likewise.
        v: (B, Hkv, Skv, Dv), likewise.
        read: which rows and columns are, see `Plan.read`.
        largest: of q and k.
    """
    if not all(x.numel() for x in (q, k, v)) or k.shape[2] > 1 << 24:
        return False
    product, key = largest
    if not (product < _PRODUCT and key < _KEY and _largest(v, read[1], torch.inf) < _LARGEST):  # nor NaN
        return False
    if not _least(v, read[1]) > _LEAST:
        return False
    if strength.score is None:
        return product <= _MOST
    lengths = q.shape[2], k.shape[2]
    low, high = _values(strength.score, product, q.dtype, q.shape[0], q.shape[1], lengths)
    return low >= -_MOST and high <= _MOST


def _largest(x: Tensor, read: Tensor, norm: float) -> float:
    """The largest norm of a token of x (B, H, S, D) that is read, as (b, h, S) says of the mask's heads."""
    found = _where_read(torch.linalg.vector_norm(x, norm, dim=3), read, 0.0)
    lost = x.shape[3] ** 0.5 * 2.0**-60 if norm == 2 else 0.0  # numbers whose squares are less than float32 holds
    return float(found.amax()) + lost


def _least(x: Tensor, read: Tensor) -> float:
    """The least number but 0 of those tokens, without its sign; inf where all are 0."""
    found = _where_read(torch.linalg.vector_norm(x, -torch.inf, dim=3), read, torch.inf)
    if found.amin() == 0:
        found = _where_read(x.abs().masked_fill_(x == 0, torch.inf).amin(3), read, torch.inf)
    return float(found.amin())


def _where_read(found: Tensor, read: Tensor, other: float) -> Tensor:
    """Numbers of tokens (B, H, S), or another where the token is not read."""
    if read.all():
        return found
    of_heads = read.unflatten(1, (found.shape[1], -1)).any(2) if read.shape[1] > 1 else read
    return found.masked_fill(~of_heads, other)


def _values(
    score: BoundScore, product: float, dtype: torch.dtype, batch: int, heads: int, lengths: tuple[int, int]
) -> tuple[float, float]:
    """Between which numbers the values of all pairs lie, hidden ones too; NaN where that isn't known."""
    boxes = {"b": _box(0, batch - 1), "h": _box(0, heads - 1)}
    boxes["score"] = Interval(*(torch.tensor(end, dtype=dtype) for end in (-product, product)))
    for name, offset, length in zip(("q", "kv"), (score.q_offset, score.kv_offset), lengths, strict=True):
        ends = torch.aminmax(torch.as_tensor(offset))
        boxes[name] = _box(int(ends.min), int(ends.max) + length - 1)
    found = interval(score.expr, score.inputs, boxes)
    return float(found.lo.min()), float(found.hi.max())


def _box(first: int, last: int) -> Interval:
    return Interval(torch.tensor(first), torch.tensor(last))
