"""The reference equals attention written as loops, hides what is hidden, and has a budget that means something."""

import math

import pytest
import torch

from maskflash.backends.reference import error_budget, reference


def naive(q, k, v, mask, scale):
    """Attention by the definition, one row at a time, in Python floats."""
    batch, heads, q_len, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, q_len, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                columns = [j for j in range(k.shape[2]) if mask[b, h, i, j]]
                scores = [scale * sum((q[b, h, i] * k[b, h // group, j]).tolist()) for j in columns]
                total = sum(math.exp(s) for s in scores)
                if columns:
                    lse[b, h, i] = math.log(total)
                for s, j in zip(scores, columns, strict=True):
                    out[b, h, i] += math.exp(s) / total * v[b, h // group, j]
    return out, lse


def problem(q_len=6, kv_len=9, heads=4, kv_heads=2):
    q = torch.randn(2, heads, q_len, 5, dtype=torch.float64)
    k, v = torch.randn(2, kv_heads, kv_len, 5, dtype=torch.float64), torch.randn(2, kv_heads, kv_len, 3).double()
    mask = torch.rand(2, heads, q_len, kv_len) < 0.4
    mask[0, 1, 2] = False
    mask[:, :, :, 4] = False
    return q, k, v, mask


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_it_is_attention_by_the_definition(heads, kv_heads):
    q, k, v, mask = problem(heads=heads, kv_heads=kv_heads)
    out, lse = reference(q, k, v, mask, 0.7)
    want_out, want_lse = naive(q, k, v, mask, 0.7)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_its_gradients_are_those_of_finite_differences():
    q, k, v, mask = problem(q_len=4, kv_len=6, heads=2, kv_heads=1)
    seen = mask.any(-1)

    def visible(q, k, v):
        out, lse = reference(q, k, v, mask, 0.7)
        return out, lse[seen]

    assert torch.autograd.gradcheck(visible, tuple(x.requires_grad_() for x in (q, k, v)))


def test_hidden_values_change_nothing():
    q, k, v, mask = problem()
    dirty = [x.clone() for x in (q, k, v)]
    dirty[0][0, 1, 2] = torch.nan
    dirty[1][:, :, 4] = torch.inf
    dirty[2][:, :, 4] = torch.nan

    def results(q, k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = reference(*leaves, mask, 0.7)
        return [out, lse, *torch.autograd.grad((out * out).sum() + lse.exp().sum(), leaves)]

    for got, want in zip(results(*dirty), results(q, k, v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 4), (4, 0), (0, 0)])
def test_empty_sequences(q_len, kv_len):
    q, k, v = torch.randn(1, 2, q_len, 3), torch.randn(1, 2, kv_len, 3), torch.randn(1, 2, kv_len, 5)
    out, lse = reference(q, k, v, torch.ones(1, 1, q_len, kv_len, dtype=torch.bool), 1.0)
    assert torch.equal(out, torch.zeros(1, 2, q_len, 5))
    assert torch.equal(lse, torch.full((1, 2, q_len), -torch.inf))


def test_the_budget_is_twice_the_plain_error_and_a_rounding_unit():
    exact = torch.tensor([1.0, -4.0, -torch.inf], dtype=torch.float64)
    plain = torch.tensor([1.25, -4.0, -torch.inf])
    assert error_budget(plain, exact) == 2 * 0.25 + torch.finfo(torch.float32).eps * 4
    assert error_budget(plain, exact, torch.bfloat16) == 2 * 0.25 + torch.finfo(torch.bfloat16).eps * 4
    assert error_budget(plain[2:], exact[2:]) == 0.0
