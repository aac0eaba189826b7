"""Plain Python over a score becomes a program with the same values; what can't is refused by name, line and fix."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import maskflash as mf
from maskflash.errors import ArgumentError, ArgumentTypeError, MaskTraceError
from maskflash.functions import written
from maskflash.scores.score import ROLES
from maskflash.trace.trace import trace
from tests.scores.pairs import agrees, pair_by_pair, traced

T = torch.linspace(-1, 2, 16, dtype=torch.float64)
HEADS = torch.tensor([0.5, 1.5, -0.25], dtype=torch.float64)
GRID = torch.linspace(-2, 2, 7 * 6, dtype=torch.float64).view(7, 6)
INDEX = torch.tensor([3, 0, 6, 5, 1, 2, 4])
ROW, COLUMN = torch.randn(2, 3, 7, 8), torch.randn(2, 6, 8)
SCALAR = torch.tensor(0.75, dtype=torch.float64)

# ------------------------------------------------------------------------------------------------------ plain Python


def branches_on_positions(score, b, h, q, kv):
    if q == kv:
        return score + 1.0
    elif kv < 2:
        return score * T[kv]
    if h == 1 and q > kv:
        score = score - T[q]
    return score


def branches_on_the_score(score, b, h, q, kv):
    if score > 3:
        return 3 + 0.1 * (score - 3)
    elif score < -2 or (score < 0 and q > kv):
        return -2.0
    return score


def loops(score, b, h, q, kv):
    for i in range(4):
        score = score + T[(q + i) % 16] / (i + 1)
    for weight in (0.25, 0.5):
        if q - kv > 2:
            score = score * weight
    return score


def many_choices(score, b, h, q, kv):
    for i in range(20):  # each an expression, not two ways for the rest
        score = score + (T[i % 16] if q > i else 0.0)
    return score


def with_helpers(score, b, h, q, kv):
    def distance(x, y):
        return abs(x - y) if x > y else 2 * (y - x)

    def decayed(x, by):
        return x - 0.1 * by

    return decayed(score, by=distance(q, kv)) * (lambda x: 1 + x)(T[kv])


def early_return(score, b, h, q, kv):
    if q < kv:
        return float("-inf")
    return score


PYTHON = [
    branches_on_positions,
    branches_on_the_score,
    loops,
    many_choices,
    with_helpers,
    early_return,
    lambda score, b, h, q, kv: score if q >= kv else -math.inf,
    lambda score, b, h, q, kv: score if score > 0 else 0,
    lambda score, b, h, q, kv: (0 if q > kv else 1 if q == kv else score) * 2.5,
    lambda score, b, h, q, kv: min(max(score, -3), 3.0) * 2,
    lambda score, b, h, q, kv: max(score, T[q], HEADS[h]) + min(q, kv, 3),
    lambda score, b, h, q, kv: score * max(1, torch.log(q + 1.0)),
    lambda score, b, h, q, kv: score * (q >= kv) - 2.5 * (q == kv),
    lambda score, b, h, q, kv: score + (T[q] and HEADS[h]),
    lambda score, b, h, q, kv: -score + abs(score) / 2 - (score - 1) ** 2,
    lambda score, b, h, q, kv: score // 2 + score % 1.5,
    lambda score, b, h, q, kv: score * 2.0 ** (-8.0 * (h + 1) / 3) + 2**h,
    lambda score, b, h, q, kv: abs(score) ** 1.5 + abs(score) ** -2 + T[3] ** h,
    lambda score, b, h, q, kv: 3.0 * math.tanh(score / 3.0) + math.log(1 + abs(q - kv) * 1.0) * math.exp(-h),
    lambda score, b, h, q, kv: math.sqrt(score * score + 1) + math.log1p(q) * math.pow(0.5, h),
    lambda score, b, h, q, kv: 1.0,
    lambda score, b, h, q, kv: T[q],
    lambda score, b, h, q, kv: GRID[INDEX[q], kv] + score * GRID[q, INDEX[kv] % 6],
    lambda score, b, h, q, kv: score * SCALAR + T[5],
    lambda score, b, h, q, kv: score + 0.5 * ((q ^ kv) & 3),
    lambda score, b, h, q, kv: sum(T[q - i] for i in range(3)) + score,
]


@pytest.mark.parametrize("function", PYTHON, ids=range(len(PYTHON)))
def test_python_is_python(function):
    agrees(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda score, b, h, q, kv: torch.where(q >= kv, score, -torch.inf),
        lambda score, b, h, q, kv: score.masked_fill(q < kv, -torch.inf) + torch.zeros_like(score),
        lambda score, b, h, q, kv: torch.where(score > 1, score, T[q]),
        lambda score, b, h, q, kv: score.where(q >= kv, score.new_full((), -1e4)),
        lambda score, b, h, q, kv: torch.tanh(score / 5).mul(5).add(T[q]).sub(1).div(2).neg(),
        lambda score, b, h, q, kv: score.clamp(-1, 2) + score.clamp(min=0.5) + torch.clamp_max(score, T[q]),
        lambda score, b, h, q, kv: score.relu() + F.relu(score) + torch.relu(-score),
        lambda score, b, h, q, kv: F.softplus(score) + F.softplus(score, beta=2.0, threshold=3.0),
        lambda score, b, h, q, kv: F.silu(score) + F.sigmoid(score) + F.tanh(score) + F.logsigmoid(score),
        lambda score, b, h, q, kv: score.exp().log1p() + score.square().sqrt() + score.abs().log2() + score.expm1(),
        lambda score, b, h, q, kv: torch.sin(score.cos()) + torch.atan(score).tan() + score.erf() + score.exp2(),
        lambda score, b, h, q, kv: torch.pow(score.abs(), 0.3) + torch.pow(2.0, score) + score.abs().rsqrt(),
        lambda score, b, h, q, kv: score.reciprocal() + 1 / score + torch.float_power(score, 2),
        lambda score, b, h, q, kv: torch.maximum(score, T[kv]) - torch.minimum(T[q], HEADS[h]),
        lambda score, b, h, q, kv: score.floor() + score.round() + score.ceil() + score.trunc(),
        lambda score, b, h, q, kv: torch.fmod(score, 0.7) + torch.remainder(score, 0.7),
        lambda score, b, h, q, kv: score.long() * 0.5 + (score > 0).double() + q.double() / (kv.to(score) + 1),
        lambda score, b, h, q, kv: score.to(T.dtype).type_as(T) + torch.tensor(0.5) + torch.logical_not(q > kv) * 1.0,
    ],
    ids=range(18),
)
def test_torchs_functions_and_methods(function):
    agrees(function)


def test_positions_may_be_numbers():
    agrees(branches_on_positions, index=int)
    agrees(lambda score, b, h, q, kv: score + HEADS[h] * abs(q - kv) / 2 ** (h + 1), index=int)


def test_keyword_tensors_and_numbers():
    def function(score, b, h, q, kv, *, bias, cap, shift, step=2):
        return cap * torch.tanh(score / cap) + bias[b, (q + shift) // step]

    bias = torch.randn(2, 7, dtype=torch.float64)
    for cap, shift in ((5.0, 1), (0.3, 0)):
        given = {"bias": bias, "cap": cap, "shift": shift}
        found = trace(function, {**given, "step": 2}, role=ROLES[torch.float64])
        assert found.tables == ("bias",)
        assert {"cap", "shift"} <= set(found.params)
        assert found.specialised == {"step"}
        torch.testing.assert_close(traced(function, **given, step=2), pair_by_pair(function, **given))
    with_table = lambda score, b, h, q, kv, *, x: score * x  # noqa: E731
    agrees(with_table, x=SCALAR)


@pytest.fixture
def traces(monkeypatch):
    found = []
    real = written.trace
    monkeypatch.setattr(written, "trace", lambda *args: found.append(args) or real(*args))
    return found


def call(score, dtype=torch.float32, **given):
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()
    return mf.attention(q, k, v, mf.causal(), score=score, **given)


def test_other_numbers_and_tensors_are_no_other_trace(traces):
    held = SimpleNamespace(cap=3.0, table=T)

    @mf.score
    def function(score, b, h, q, kv, *, shift, limit):
        return held.cap * torch.tanh(score / held.cap) + held.table[q + shift] * limit

    found = []
    for calls in range(1, 9):
        held.cap, held.table = 0.5 * calls, torch.randn(16)
        out = call(function, shift=calls % 3, limit=0.25 * calls)
        expected = call(
            lambda score, b, h, q, kv, cap=held.cap, table=held.table, n=calls % 3, by=0.25 * calls: (
                cap * torch.tanh(score / cap) + table[q + n] * by
            )
        )
        torch.testing.assert_close(out, expected)
        found.append(out)
    assert len([args for args in traces if args[0] is function.function]) == 1
    assert all(not torch.equal(x, y) for x, y in pairwise(found))


def test_float64_has_a_trace_of_its_own():
    seen = mf.score(lambda score, b, h, q, kv: score.square() * T[q])
    assert seen.at(torch.float64).role.dtype == torch.float64
    assert all(seen.at(dtype) is seen for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert call(seen, torch.float64).dtype == torch.float64
    assert call(seen).dtype == torch.float32
    double = trace(seen.function, role=ROLES[torch.float64]).expr
    assert {node.dtype for node in double.nodes if node.dtype.is_floating_point} == {torch.float64}


def test_the_value_has_the_scores_dtype():
    for dtype in (torch.float32, torch.float64):
        for function in (
            lambda score, b, h, q, kv: score + T.double()[q],
            lambda score, b, h, q, kv: score.half(),
            lambda score, b, h, q, kv: 0.5,
        ):
            root = trace(function, role=ROLES[dtype]).expr.nodes[-1]
            assert (root.dtype, root.weak) == (dtype, False)


# ruff: noqa: E501 (a case to a line)
# -------------------------------------------------------------------------------------------------------- refusals


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()


def forgets(score, b, h, q, kv):
    if q > kv:
        return score


def sometimes_an_int(score, b, h, q, kv):
    if q > kv:
        return 0
    return score


ROWS = "`torch.cat([q, qr / scale], -1)` and `torch.cat([k, kr], -1)` as q and k, and give `scale=`"


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        (lambda score, b, h, q, kv: Own.apply(score), "Own.apply", ["own derivative can't be followed", "its forward"]),
        (lambda score, b, h, q, kv: q - kv, None, ["returns a float, got torch.int64", "`score + bias[q]`"]),
        (lambda score, b, h, q, kv: 3, None, ["returns a float, got int"]),
        (lambda score, b, h, q, kv: q >= kv, None, ["got torch.bool", "a truth is a mask", "float('-inf')"]),
        (lambda score, b, h, q, kv: True, None, ["got bool", "a truth is a mask"]),
        (lambda score, b, h, q, kv: None, None, ["got NoneType", "Is a `return` missing?"]),
        (forgets, None, ["a score function returns a float, got NoneType", "Is a `return` missing?"]),
        (sometimes_an_int, None, ["returns a float, got int"]),
        (lambda score, b, h, q, kv: (score, q), None, ["got tuple"]),
        (lambda score, b, h, q, kv: math.gamma(score), "math.gamma(score)", ["needs a concrete value", "not math's"]),
        (lambda score, b, h, q, kv: float(score), "float(score)", ["needs a concrete value"]),
        (lambda score, b, h, q, kv: score.item() * 2, "score.item()", ["needs a concrete value"]),
        (lambda score, b, h, q, kv: score.mul_(2), "score.mul_", ["writes to a tensor", "Use what `mul` returns"]),
        (lambda score, b, h, q, kv: torch.relu_(score), "torch.relu_(score)", ["writes to a tensor", "`relu`"]),
        (lambda score, b, h, q, kv: F.relu(score, inplace=True), None, ["writes to a tensor", "instead of `inplace=`"]),
        (lambda score, b, h, q, kv: torch.tanh(score, out=T), None, ["writes to a tensor", "instead of `out=`"]),
        (lambda score, b, h, q, kv: score.detach() + T[q], "score.detach()", ["keeps a gradient from", "Detach tensors before"]),
        (lambda score, b, h, q, kv: score + T.detach()[q], "T.detach()", ["keeps a gradient from"]),
        (lambda score, b, h, q, kv: torch.softmax(score, -1), None, ["uses `softmax`, which has no derivative here", "Scores may use"]),
        (lambda score, b, h, q, kv: score.sinh(), "score.sinh", ["uses `.sinh`, which has no derivative here"]),
        (lambda score, b, h, q, kv: score + torch.rand(()), "torch.rand(())", ["draws random numbers"]),
        (lambda score, b, h, q, kv: F.dropout(score), None, ["uses `dropout`"]),
        (lambda score, b, h, q, kv: score + T.cumsum(0)[q], "T.cumsum(0)", ["would be frozen", "Compute it outside"]),
        (lambda score, b, h, q, kv: score + T, "score + T", ["a whole tensor of shape (16,)", "one index per dimension"]),
        (lambda score, b, h, q, kv: score + (ROW[b, h, q] * COLUMN[b, kv]).sum(), "ROW[b, h, q] * COLUMN[b, kv]", [ROWS]),
        (lambda score, b, h, q, kv: score + ROW[b, h, q] @ COLUMN[b, kv], "ROW[b, h, q] @ COLUMN[b, kv]", [ROWS]),
        (lambda score, b, h, q, kv: score + torch.dot(ROW[b, h, q], COLUMN[b, kv]), None, ["`dot` on a whole tensor", ROWS]),
        (lambda score, b, h, q, kv: score + torch.einsum("d,d->", ROW[b, h, q], COLUMN[b, kv]), None, [ROWS]),
        (lambda score, b, h, q, kv: score + ROW[b, h, q].dot(COLUMN[b, kv]), "ROW[b, h, q].dot", [ROWS]),
        (lambda score, b, h, q, kv: score + F.cosine_similarity(ROW[b, h, q], COLUMN[b, kv], 0), None, [ROWS]),
    ],
    ids=range(30),
)  # fmt: skip
def test_what_is_refused(function, code, words):
    with pytest.raises(MaskTraceError) as caught:
        mf.score(function)
    message = str(caught.value)
    assert f"{__file__}:" in message
    for word in (*words, *([f': "{code}" '] if code else [])):
        assert word in message
    assert message.endswith((".", "?"))


def test_a_product_of_rows_is_one_of_longer_q_and_k():
    """What the refusal says to do, held against the scores that it is to replace."""
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64).unbind()
    rows, columns = torch.randn(2, 3, 7, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    scale = 4**-0.5
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    bias = (rows @ columns[:, None].mT).masked_fill(~mask, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    longer = torch.cat([q, rows / scale], -1), torch.cat([k, columns[:, None].expand(-1, 3, -1, -1)], -1)
    torch.testing.assert_close(mf.attention(*longer, v, mf.causal(), scale=scale), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (mf.causal(), ["score is a", "expected a function f(score, b, h, q, kv)", "the first argument of compile"]),
        ([mf.scores.softcap(3.0), mf.causal()], ["the first argument of compile"]),
        (lambda b, h, q, kv: q >= kv, ["takes (score, b, h, q, kv), got (b, h, q, kv)", "A mask is given first"]),
        (lambda s, q: s, ["takes (score, b, h, q, kv), got (s, q)"]),
        (mf.scores.softcap, ["got softcap, which makes a score function; call it: mf.scores.softcap(cap)"]),
        (mf.scores.alibi, ["call it: mf.scores.alibi()"]),
        (mf.scores.relative_bias, ["call it: mf.scores.relative_bias(table)"]),
        ((), ["score is empty"]),
        (None, ["score is a NoneType"]),
        (torch.ones(3), ["score is a Tensor"]),
        (torch.tanh, ["pass a function f(score, b, h, q, kv)"]),
    ],
    ids=range(11),
)
def test_what_is_no_score_function(given, words):
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        mf.score(given)
    for word in words:
        assert word in str(caught.value)


def test_a_score_function_is_no_mask():
    with pytest.raises(ArgumentError, match=r"A score function is given as `score=`"):
        mf.mask(lambda score, b, h, q, kv: score)
    with pytest.raises(ArgumentError, match=r"A score function is given as `score=`"):
        mf.mask(mf.scores.softcap(3.0))


def test_an_index_must_not_depend_on_the_score():
    with pytest.raises((ArgumentError, MaskTraceError), match="depends on the score"):
        call(lambda score, b, h, q, kv: T[score.long()])
