"""Seed, positions and probability -> which pairs dropout keeps.

Whether a pair is kept depends on (seed, b, h, q, kv) alone, with absolute positions. So it is the same for any backend,
tile or part of a sequence, and backward computes it again. Each row and each column of a head has a random word, the
first of Philox4x32-10. A pair then costs one product and one comparison:

    row word     R = first word of Philox4x32-10 with key (seed mod 2^32, seed / 2^32), counter (q, h, b, 0), | 1
    column word  C = likewise with counter (kv, h, b, 1)
    kept         R * C >= round(p * 2^32) - 2^31, product and comparison in int32, which wraps

Why a product suffices. Both words are odd, and odd numbers are a group under multiplication mod 2^32. So the products
in one row, or in one column, are as independent as the words are, and so are any two that share neither. What is left
to fear is structure over many rows and columns. In the matrix of all words it shows in the singular values, which are
the Fourier coefficients of an interval over that group: at most 22 / 2^15 of the matrix's side by the Polya-Vinogradov
inequality (a sixth to an eighth of the bound where they were computed at p = 0.5, for moduli of 16, 20 and 24 bits).
The matrix of a call is a random part of that one. Independent pairs of its size have singular values of up to
2 sqrt(p (1 - p) / side) by chance alone, which at p = 0.1 is more than the bound for up to 780,000 tokens.

A mixer of xors, shifts and products takes 1.6 to 2.8 times as long (docs/decisions/0033), and passes the same tests of
tests/scores. An xor and one product take about as long as a product, and fail four of them.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011; docs/numerics.md has test vectors.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from maskflash.scores.strength import Dropout

_WORD: Final = 2**32 - 1
_SIGN: Final = 2**31
_FACTORS: Final = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS: Final = 0x9E3779B9, 0xBB67AE85
_ROUNDS: Final = 10

_where_above = torch.ops.aten.threshold_backward.grad_input


def words(dropout: Dropout, batch: int, heads: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    """The random words of all rows and of all columns: `row_words` and `column_words` at the price of one.

    Returns:
        (batch, heads, q_len) and (batch, heads, kv_len), int32, odd, on the device of the seed.
    """
    seed, first, at = dropout.seed[:1], dropout.seed[1:3], dropout.seed[3:]
    b = torch.arange(batch, device=seed.device)[:, None, None]
    h = torch.arange(heads, device=seed.device)[:, None]
    if len(first):
        b, h = b + first[0], h + first[1]
    if len(at):
        positions = at.expand(batch, 1, -1)
    else:
        rows, columns = _positions(dropout.q_offset, q_len, seed), _positions(dropout.kv_offset, kv_len, seed)
        positions = torch.cat([x.expand(batch, 1, -1) for x in (rows, columns)], 2)
    side = (torch.arange(q_len + kv_len, device=seed.device) >= q_len).long()
    word = philox((positions & _WORD, h, b, side), (seed & _WORD, (seed >> 32) & _WORD))[0] | 1
    word = ((word ^ _SIGN) - _SIGN).to(torch.int32)  # the int32 with the same bits
    return word[..., :q_len].contiguous(), word[..., q_len:].contiguous()


def row_words(dropout: Dropout, batch: int, heads: int, q_len: int) -> Tensor:
    """The random word of each row: (batch, heads, q_len) int32, odd, on the device of the seed."""
    return words(dropout, batch, heads, q_len, 0)[0]


def column_words(dropout: Dropout, batch: int, heads: int, kv_len: int) -> Tensor:
    """The random word of each column: (batch, heads, kv_len) int32, odd, on the device of the seed."""
    return words(dropout, batch, heads, 0, kv_len)[1]


def threshold(p: float) -> int:
    """The least product that is kept: an int32. Of odd products a share of p lies below it, within 2^-32."""
    return min(round(p * 2**32), _WORD) - _SIGN


def kept(rows: Tensor, columns: Tensor, threshold: int) -> Tensor:
    """Whether each pair of a row (..., Q) and a column (..., KV) is kept: (..., Q, KV) bool."""
    return rows[..., :, None] * columns[..., None, :] >= threshold


def drop(x: Tensor, products: Tensor, threshold: int) -> None:
    """Zero what is dropped, in place and in one pass: what a bool of each pair is multiplied by takes three.

    Args:
        x: (..., Q, KV) float32 or float64, contiguous.
        products: of the words of each row and column, int32, of the same shape.
        threshold: see `threshold`.
    """
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    of_x = x.view(bits)
    if threshold > -_SIGN:  # "where the second is above the threshold", of numbers of one dtype
        _where_above(of_x, products.to(bits), threshold - 1, grad_input=of_x)


def keep(dropout: Dropout, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """Whether each pair of a call is kept: (batch, heads, q_len, kv_len) bool, dense."""
    return kept(*words(dropout, batch, heads, q_len, kv_len), threshold(dropout.p))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words of a counter of four words and a key of two.

    Args:
        counter: int64, each from 0 to 2^32 - 1; shapes that broadcast.
        key: likewise, one element each.

    Returns:
        Four words, int64, each from 0 to 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    rounds = torch.arange(_ROUNDS, device=c0.device)
    keys = [((word + rounds * step) & _WORD).unbind() for word, step in zip(key, _KEY_STEPS, strict=True)]
    for k0, k1 in zip(*keys, strict=True):
        # Products have 64 bits: int64 holds them all, and the mask drops what the shift drags in of the sign. The low
        # halves are masked where they are used next.
        low, high = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1, c2, c3 = ((high >> 32) ^ c1 ^ k0) & _WORD, high, ((low >> 32) ^ c3 ^ k1) & _WORD, low
    return c0, c1 & _WORD, c2, c3 & _WORD


def _positions(offset: int | Tensor, length: int, seed: Tensor) -> Tensor:
    """Absolute positions: (batch or 1, 1, length) int64."""
    shift = offset.long().reshape(-1, 1, 1) if isinstance(offset, Tensor) else offset
    return torch.arange(length, device=seed.device).reshape(1, 1, -1) + shift
