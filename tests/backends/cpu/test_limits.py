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
    "far below zero": lambda score, b, h, q, kv: 5 * torch.tanh(score / 5) - 200,
    "near the low end": lambda score, b, h, q, kv: 4 * torch.tanh(score / 4) - 28,
}
STEPS = {
    "floor of a quotient": lambda score, b, h, q, kv: torch.floor(score / 10),
    "floor of a product": lambda score, b, h, q, kv: torch.floor(score * 0.1),
    "division that rounds": lambda score, b, h, q, kv: (score / 10) // 1,
    "a comparison": lambda score, b, h, q, kv: torch.where(score / 10 >= 1, 2.0, -1.0),
    "a cast": lambda score, b, h, q, kv: (score / 5).int().float(),
}
ALL = torch.ones(1, 1, LEN, dtype=torch.bool)


def bound(score, dtype=torch.float32):
    traced = trace(score, role=ROLES[dtype])
    return BoundScore(traced.expr, traced.bind({}), (False,) * 9)


def are_limited(strength, q, k, v, read):
    return limits.are_limited(strength, q, k, v, read, limits.Largest.of(strength.scale, q, k, read))


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
    if not are_limited(Strength(0.5, score=score), q, k, v, (ALL, ALL)):
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
        (lambda q, k, v: v.mul_(1e-30), False),
        (lambda q, k, v: v[0, 1, 5].mul_(1e-30), False),  # others are large
        (lambda q, k, v: v[0, 1, 5].zero_(), True),
        (lambda q, k, v: (q.mul_(1e-23), k.mul_(1e24)), False),  # q's squares are 0 in float32
        (lambda q, k, v: (q.mul_(1e-17), k.mul_(1e17)), False),
        (lambda q, k, v: v[0, 0, 3].fill_(torch.nan), False),
    ],
)
def test_what_may_overflow_underflow_or_is_no_number_is_not_limited(change, limited):
    q, k, v = attention_like(1, torch.float32)
    change(q, k, v)
    assert are_limited(Strength(0.5), q, k, v, (ALL, ALL)) == limited


def test_a_cap_is_a_limit_whatever_the_products():
    q, k, v = attention_like(1, torch.float32)
    for cap, limited in ((30.0, True), (50.0, False)):
        score = bound(lambda score, b, h, q, kv, cap=cap: cap * torch.tanh(score / cap))
        assert are_limited(Strength(1.0, score=score), 1e4 * q, k, v, (ALL, ALL)) == limited


def test_tokens_that_nobody_reads_count_for_nothing():
    q, k, v = attention_like(1, torch.float32)
    for x in (q, k, v):
        x[:, 1, 5] = torch.nan
    read = torch.ones(1, 2, LEN, dtype=torch.bool)
    read[:, 1, 5] = False
    assert are_limited(Strength(0.5), q, k, v, (read, read))
    read[:, :, 5] = torch.tensor([False, True])
    assert not are_limited(Strength(0.5), q, k, v, (read, read))


@pytest.mark.parametrize("factor", [1.0, 40.0, 1e4])
@pytest.mark.parametrize("name", [*SCORES, None])
def test_both_ways_equal_dense_attention(verdicts, name, factor):
    """Large products leave the first way where the value grows with them."""
    given = {} if name is None else {"score": SCORES[name]}
    mask = mf.causal() & mf.mask(lambda b, h, q, kv: (q % 7 != 3) & (q - kv < 90))
    assert_matches_dense(mask, Shape(1, 2, 1, LEN, LEN, 8, 8), scale=factor / 8, dropout_p=0.25, seed=3, **given)
    if name == "far below zero":
        assert set(verdicts) == {False}
        return
    bounded_by_itself = name in ("capped", "by a gate", "by distance", "an angle", "near the low end")
    if bounded_by_itself or factor != 40:
        assert set(verdicts) == {bounded_by_itself or factor == 1.0}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_steps_stay_where_they_are(name, double):
    """Products of integers are exact, and lie on the steps."""
    draw = torch.Generator().manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    q, k = torch.randint(-3, 4, (2, 1, 2, 96, 16), generator=draw).to(dtype)
    v = torch.randn(1, 2, 96, 16, generator=draw, dtype=dtype)
    out = mf.attention(q, k, v, mf.causal(), score=STEPS[name], scale=1.0)
    value = STEPS[name](q.double() @ k.double().mT, *[None] * 4).double()
    exact = value.masked_fill(~mf.causal().dense(96, 96), -torch.inf).softmax(-1) @ v.double()
    assert (out - exact).abs().max() < 100 * torch.finfo(dtype).eps * v.abs().max()


def test_a_row_of_small_numbers_beside_large_ones():
    """Near the low end of what is limited, products with small numbers of v would be less than float32 holds."""
    score = SCORES["near the low end"]
    q, k, v = attention_like(1, torch.float32)
    v[:, 1] *= 1e-30
    out = mf.attention(q, k, v, score=score)
    alone = mf.attention(q[:, 1:], k[:, 1:], v[:, 1:] * 1e30, score=score)
    torch.testing.assert_close(out[:, 1:] * 1e30, alone)


@pytest.mark.parametrize("factor", [1e25, 1e-29])
def test_factors_that_overflow_in_parts_are_not_peeled(factor):
    q, k, v = attention_like(1e7 if factor > 1 else 1e12, torch.float32)
    v = v / v.abs().max()
    score = (
        (lambda s, b, h, q, kv: 4 * torch.tanh(s * factor))
        if factor > 1
        else (lambda s, b, h, q, kv: 4 * torch.tanh(s / factor))
    )
    out = mf.attention(q, k, v, score=score, scale=1.0)
    exact = (4 * torch.sign(q.double() @ k.double().mT)).softmax(-1) @ v.double()
    assert (out - exact).abs().max() < 1e-5


def test_a_token_that_one_head_of_a_group_reads_counts_for_the_group():
    q, k, v = attention_like(1, torch.float32)
    k, v = k[:, :1].clone(), v[:, :1].clone()
    k[:, 0, 5] = torch.nan
    read = torch.ones(1, 2, LEN, dtype=torch.bool)
    for head, limited in ((0, False), (1, True)):
        read[:, head, 5] = False
        assert are_limited(Strength(0.5), q, k, v, (ALL, read)) == limited


def test_a_row_that_sees_nothing_with_a_sink_far_below_zero():
    q, k, v = (x.requires_grad_() for x in attention_like(1, torch.float32))
    sinks = torch.full((2,), -1e4, requires_grad=True)
    mask = mf.causal() & mf.mask(lambda b, h, q, kv: q % 7 != 3)
    out = mf.attention(q, k, v, mask, sinks=sinks, dropout_p=0.25, seed=3)
    grads = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not out[:, :, 3::7].any()


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
