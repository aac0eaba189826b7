"""Sequences of several lengths, packed: their tensors, and where each starts."""

import torch

PREFIX = torch.tensor([3, 0, 7])  # of each of three


def starts(lengths):
    return torch.nn.functional.pad(torch.as_tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def packed(total, kv_total, dtype=torch.float32, heads=4, kv_heads=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((total, heads, 8), (kv_total, kv_heads, 8), (kv_total, kv_heads, 6))
    return [torch.randn(size, generator=draw, dtype=dtype).requires_grad_() for size in sizes]
