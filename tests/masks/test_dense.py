"""A boolean tensor is a mask: its pairs are the mask's, in all the shapes that torch's attention takes."""

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.masks import dense
from maskflash.masks.dense import DenseMask
from maskflash.testing import Shape, assert_matches_dense

pytestmark = pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")

SHAPES = [(30, 40), (1, 40), (30, 1), (4, 30, 40), (1, 30, 40), (2, 4, 30, 40), (2, 1, 1, 40), (1, 4, 30, 40), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_that_sdpa_takes(shape):
    tensor = torch.rand(shape) < 0.7
    tensor[..., 0] = True  # SDPA gives NaN to rows that see nothing
    q, k, v = Shape(2, 4, 4, 30, 40, 8, 8).tensors(torch.float32)
    expected = scaled_dot_product_attention(q, k, v, tensor)
    torch.testing.assert_close(mf.attention(q, k, v, tensor), expected)
    torch.testing.assert_close(mf.compile(tensor)(q, k, v), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_and_gradients_match_dense_float64(shape):
    mask = DenseMask("test", torch.rand(shape) < 0.6)
    sizes = Shape(2, 4, 2, 30, 40, 8, 8)
    assert_matches_dense(mask, sizes, block_size=16)
    assert_matches_dense(mask & mf.causal(), sizes, block_size=16)


def test_a_dimension_that_was_expanded_is_not_looked_at():
    mask = DenseMask("test", (torch.rand(2, 1, 30, 40) < 0.5).expand(2, 4, 30, 40))
    assert mask.block_map(30, 40, batch=2, heads=4).shape == (2, 1, 1, 1)


def test_a_write_is_seen():
    tensor = torch.ones(30, 30, dtype=torch.bool)
    q, k, v = Shape(1, 2, 2, 30, 30, 8, 8).tensors(torch.float32)
    attn = mf.compile(tensor)
    attn(q, k, v)
    tensor.tril_()
    torch.testing.assert_close(attn(q, k, v), scaled_dot_product_attention(q, k, v, is_causal=True))


def test_the_warning_is_given_once_and_says_what_to_write(monkeypatch):
    monkeypatch.setattr(dense, "_warned", False)
    tensor, q = torch.ones(8, 8, dtype=torch.bool), torch.randn(1, 1, 8, 8)
    with pytest.warns(mf.DenseMaskWarning, match=r"attention: got a dense mask.*f\(b, h, q, kv\)") as caught:
        mf.attention(q, q, q, tensor)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mf.compile(tensor)(q, q, q)


Q = torch.zeros(2, 4, 30, 8)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(30, 30).int(), mf.ArgumentTypeError, r"dtype torch.int32, expected torch.bool; pass mask.bool\(\)"),
        (torch.ones(30).bool(), mf.ArgumentError, r"shape \(30,\), expected \(q_len, kv_len\)"),
        (torch.ones(30, 29).bool(), mf.ArgumentError, r"shape \(30, 29\), expected \(2, 4, 30, 30\), or 1"),
        (torch.ones(2, 30).bool(), mf.ArgumentError, r"shape \(2, 30\), .*, pass mask\[:, None, None\]"),
        (torch.ones(3, 1, 30, 30).bool(), mf.ArgumentError, r"shape \(3, 1, 30, 30\), expected \(2, 4, 30, 30\)"),
    ],
)
def test_what_is_no_mask_is_told(mask, error, message):
    with pytest.raises(error, match=f"attention: mask has .*{message}"):
        mf.attention(Q, Q, Q, mask)


def test_floats_join_no_other_mask():
    with pytest.raises(mf.ArgumentTypeError, match=r"mask has dtype torch.float32, expected torch.bool; .*scores.bias"):
        mf.causal() & torch.zeros(30, 30)


def test_an_offset_is_told():
    for name in ("q_offset", "kv_offset"):
        with pytest.raises(mf.ArgumentError, match=f"{name} is 3, expected 0: a dense mask's rows and columns"):
            mf.attention(Q, Q, Q, torch.ones(30, 30, dtype=torch.bool), **{name: 3})


def test_too_many_pairs_are_told_before_any_is_read(monkeypatch):
    monkeypatch.setattr(dense, "MOST_PAIRS", 30 * 30 - 1)
    with pytest.raises(mf.ArgumentError, match="mask holds 900 pairs, more than 899; write it as a predicate"):
        mf.attention(Q, Q, Q, torch.ones(30, 30, dtype=torch.bool))
    mf.attention(Q, Q, Q, torch.ones(30, 1, dtype=torch.bool).expand(30, 30))
