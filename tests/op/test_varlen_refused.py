"""Packed sequences, and nested tensors, that can't be: what is said of them."""

import pytest
import torch

import maskflash as mf
from tests.op.ragged import PREFIX, packed


def good():
    q, k, v = packed(8, 9)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": torch.tensor([0, 3, 8]), "cu_seqlens_k": torch.tensor([0, 4, 9])}


NESTED = torch.nested.nested_tensor([torch.randn(3, 4, 8)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q is a? ?None"),
        (
            {"k": torch.randn(1, 4, 9, 8)},
            ValueError,
            r"k has shape \(1, 4, 9, 8\), expected \(tokens, heads, head_dim\); ",
        ),
        ({"v": torch.randn(8, 2, 6)}, ValueError, "k has 2 heads of 9 tokens and v 2 of 8"),
        ({"q": torch.randn(8, 3, 8)}, ValueError, "q has 3 heads and k 2"),
        ({"q": NESTED}, TypeError, "q is nested"),
        ({"cu_seqlens_q": [0, 3, 8]}, TypeError, r"cu_seqlens_q is \[0, 3, 8\], expected a Tensor"),
        ({"cu_seqlens_q": torch.tensor([0.0, 3, 8])}, TypeError, "cu_seqlens_q has dtype torch.float32"),
        ({"cu_seqlens_k": torch.tensor([[0, 4, 9]])}, ValueError, r"cu_seqlens_k has shape \(1, 3\), expected a 1-d"),
        ({"cu_seqlens_k": torch.tensor([], dtype=torch.int64)}, ValueError, "cu_seqlens_k is empty"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, ValueError, "cu_seqlens_q has 2 sequences and cu_seqlens_k 1"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 8])}, ValueError, "cu_seqlens_q begins with 1, expected 0"),
        ({"cu_seqlens_q": torch.tensor([3, 5])}, ValueError, "cu_seqlens_q has 1 sequences"),
        ({"cu_seqlens_k": torch.tensor([0, 10, 9])}, ValueError, "cu_seqlens_k goes from 10 to 9 at 2"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 8])}, ValueError, "cu_seqlens_k ends with 8, expected 9"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 8], device="meta")}, ValueError, "cu_seqlens_q is on meta"),
        ({"q_offset": torch.tensor([1, 2, 3])}, ValueError, r"q_offset has shape \(3,\), expected \(2,\)"),
        ({"q_offset": torch.tensor([1, 2**61])}, ValueError, "an entry of q_offset is 2305843009213693952"),
        ({"q_offset": 1.5}, TypeError, "q_offset is 1.5"),
        ({"sinks": torch.randn(3)}, ValueError, "sinks have shape"),
        ({"return_lse": 1}, TypeError, "return_lse is 1"),
        ({"dropout_p": 0.1}, ValueError, "dropout is asked for, expected none"),
        ({"seed": 1}, ValueError, "dropout is asked for, expected none"),
        ({"kv_offset": 1}, TypeError, "unexpected argument 'kv_offset'"),
        ({"max_seqlen_q": 5}, TypeError, "unexpected argument 'max_seqlen_q'; leave it out"),
        ({"causal": True}, TypeError, "unexpected argument 'causal'; the mask is the fourth argument: mf.causal()"),
        ({"mask": mf.padding([1, 2, 3])}, ValueError, "batch is 2, expected 3 as in the tables of padding"),
        ({"mask": mf.document([100])}, ValueError, "add up to 100 tokens"),
        ({"mask": torch.ones(8, 9, dtype=torch.bool)}, mf.UnsupportedMask, "tensor of 8 x 9 has a place for each row"),
        (
            {"mask": mf.causal() & mf.causal().to_flashmask(8, 8)},
            mf.UnsupportedMask,
            "ColumnIntervals.* has a place for each row and column of a call",
        ),
        ({"mask": lambda b, h, q, kv: PREFIX[q] > kv}, mf.MaskIndexError, "PREFIX"),
    ],
)
@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message) as caught:
        mf.varlen_attention(**{"mask": mf.causal(), **good(), **change})
    assert isinstance(caught.value, mf.MaskflashError)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.randn(1, 2, 3, 8)}, TypeError, "k is of layout torch.strided, expected nested"),
        ({"v": None}, TypeError, "v is"),
        ({"k": NESTED.transpose(1, 2)}, ValueError, "1 sequences along dimension 1, 1 sequences along dimension 2"),
        ({"q": NESTED.values()[None]}, TypeError, "k is nested, expected a dense tensor; calls"),
        (
            {name: torch.nested.nested_tensor([torch.randn(3, 8)], layout=torch.jagged) for name in "qkv"},
            ValueError,
            "q is nested with 3 dimensions",
        ),
        ({"kv_offset": 2}, ValueError, "kv_offset is given with nested tensors"),
        ({"dropout_p": 0.5}, ValueError, "dropout is asked for"),
    ],
)
def test_bad_nested_input(change, error, message):
    with pytest.raises(error, match=message):
        mf.attention(**{**dict.fromkeys("qkv", NESTED), "mask": mf.causal(), **change})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_old_layout_are_refused():
    old = torch.nested.nested_tensor([torch.randn(3, 4, 8)])
    with pytest.raises(mf.ArgumentTypeError, match=r"q is of layout torch.strided, .* layout=torch.jagged\) makes one"):
        mf.attention(old, old, old, mf.causal())
