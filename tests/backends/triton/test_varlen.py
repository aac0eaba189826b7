"""Packed sequences by the Triton kernels, interpreted: what the CPU's engine gives."""

import pytest
import torch

import maskflash as mf

STARTS, KV_STARTS = torch.tensor([0, 5, 5, 20, 37]), torch.tensor([0, 9, 12, 27, 50])
PREFIX = torch.tensor([2, 0, 5, 9])


@pytest.mark.parametrize(
    ("mask", "score", "q_offset"),
    [
        (mf.sliding_window(6), None, 0),
        (mf.prefix_lm(PREFIX), mf.scores.alibi(), KV_STARTS.diff() - STARTS.diff()),
        (mf.mask(lambda b, h, q, kv: (q + kv + b) % 3 != 0), mf.scores.softcap(2.0), 0),
    ],
)
def test_the_cpu_and_triton_agree(mask, score, q_offset):
    draw = torch.Generator().manual_seed(0)
    sizes = (37, 4, 16), (50, 2, 16), (50, 2, 16)
    inputs = [torch.randn(size, generator=draw).requires_grad_() for size in sizes]
    found = []
    for backend in ("triton", "cpu"):
        how = {"score": score, "q_offset": q_offset, "backend": backend, "block_size": 16, "return_lse": True}
        out, lse = mf.varlen_attention(*inputs, mask, STARTS, KV_STARTS, **how)
        total = out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        found.append((out, lse, *torch.autograd.grad(total, inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
