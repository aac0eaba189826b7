"""torch.compile takes attention with scores and dropout whole, and other tables and seeds compile nothing anew."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import maskflash as mf

HEADS, DIM, N = 4, 8, 48


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@mf.score
def capped(score, b, h, q, kv, *, cap):
    return cap * torch.tanh(score / cap)


class Attend(nn.Module):
    """A layer that learns a bias, with a score function of its own."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 2 * N))
        self.attn = mf.compile(mf.causal(), score=(self.biased, capped))

    def biased(self, score, b, h, q, kv):
        return score + self.bias[h, kv - q + N]

    def forward(self, q, k, v, cap):
        return self.attn(q, k, v, cap=cap)


def tensors(length=N, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, length, DIM, generator=draw).to(dtype).requires_grad_() for _ in range(3)]


def compiled(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


def results(model, given, *args, of=()):
    out = model(*given, *args)
    return [out, *torch.autograd.grad(out.square().sum(), (*given, *of))]


def test_a_layer_that_learns_its_bias():
    layer = Attend()
    model, counter = compiled(layer)
    for cap in map(torch.tensor, (5.0, 2.5, 0.75, 30.0)):  # a float would be a constant of the graph
        given = tensors(seed=int(cap))
        expected = results(layer, given, cap, of=[layer.bias])
        found = results(model, given, cap, of=[layer.bias])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.no_grad():
        layer.bias.mul_(0.5)
    torch.testing.assert_close(model(*given, cap), layer(*given, cap), rtol=0, atol=0)
    assert counter.frame_count == 1
    torch.testing.assert_close(model(*given, 3.0), layer(*given, 3.0), rtol=0, atol=0)


def test_other_lengths():
    layer = Attend()
    model, counter = compiled(layer)
    for length in (48, 40, 33, 21, 7):
        given = tensors(length)
        torch.testing.assert_close(model(*given, 4.0), layer(*given, 4.0))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "score",
    [
        mf.scores.softcap(3.0),
        mf.scores.alibi(),
        mf.scores.alibi(symmetric=True),
        mf.scores.relative_bias(torch.randn(32, HEADS)),
        lambda score, b, h, q, kv: score if q - kv < 9 else -torch.inf,
        lambda score, b, h, q, kv: torch.where(score > 0, score, score * 0.1),
        (mf.scores.temperature(0.5), mf.scores.alibi()),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_of_every_kind(score, dtype):
    attn = mf.compile(mf.causal(), score=score)
    model, counter = compiled(lambda q, k, v: attn(q, k, v))
    given = tensors(dtype=dtype)
    for one, other in zip(results(model, given), results(attn, given), strict=True):
        torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_captured_tensors_and_numbers_may_be_replaced():
    held = {"table": torch.randn(N), "rate": 0.25}

    def score(score, b, h, q, kv):
        return score + held["table"][kv] - held["rate"] * (q - kv)

    attn = mf.compile(mf.causal(), score=score)
    model, counter = compiled(lambda q, k, v: attn(q, k, v))
    given = tensors()
    for place in range(4):
        held["table"] = torch.randn(N)
        torch.testing.assert_close(model(*given), attn(*given))
        assert counter.frame_count == 1, place
    held["rate"] = 0.5  # guarded as a constant: perhaps compiled again, never stale
    torch.testing.assert_close(model(*given), attn(*given))


def test_dropout_with_a_seed():
    attn = mf.compile(mf.causal(), score=capped)
    model, counter = compiled(lambda q, k, v, seed: attn(q, k, v, cap=2.0, dropout_p=0.3, seed=seed))
    given = tensors()
    for seed in (1, 2, 99):
        seed = torch.tensor([seed])
        found = results(model, given, seed)
        for one, other in zip(
            found, results(lambda q, k, v, s: attn(q, k, v, cap=2.0, dropout_p=0.3, seed=s), given, seed), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert counter.frame_count == 1
