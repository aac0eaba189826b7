"""Common score functions by name -> the same that one would write by hand, each a few lines of plain Python.

    score = product of q and k, scaled                softcap      cap * tanh(score / cap)
                                                      temperature  score * x
    distance = kv - q       ... -2 -1  0  1 ...       alibi        score + slope[h] * distance
                                                      relative     score + table[h, distance]

Tensors are looked up where they are: what requires gradients gets them, and may change between calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Fits, Sizes
from maskflash.ground import arguments
from maskflash.scores.score import Score

_Preset = TypeVar("_Preset", bound=Callable[..., Score])

_POWER: Final = "call.power"  # of two, the largest up to the number of heads: nobody can pass such a name


def _preset(make: _Preset) -> _Preset:
    """A function that makes score functions that are pickled by what they were made of."""

    @functools.wraps(make)
    def preset(*args: Any, **options: Any) -> Score:
        found = make(*args, **options)
        found.made = functools.partial(preset, **options), args
        return found

    return preset  # type: ignore[return-value]


@_preset
def softcap(cap: float) -> Score:
    """Scores that never leave (-cap, cap): cap · tanh(score / cap).

    Args:
        cap: positive.

    Source: Bello et al., Neural Combinatorial Optimization, 2016; Gemma 2 (50 for attention).
    """
    cap = _number("softcap", "cap", cap)
    if not 0 < cap < float("inf"):
        raise ArgumentError(f"softcap: cap is {cap}, expected a finite positive number; leave the score out for none")

    def softcap(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return Score(softcap, f"softcap({cap:g})")


@_preset
def alibi(slopes: Tensor | None = None, *, symmetric: bool = False) -> Score:
    """Attention with linear biases: score + slope[h] · (kv - q); symmetric: score - slope[h] · |q - kv|.

    Args:
        slopes: floating (Hq,); None for the paper's, 2**(-8 (h + 1) / Hq) where Hq is a power of two.
        symmetric: keys after the query are as far as keys before it.

    Source: Press et al., Train Short, Test Long, 2022; for Hq that is no power of two its authors' code.
    """
    symmetric = arguments.flag("alibi", "symmetric", symmetric)
    if slopes is None:
        return _PaperAlibi(_papers_symmetric if symmetric else _papers, "alibi(symmetric)" if symmetric else "alibi()")
    slope = _floats("alibi", "slopes", slopes, 1)
    name = f"alibi({len(slope)} slopes{', symmetric' * symmetric})"

    def alibi(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + slope[h] * (kv - q)

    def both_ways(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score - slope[h] * abs(q - kv)

    return Score(both_ways if symmetric else alibi, name, Fits(heads=len(slope)))


@_preset
def distance_decay(rate: Tensor) -> Score:
    """Scores that fall with the distance, both ways: score - rate[h] · |q - kv|.

    Args:
        rate: floating (Hq,).
    """
    rates = _floats("distance_decay", "rate", rate, 1)

    def distance_decay(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score - rates[h] * abs(q - kv)

    return Score(distance_decay, f"distance_decay({len(rates)} rates)", Fits(heads=len(rates)))


@_preset
def bias(x: Tensor) -> Score:
    """A number for each pair: score + x[b, h, q, kv], of absolute positions.

    Args:
        x: floating, broadcastable to (B, Hq, Q, KV): two to four dimensions, where 1 serves all.
    """
    x = _floats("bias", "x", x, 2, 3, 4)
    pairs = x[(None,) * (4 - x.ndim)]
    shared = tuple(size == 1 or step == 0 for size, step in zip(pairs.shape, pairs.stride(), strict=True))
    one_b, one_h, one_q, one_kv = shared

    def bias(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + pairs[0 if one_b else b, 0 if one_h else h, 0 if one_q else q, 0 if one_kv else kv]

    fits = Fits(None if one_b else pairs.shape[0], None if one_h else pairs.shape[1])
    return Score(bias, f"bias({' x '.join(map(str, x.shape))})", fits)


@_preset
def key_bias(x: Tensor) -> Score:
    """A number for each key, such as its importance: score + x[b, h, kv].

    Args:
        x: floating (KV,), (B, KV) or (B, Hq, KV), where 1 serves all.
    """
    x = _floats("key_bias", "x", x, 1, 2, 3)
    full = x[:, None] if x.ndim == 2 else x[(None,) * (3 - x.ndim)]
    keys = bias(full[:, :, None])
    keys.name = f"key_bias({' x '.join(map(str, x.shape))})"
    return keys


@_preset
def relative_table(table: Tensor) -> Score:
    """A number for each distance up to a length: score + table[h, clamp(kv - q, 1 - L, L - 1) + L - 1].

    Args:
        table: floating (2 L - 1,), or (Hq, 2 L - 1).

    Source: Shaw et al., Self-Attention with Relative Position Representations, 2018, as a scalar.
    """
    table = _floats("relative_table", "table", table, 1, 2)
    size = table.shape[-1]
    if size % 2 == 0:
        raise ArgumentError(
            f"relative_table: table has {size} numbers for each head, expected an odd number, 2 L - 1: distances from "
            "1 - L to L - 1"
        )
    most = size // 2
    per_head = table.ndim == 2

    def relative_table(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        distance = min(max(kv - q, -most), most) + most
        return score + (table[h, distance] if per_head else table[distance])

    name = f"relative_table({' x '.join(map(str, table.shape))})"
    return Score(relative_table, name, Fits(heads=table.shape[0] if per_head else None))


@_preset
def relative_bias(table: Tensor, *, bidirectional: bool = True, max_distance: int = 128) -> Score:
    """T5's position bias: score + table[bucket(kv - q), h]; near distances have buckets of their own.

    Args:
        table: floating (buckets, Hq), such as the weight of an embedding.
        bidirectional: keys after the query have half of the buckets; else all of them share that of distance 0.
        max_distance: from here on there is one bucket.

    Source: Raffel et al., Exploring the Limits of Transfer Learning (T5), 2020.
    """
    operation = "relative_bias"
    table = _floats(operation, "table", table, 2)
    bidirectional = arguments.flag(operation, "bidirectional", bidirectional)
    most = arguments.integer(operation, "max_distance", max_distance, low=1)
    bucket = buckets(table.shape[0], bidirectional, most)

    def relative_bias(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + table[bucket[min(max(kv - q, -most), most) + most], h]

    name = f"relative_bias({table.shape[0]} buckets, {table.shape[1]} heads)"
    return Score(relative_bias, name, Fits(heads=table.shape[1]))


@_preset
def temperature(x: Tensor | float) -> Score:
    """Sharper or flatter rows: score · x.

    Args:
        x: a number, or floating (Hq,) or (Hq, Q) of absolute positions.
    """
    if not isinstance(x, Tensor):
        factor = _number("temperature", "x", x)

        def temperature(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return score * factor

        return Score(temperature, f"temperature({factor:g})")
    table = _floats("temperature", "x", x, 1, 2)
    name = f"temperature({' x '.join(map(str, table.shape))})"
    per_row = table.ndim == 2

    def per_head(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score * (table[h, q] if per_row else table[h])

    return Score(per_head, name, Fits(heads=table.shape[0]))


@_preset
def forget_gate(log_f: Tensor) -> Score:
    """What each token forgets of those before it: score + C[b, h, q] - C[b, h, kv], where C sums log_f up.

    Args:
        log_f: floating (B, Hq, S), logarithms of gates; gradients go through the sums.

    Source: Lin et al., Forgetting Transformer, 2025.
    """
    sums = _floats("forget_gate", "log_f", log_f, 3).cumsum(-1)

    def forget_gate(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + sums[b, h, q] - sums[b, h, kv]

    batch, heads, tokens = sums.shape
    return Score(forget_gate, f"forget_gate({batch} x {heads} x {tokens})", Fits(batch, heads))


def buckets(count: int, bidirectional: bool, max_distance: int) -> Tensor:
    """T5's bucket of each distance from -max_distance to max_distance: (2 max_distance + 1,) int64.

    Computed as Transformers does, in float32, so that each distance falls into the same bucket.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    first = torch.zeros_like(distance)
    if bidirectional:
        count //= 2
        first = (distance > 0).long() * count
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    if exact < 1 or max_distance <= exact:
        raise ArgumentError(
            f"relative_bias: {count} buckets of one direction reach to {exact} one by one and max_distance is "
            f"{max_distance}, expected more buckets, or a larger distance"
        )
    far = torch.log(distance.float() / exact) / torch.log(torch.tensor(max_distance / exact)) * (count - exact)
    far = (exact + far.clamp(min=0).long()).clamp(max=count - 1)
    return first + torch.where(distance < exact, distance, far)


