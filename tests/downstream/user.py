"""What a user's own checked code looks like: `mypy --strict` against the installed wheel finds nothing in it."""

import torch
from torch import Tensor

import maskflash as mf


@mf.mask
def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *, doc: Tensor) -> bool | Tensor:
    return q >= kv and doc[b, q] == doc[b, kv]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn: mf.Attention = mf.compile(packed, scale=0.5, block_size=(64, 128), backend="cpu")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        return self.attn(q, k, v, doc=doc)


def presets_and_combinations(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask: mf.Mask = mf.causal() & mf.document(lengths=[300, 724]) | ~mf.sliding_window(256, right=1)
    mask = mask ^ (lambda b, h, q, kv: q % 2 == kv % 2)
    out: Tensor = mf.compile(mask)(q, k, v, q_offset=torch.tensor([0, 5]))
    first: Tensor = mf.attention(q, k, v, lambda b, h, q, kv: q >= kv)
    second, lse = mf.attention(q, k, v, mask, return_lse=True)
    third, _ = mf.compile(mask)(q, k, v, return_lse=True)
    return out + first + second + third * lse[..., None]


def questions(mask: mf.Mask) -> tuple[dict[str, int], float, bool, str]:
    block_map: mf.BlockMap = mask.block_map(1024, 1024, batch=2, block_size=64)
    dense: Tensor = mask.dense(16, 16)
    columns: mf.ColumnIntervals = mask.to_flashmask(1024, 1024)
    sight: mf.Sight = mask.at(1024, 1024, batch=2, q_offset=torch.tensor([0, 5]), kv_offset=3)
    runs: list[tuple[int, int]] = sight.row(5, b=1) + sight.column(5)
    dense = dense | sight.dense().any() | bool(runs)
    same: bool = bool(mf.equivalent(mask, columns, 1024, 1024)) and bool(dense.all())
    why: str = str(mf.compile(mask).explain(1024, 1024))
    return block_map.counts, block_map.sparsity, same, why


def with_the_error_named() -> str:
    try:
        mf.compile(mf.sliding_window(-1))
    except mf.ArgumentError as error:
        return str(error)
    return ""
