"""Masks and scores whose kernels are text beside this file. Their line numbers are in it: append, don't insert."""

import torch

import maskflash as mf

SPANS = torch.tensor([64, 128, 256, 512], dtype=torch.int32)


@mf.mask
def packed(b, h, q, kv, *, doc):
    """Causal attention within documents, their numbers given at each call."""
    return q >= kv and doc[b, q] == doc[b, kv]


@mf.mask
def per_head(b, h, q, kv):
    """A causal window of each head's own."""
    return 0 <= q - kv < SPANS[h]


MASKS = {
    "causal": mf.causal(),
    "packed": packed,
    "sliding_window": mf.sliding_window(256),
    "natten": mf.natten(32, 32, 7, 7),
    "per_head": per_head,
    "columns": mf.ColumnIntervals(*torch.zeros(4, 1024, dtype=torch.int32), causal=True),
}


@mf.score
def softcap(score, b, h, q, kv, *, cap):
    """Scores that never leave (-cap, cap)."""
    return cap * torch.tanh(score / cap)


@mf.score
def relative(score, b, h, q, kv, *, table):
    """A bias that each head learns for each distance."""
    return score + table[h, q - kv]


SCORES = {
    "softcap": (softcap, {"cap": 30.0}),
    "relative": (relative, {"table": torch.zeros(4, 1024, requires_grad=True)}),
}
