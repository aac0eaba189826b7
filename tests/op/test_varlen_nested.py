"""Jagged nested tensors attend as the packed sequences that they hold."""

import pytest
import torch

import maskflash as mf
from tests.op.ragged import PREFIX, packed, starts


def nested(values, at, by_head):
    x = torch.nested.nested_tensor_from_jagged(values, at)
    return x.transpose(1, 2) if by_head else x


@pytest.mark.parametrize("by_head", [False, True])
def test_jagged(by_head):
    lengths, kv_lengths = [3, 0, 9], [5, 2, 9]
    q, k, v = packed(12, 16)
    at, kv_at = starts(lengths), starts(kv_lengths)
    inputs = [nested(x, of, by_head) for x, of in ((q, at), (k, kv_at), (v, kv_at))]
    attn = mf.compile(mf.prefix_lm(PREFIX))
    out, lse = attn(*inputs, q_offset=torch.tensor([2, 2, 0]), return_lse=True)
    assert out.is_nested and out.layout is torch.jagged
    assert out.shape[:3] == inputs[0].shape[:3] and lse.shape == inputs[0].shape[:3]
    (out, lse) = (x.transpose(1, 2) if by_head else x for x in (out, lse))
    expected = attn.varlen(q, k, v, at, kv_at, q_offset=torch.tensor([2, 2, 0]), return_lse=True)
    assert torch.equal(out.values(), expected[0]) and torch.equal(lse.values(), expected[1].T)
    found, wanted = (
        torch.autograd.grad(o.sin().sum() + x.masked_fill(x == -torch.inf, 0).sum(), (q, k, v))
        for o, x in ((out.values(), lse.values()), expected)
    )
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_gradients_reach_nested_leaves():
    q, k, v = (torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged) for _ in "qkv")
    k, v = (torch.nested.nested_tensor_from_jagged(x.values(), q.offsets()) for x in (k, v))
    q.requires_grad_()
    out = mf.attention(q, k, v, mf.causal())
    (out + q).values().sum().backward()  # of q's own form, so they add up
    assert q.grad.is_nested and q.grad.shape == q.shape
