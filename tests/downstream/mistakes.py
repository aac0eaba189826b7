"""What a type checker has to find in a user's code: each marked line has an error of that kind, and no other line."""

from torch import Tensor

import maskflash as mf


def mistakes(q: Tensor, attn: mf.Attention, mask: mf.Mask) -> None:
    mf.causal(3)  # error: call-arg
    mf.compile(42)  # error: arg-type
    mf.compile(mask, backend="cuda")  # error: arg-type
    mf.compile(mask, blocksize=64)  # error: arg-type
    mf.sliding_window("256")  # error: arg-type
    mf.document(lengths="300, 724")  # error: arg-type
    attn(q, q)  # error: call-overload
    attn(q, q, [1.0])  # error: call-overload
    attn(q, q, q).lse  # error: attr-defined
    mask.block_map(1024).counts  # error: call-arg
    mask.block_map(1024, 1024).tiles  # error: attr-defined
    mask.dense("1024", 1024)  # error: arg-type
    mf.attend(q, q, q)  # error: attr-defined
    mask & 3  # error: operator
