"""Score functions in turn, copied, pickled, and with captures that change between calls."""

import copy
import pickle

import pytest
import torch

import maskflash as mf
from maskflash.errors import ArgumentTypeError
from maskflash.expr.nodes import parse
from maskflash.scores.score import ROLES, RecordedScore
from maskflash.trace.trace import trace

HEADS = torch.tensor([0.5, 1.5, -0.25], dtype=torch.float64)


def call(score, dtype=torch.float32, **given):
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()
    return mf.attention(q, k, v, mf.causal(), score=score, **given)


def doubled(score, b, h, q, kv):
    return score * 2


def capped(score, b, h, q, kv, *, cap):
    return cap * torch.tanh(score / cap)


def test_several_are_applied_in_turn():
    chained = mf.score((capped, doubled, mf.scores.alibi(HEADS.float())))
    assert chained.name == "capped, doubled, alibi(3 slopes)"
    assert chained.keywords == ("cap",)

    heads = HEADS.float()

    def written_out(score, b, h, q, kv, *, cap):
        return cap * torch.tanh(score / cap) * 2 + heads[h] * (kv - q)

    torch.testing.assert_close(call(chained, cap=2.0), call(written_out, cap=2.0))
    other = call((doubled, capped), cap=2.0)
    assert not torch.equal(other, call((capped, doubled), cap=2.0))
    assert mf.score((doubled,)).name == "doubled"
    assert mf.score(chained) is chained


def test_several_may_share_an_argument():
    sharp = mf.score(lambda score, b, h, q, kv, *, cap: score / cap)
    both = mf.score([capped, sharp])
    assert both.keywords == ("cap",)
    torch.testing.assert_close(call(both, cap=3.0), call(lambda score, b, h, q, kv: torch.tanh(score / 3.0)))


def test_pickles():
    decorated = mf.score(capped)
    again = pickle.loads(pickle.dumps(decorated))
    torch.testing.assert_close(call(again, cap=2.0), call(capped, cap=2.0), rtol=0, atol=0)
    table = torch.randn(16)
    local = mf.score(lambda score, b, h, q, kv: score * 0.5 + table[q])
    again = pickle.loads(pickle.dumps(local))
    assert isinstance(again, RecordedScore)
    torch.testing.assert_close(call(again), call(local), rtol=0, atol=0)
    with pytest.raises(ArgumentTypeError, match="as float32 scores need it"):
        call(again, torch.float64)
    preset = pickle.loads(pickle.dumps(mf.scores.relative_table(torch.randn(3, 9))))
    call(preset)
    for name in ("softcap", "temperature"):
        made = getattr(mf.scores, name)(2.5)
        torch.testing.assert_close(call(pickle.loads(pickle.dumps(made))), call(made), rtol=0, atol=0)


@pytest.mark.parametrize("score", [mf.scores.alibi(), (mf.scores.alibi(), mf.scores.softcap(4.0))])
def test_pickles_of_what_depends_on_the_call(score):
    made = mf.score(score)
    expected = call(made)
    torch.testing.assert_close(call(pickle.loads(pickle.dumps(made))), expected, rtol=0, atol=0)


def test_copies():
    table = torch.randn(16, requires_grad=True)
    local = mf.score(lambda score, b, h, q, kv: score + table[q])
    again = copy.deepcopy(local)
    before = call(local)
    torch.testing.assert_close(call(again), before)
    with torch.no_grad():
        table.mul_(0.0)
    torch.testing.assert_close(call(again), before, rtol=0, atol=0)
    assert copy.deepcopy(mf.score(capped)).name == "capped"
    chained = mf.score((capped, mf.scores.alibi(), local))
    again = copy.deepcopy(chained)
    before = call(chained, cap=2.0)
    torch.testing.assert_close(call(again, cap=2.0), before, rtol=0, atol=0)
    with torch.no_grad():
        table.add_(torch.arange(16))
        table[3:].mul_(0.0)
    torch.testing.assert_close(call(again, cap=2.0), before, rtol=0, atol=0)


def test_captures_are_looked_up_at_each_call():
    held = {"table": torch.zeros(16), "rate": 0.0}

    def function(score, b, h, q, kv):
        return score + held["table"][kv] - held["rate"] * (q - kv)

    score = mf.score(function)
    attn = mf.compile(mf.causal(), score=score)
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    plain = mf.attention(q, k, v, mf.causal())
    torch.testing.assert_close(attn(q, k, v), plain)
    held["table"] = torch.randn(16)
    changed = attn(q, k, v)
    assert not torch.allclose(changed, plain)
    held["table"].zero_()
    torch.testing.assert_close(attn(q, k, v), plain)
    held["rate"] = 0.5
    torch.testing.assert_close(
        attn(q, k, v), mf.attention(q, k, v, mf.causal(), score=mf.scores.alibi(torch.full((2,), 0.5)))
    )


def test_a_module_s_parameter_is_learned_and_may_be_replaced():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2, 17))
            self.attn = mf.compile(mf.causal(), score=self.score)

        def score(self, score, b, h, q, kv):
            return score + self.bias[h, kv - q + 8]

        def forward(self, q, k, v):
            return self.attn(q, k, v)

    layer = Layer()
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    layer(q, k, v).square().sum().backward()
    assert layer.bias.grad[:, :9].any()
    assert not layer.bias.grad[:, 9:].any()  # the future
    first = layer.bias.grad
    layer.bias = torch.nn.Parameter(torch.ones(2, 17))
    layer(q, k, v).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, first)  # the same for all keys changes nothing
    again = copy.deepcopy(layer)
    with torch.no_grad():
        again.bias[0, 8] = 5.0
    assert not torch.allclose(again(q, k, v)[:, 0], layer(q, k, v)[:, 0])
    torch.testing.assert_close(again(q, k, v)[:, 1], layer(q, k, v)[:, 1])


def test_text_is_the_structure():
    """Numbers and tables are slots, so one text serves them all."""
    function = lambda score, b, h, q, kv, *, n, t: score + n * q + t[kv]  # noqa: E731
    texts = {trace(function, {"n": n, "t": torch.randn(n)}, role=ROLES[torch.float32]).expr.text for n in (1, 2, 99)}
    assert len(texts) == 1
    (text,) = texts
    assert parse(text).text == text
