"""Turns packed bytes into attention's inputs, and names the two ways of computing it: maskflash and torch's SDPA."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import maskflash as mf
from maskflash.demo.documents import Packed

HEADS, HEAD_DIM, EMBEDDING = 8, 64, 256
SCALE = HEAD_DIM**-0.5

Forward = Callable[[], Tensor]


@mf.mask
def packed(b, h, q, kv, *, doc):  # type: ignore[no-untyped-def]  # written as a user writes it
    """Each token sees the earlier tokens of its own document."""
    return q >= kv and doc[b, q] == doc[b, kv]


@dataclass(frozen=True, slots=True)
class Workload:
    """What attention is given: (1, 8, S, 64) tensors, and the gradients that arrive at out and lse.

    Attributes:
        q, k, v: projections of the embedded bytes; they require gradients.
        ids: (1, S) int32, the document of each token.
        dout: (1, 8, S, 64), the gradient of out.
        dlse: (1, 8, S) float32, the gradient of lse.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    dout: Tensor
    dlse: Tensor


def build(documents: Packed, dtype: torch.dtype, seed: int) -> Workload:
    """Embed the bytes and project them, with seeded random weights scaled so that scores have variance one."""
    draw = torch.Generator().manual_seed(seed)
    length = len(documents.tokens)
    embedded = torch.randn(256, EMBEDDING, generator=draw)[documents.tokens]

    def heads(flat: Tensor) -> Tensor:
        split: Tensor = flat.unflatten(-1, (HEADS, HEAD_DIM))  # (S, H, D)
        return split.transpose(0, 1)[None].contiguous().to(dtype)

    def projected() -> Tensor:
        weight = torch.randn(EMBEDDING, HEADS * HEAD_DIM, generator=draw) * EMBEDDING**-0.5
        return heads(embedded @ weight).requires_grad_()

    return Workload(
        q=projected(),
        k=projected(),
        v=projected(),
        ids=documents.ids,
        dout=heads(torch.randn(length, HEADS * HEAD_DIM, generator=draw)),
        dlse=torch.randn(1, HEADS, length, generator=draw),
    )


def dense_mask(ids: Tensor) -> Tensor:
    """The mask written with torch alone, (1, 1, S, S) bool: what the compiled one is checked against."""
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return same.tril_()


def ours(work: Workload) -> Forward:
    """Maskflash's forward on this workload; its first call analyses the mask."""
    return partial(mf.compile(packed, scale=SCALE, backend="cpu"), work.q, work.k, work.v, doc=work.ids)


def sdpa(work: Workload) -> Forward:
    """Torch's `scaled_dot_product_attention` on this workload, under the dense mask."""
    mask = dense_mask(work.ids)
    return partial(
        torch.nn.functional.scaled_dot_product_attention,
        work.q,
        work.k,
        work.v,
        attn_mask=mask,
        scale=SCALE,
    )


CONTENDERS: dict[str, Callable[[Workload], Forward]] = {"maskflash": ours, "sdpa": sdpa}
