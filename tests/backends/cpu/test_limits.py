"""Values that are near zero need no running maximum, and whoever says so is never wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.cpu import limits, tile
from maskflash.backends.cpu.programs import peeled
from maskflash.expr.evaluate import Inputs, compute
from maskflash.scores.score import ROLES
from maskflash.scores.strength import BoundScore, Strength
from maskflash.testing import Shape, assert_matches_dense
from maskflash.trace.trace import trace

LEN = 200
TABLE = torch.linspace(-3, 5, 2 * LEN)
SCORES = {
    "capped": lambda score, b, h, q, kv: 30 * torch.tanh(score / 30),
    "by a gate": lambda score, b, h, q, kv: torch.sigmoid(-score) * TABLE[q] - torch.cos(score),
    "by distance": lambda score, b, h, q, kv: 4 * torch.tanh(score) + TABLE[q - kv + LEN],
    "an angle": lambda score, b, h, q, kv: torch.where(q > kv, torch.atan(score), torch.erf(score) * 8),
    "a product": lambda score, b, h, q, kv: score * 0.25 * torch.sin(score),
}
ALL = torch.ones(1, 1, LEN, dtype=torch.bool)


def bound(score, dtype=torch.float32):
    traced = trace(score, role=ROLES[dtype])
    return BoundScore(traced.expr, traced.bind({}), (False,) * 9)


@pytest.fixture
def verdicts(monkeypatch):
    """What was found of each pass."""
    found = []
    monkeypatch.setattr(tile, "are_limited", lambda *args: found.append(limits.are_limited(*args)) or found[-1])
    return found


def attention_like(magnitude, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [magnitude * torch.randn(1, 2, LEN, 8, generator=draw, dtype=dtype) for _ in range(3)]


@settings(max_examples=40)
@given(st.sampled_from([*SCORES, None]), st.floats(-3, 3), st.integers(0, 9), st.booleans())
def test_limited_values_have_exponentials(name, power, seed, double):
    dtype = torch.float64 if double else torch.float32
    score = None if name is None else bound(SCORES[name], dtype)
    q, k, v = attention_like(10**power, dtype, seed)
    if not limits.are_limited(Strength(0.5, score=score), q, k, v, (ALL, ALL)):
        return
    value = 0.5 * q @ k.mT
    if score is not None:
        places = torch.arange(LEN)
        pairs = {"b": torch.zeros(1, dtype=torch.int64), "h": torch.arange(2).view(2, 1, 1), "score": value}
        value = compute(score.expr, score.inputs, {**pairs, "q": places[:, None], "kv": places})[0]
    assert value.abs().max() <= 34
    lse = value.logsumexp(-1, keepdim=True)
    assert (value - lse).min() > torch.log(torch.tensor(torch.finfo(torch.float32).tiny))


@pytest.mark.parametrize(
    ("change", "limited"),
    [
        (lambda q, k, v: None, True),
        (lambda q, k, v: q.mul_(1e3), False),
        (lambda q, k, v: k[0, 1, 7].fill_(torch.nan), False),
        (lambda q, k, v: q[0, 0, 0].fill_(torch.inf), False),
        (lambda q, k, v: v.mul_(1e20), False),
        (lambda q, k, v: v.mul_(1e-20), False),
        (lambda q, k, v: v[0, 0, 3].fill_(torch.nan), False),
    ],
)
def test_what_may_overflow_underflow_or_is_no_number_is_not_limited(change, limited):
    q, k, v = attention_like(1, torch.float32)
    change(q, k, v)
    assert limits.are_limited(Strength(0.5), q, k, v, (ALL, ALL)) == limited


def test_a_cap_is_a_limit_whatever_the_products():
    q, k, v = attention_like(1, torch.float32)
    for cap, limited in ((30.0, True), (50.0, False)):
        score = bound(lambda score, b, h, q, kv, cap=cap: cap * torch.tanh(score / cap))
        assert limits.are_limited(Strength(1.0, score=score), 1e4 * q, k, v, (ALL, ALL)) == limited


def test_tokens_that_nobody_reads_count_for_nothing():
    q, k, v = attention_like(1, torch.float32)
    for x in (q, k, v):
        x[:, 1, 5] = torch.nan
    read = torch.ones(1, 2, LEN, dtype=torch.bool)
    read[:, 1, 5] = False
    assert limits.are_limited(Strength(0.5), q, k, v, (read, read))
    read[:, :, 5] = torch.tensor([False, True])
    assert not limits.are_limited(Strength(0.5), q, k, v, (read, read))


@pytest.mark.parametrize("factor", [1.0, 40.0, 1e4])
@pytest.mark.parametrize("name", [*SCORES, None])
def test_both_ways_equal_dense_attention(verdicts, name, factor):
    """Large products leave the first way where the value grows with them."""
    given = {} if name is None else {"score": SCORES[name]}
    mask = mf.causal() & mf.mask(lambda b, h, q, kv: (q % 7 != 3) & (q - kv < 90))
    assert_matches_dense(mask, Shape(1, 2, 1, LEN, LEN, 8, 8), scale=factor / 8, dropout_p=0.25, seed=3, **given)
    bounded_by_itself = name in ("capped", "by a gate", "by distance", "an angle")
    if bounded_by_itself or factor != 40:
        assert set(verdicts) == {bounded_by_itself or factor == 1.0}


@pytest.mark.parametrize(
    ("score", "factor", "left"),
    [
        (lambda score, b, h, q, kv: 4 * torch.tanh(score / 4), 0.25, 4),
        (lambda score, b, h, q, kv: torch.tanh(-1 * (2 * score / 8)) + q, -0.25, 4),
        (lambda score, b, h, q, kv: score * torch.tanh(score / 4), 1.0, 5),
        (lambda score, b, h, q, kv: torch.tanh(8 / score), 1.0, None),
        (lambda score, b, h, q, kv: torch.tanh(score * q), 1.0, None),
        (lambda score, b, h, q, kv: torch.tanh(score * 0.0), 1.0, None),
        (lambda score, b, h, q, kv: 3 * score, 3.0, 1),
    ],
)
def test_factors_of_the_score_are_peeled(score, factor, left):
    traced = trace(score, role=ROLES[torch.float32])
    inputs: Inputs = traced.bind({})
    expr, found = peeled(traced.expr, inputs.params)
    assert found == factor
    assert left is None or len(expr.nodes) == left
    x, places = torch.linspace(-3, 3, 49).view(7, 7), torch.arange(7)
    pairs = {"b": torch.zeros(1), "h": torch.zeros(1), "q": places[:, None], "kv": places}
    before, after = (compute(e, inputs, {**pairs, "score": y})[0] for e, y in ((traced.expr, x), (expr, x * found)))
    torch.testing.assert_close(before, after, equal_nan=True)