class _PaperAlibi(Score):
    """ALiBi whose slopes follow from the number of heads."""

    def __init__(self, function: Any, name: str | None = None, fits: Fits | None = None, **options: Any) -> None:
        super().__init__(function, name, fits, **{**options, "traced": False})
        for one in (self, self.double):
            one.implied_names = (_POWER,)
            one.implied = self._power  # type: ignore[method-assign]

    @staticmethod
    def _power(sizes: Sizes) -> dict[str, int]:
        return {_POWER: 1 << (sizes.heads.bit_length() - 1)}


def _papers_slope(h: Any, power: Any) -> Any:
    """The slopes of the paper's `power` heads; further ones lie between them."""
    exponent = (h + 1) * -8.0 / power if h < power else (2 * (h - power) + 1) * -4.0 / power
    return torch.exp2(exponent)


def _papers(score: Any, b: Any, h: Any, q: Any, kv: Any, **call: Any) -> Any:
    return score + _papers_slope(h, call[_POWER]) * (kv - q)


def _papers_symmetric(score: Any, b: Any, h: Any, q: Any, kv: Any, **call: Any) -> Any:
    return score - _papers_slope(h, call[_POWER]) * abs(q - kv)


def _number(operation: str, name: str, value: Any) -> float:
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__float__"):
        fix = "; temperature takes tensors, and a score function of your own any" * isinstance(value, Tensor)
        raise ArgumentTypeError(f"{operation}: {name} is a {type(value).__name__}, expected a number{fix}")
    return float(value)


def _floats(operation: str, name: str, value: Any, *ranks: int) -> Tensor:
    arguments.instance(operation, name, value, Tensor, "torch.tensor makes one")
    if not value.is_floating_point():
        raise ArgumentTypeError(f"{operation}: {name} has dtype {value.dtype}, expected a floating dtype")
    if value.ndim not in ranks:
        expected = " or ".join(map(str, ranks))
        raise ArgumentError(f"{operation}: {name} has shape {tuple(value.shape)}, expected {expected} dimensions")
    floats: Tensor = value
    return floats
