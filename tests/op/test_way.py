"""The way of one call: it checks its arguments once, binds its mask once and finds its analysis once."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import maskflash as mf
from maskflash.ground import qkv
from maskflash.op import attention, cache


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


DOC = torch.arange(96)[None].repeat(2, 1) // torch.tensor([[30], [50]])  # each batch row needs calls of its own


def inputs():
    return [torch.randn(2, 2, 96, 8, requires_grad=True) for _ in range(3)]


@pytest.fixture
def steps(monkeypatch):
    """How often each step was taken."""
    taken = Counter()

    def count(module, name, step):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            taken[step] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module, name, step in (
        (qkv, "check", "checked"),
        (attention.Attention, "_bound", "bound"),
        (cache, "named", "looked up by name"),
        (cache, "find", "looked up by key"),
        (cache, "analyse", "analysed"),
        (attention.autograd, "watched", "asked who watches"),
    ):
        count(module, name, step)
    cache.invalidate()
    return taken


def test_the_first_call_does_all_of_it_once_and_its_backward_nothing_again(steps):
    out = mf.compile(packed)(*inputs(), doc=DOC)
    asked = steps.pop("asked who watches")
    assert asked == 2  # of q, k and v before anything is bound; of the mask's tensors then
    once = ("checked", "bound", "looked up by name", "looked up by key", "analysed")
    assert steps == dict.fromkeys(once, 1)
    steps.clear()
    out.sum().backward()
    assert steps == {"asked who watches": 1}


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_call_like_one_before_is_looked_up_once_and_bound_once(steps, return_lse):
    attn = mf.compile(packed)
    attn(*inputs(), doc=DOC)
    steps.clear()
    attn(*inputs(), doc=DOC, return_lse=return_lse)
    assert steps == {"asked who watches": 1, "looked up by name": 1, "bound": 1}


def test_one_dense_call_like_one_before_is_not_even_bound(steps):
    attn = mf.compile(mf.causal())
    q, k, v = inputs()
    attn(q, k, v)
    steps.clear()
    attn(q, k, v)
    assert steps == {"asked who watches": 1, "looked up by name": 1}


class Watching(TorchDispatchMode):
    """Lets all ops through."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_call_that_is_watched_looks_once_in_each_pass(steps):
    with Watching():
        out = mf.compile(packed)(*inputs(), doc=DOC)
        assert (steps["looked up by key"], steps["bound"], steps["checked"]) == (1, 1, 1)
        steps.clear()
        out.sum().backward()
    assert (steps["looked up by key"], steps["bound"], steps["analysed"]) == (1, 0, 0)


def test_without_gradients_no_autograd_function_is_made(steps, monkeypatch):
    monkeypatch.setattr(attention.autograd._Forward, "apply", None)
    q, k, v = inputs()
    with torch.no_grad():
        mf.compile(packed)(q, k, v, doc=DOC)
    mf.compile(packed)(q.detach(), k.detach(), v.detach(), doc=DOC)
