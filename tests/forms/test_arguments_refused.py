"""Arguments of kernels with fixed masks that mean nothing, or don't fit the call, and what is said of them."""

import pytest
import torch

import maskflash as mf


@pytest.mark.parametrize(
    ("library", "given", "says"),
    [
        ("flash", {}, 'library is \'flash\', expected "flash_attn", "flash_attn_varlen"'),
        (
            "flash_attn",
            {"softcap": 30.0},
            r"'softcap' of flash_attn; it is no part of the mask; here: score=mf.scores.s",
        ),
        ("flash_attn", {"alibi_slopes": None}, r"here: score=mf.scores.alibi\(slopes, symmetric=True\)"),
        ("flash_attn", {"dropout_p": 0.1}, r"here: it is an argument of each call"),
        ("flash_attn", {"softmax_scale": 0.1}, r"here: scale="),
        ("flash_attn", {"cu_seqlens_q": [0, 4]}, "it is one of flash_attn_varlen"),
        ("flash_attn", {"windows": 4}, "its mask is in causal, window_size"),
        ("flash_attn", {"window_size": 4}, r"window_size is 4, expected \(left, right\), -1 for no end"),
        ("flash_attn", {"window_size": (4, -2)}, "an entry of window_size is -2, expected at least -1"),
        ("flash_attn", {"causal": 1}, "causal is 1, expected True or False"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 4]}, "flash_attn_varlen needs cu_seqlens_k"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 2, 4]}, "cu_seqlens_q 1, cu_seqlens_k 2"),
        ("flash_attn_varlen", {"cu_seqlens_q": [1, 4], "cu_seqlens_k": [0, 4]}, r"begins with \[1, 4\], expected 0"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 4, 2], "cu_seqlens_k": [0, 4, 4]}, r"begins with \[0, 4, 2\]"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 2**40], "cu_seqlens_k": [0, 4]}, "expected at most 2,147,483,647"),
        (
            "flash_attn_varlen",
            {"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 4], "max_seqlen_k": 3},
            "max_seqlen_k is 3, expected at least 4, the longest of cu_seqlens_k",
        ),
        (
            "torch_varlen",
            {"cu_seq_q": [0, 4], "cu_seq_k": [0, 4], "seqused_k": [5]},
            r"seqused_k\[0\] is 5, expected at",
        ),
        ("torch_varlen", {"cu_seq_q": [0, 4], "cu_seq_k": [0, 4], "seqused_k": [-5]}, "seqused_k holds -5"),
        ("torch_varlen", {"cu_seq_q": [0, 4], "cu_seq_k": [0, 4], "block_table": 0}, "PageTable"),
        ("sdpa", {"is_causal": True, "attn_mask": torch.ones(4, 4).bool()}, "of which sdpa takes one"),
        ("sdpa", {"attn_mask": torch.ones(4, 4)}, "expected torch.bool"),
        ("sdpa", {"attn_mask": 3}, "attn_mask is 3, expected a Tensor"),
        ("xformers", {}, "xformers needs attn_bias"),
        ("xformers", {"attn_bias": None, "q_seqlen": [4]}, "attn_bias=None takes no other arguments, got q_seqlen"),
        ("xformers", {"attn_bias": "LowerTriangular"}, "expected None or a class of xFormers' biases"),
        ("xformers", {"attn_bias": "PagedBlockDiagonalPaddedKeysMask"}, "PageTable"),
        ("xformers", {"attn_bias": "LowerTriangularMaskWithTensorBias"}, r"score=mf.scores.bias\(x\)"),
        ("xformers", {"attn_bias": "BlockDiagonalMask", "q_seqlen": [4]}, "takes q_seqlen, kv_seqlen, got q_seqlen"),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalCausalFromBottomRightMask", "q_seqlen": [4], "kv_seqlen": [3]},
            "4 queries and 3 keys in sequence 0, expected no fewer keys than queries",
        ),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalPaddedKeysMask", "q_seqlen": [4], "kv_seqlen": [4], "kv_padding": 3},
            "kv_padding is 3, expected at least 4, the longest of kv_seqlen",
        ),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalGappyKeysMask", "q_seqlen": [4], "kv_seqlen": [4], "kv_seqstarts": [0]},
            "kv_seqstarts has 1 entries, expected 2",
        ),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalGappyKeysMask", "q_seqlen": [4], "kv_seqlen": [4], "kv_seqstarts": [1, 4]},
            "kv_seqlen goes beyond the total of kv_seqstarts, 4 keys",
        ),
        (
            "xformers",
            {"attn_bias": "LowerTriangularFromBottomRightLocalAttentionMask", "window_size": 0},
            "window_size is 0, expected at least 1",
        ),
    ],
)
def test_what_means_nothing_is_refused(library, given, says):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match=says):
        mf.from_arguments(library, **given)


def test_calls_of_other_lengths_are_refused():
    packed = mf.from_arguments("flash_attn_varlen", cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 20])
    with pytest.raises(mf.ArgumentError, match=r"batch \* q_len is 8, expected 9, the queries of flash_attn_varlen"):
        packed.dense(8, 20)
    with pytest.raises(mf.ArgumentError, match=r"batch \* kv_len is 8, expected at least 20"):
        packed.dense(9, 8)
    assert not packed.dense(9, 21)[..., 20].any()
    with pytest.raises(mf.ArgumentError, match=r"the batch rows have 4,194,304,000 tokens"):
        mf.full().as_arguments("sdpa", 2**20, 4, batch=4000)
