"""Attention sinks in the kernels: rows start from the sink's score, and its gradient comes from delta."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, masks, shapes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SCORES = st.one_of(st.floats(-6, 6), st.sampled_from([float("-inf"), -1e4, 1e4]))


@settings(max_examples=16)
@given(masks(max_len=48), shapes(max_len=48, max_head_dim=24), st.data())
def test_every_mask_and_shape_matches_dense_float64(device, mask, shape, data):
    sinks = torch.tensor(data.draw(st.lists(SCORES, min_size=shape.heads, max_size=shape.heads)), device=device)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    assert_matches_dense(mask, shape, dtype=dtype, block_size=16, sinks=sinks, backend="triton", device=device)


@pytest.mark.parametrize("kv_len", [40, 0])
def test_a_row_that_sees_nothing_has_the_sink_alone(device, kv_len):
    q, k, v = Shape(2, 4, 2, 20, kv_len, 16, 16).tensors(torch.float32, device=device)
    sinks = torch.linspace(-1, 2, 4, device=device, dtype=torch.bfloat16).requires_grad_()
    out, lse = mf.attention(q, k, v, lambda b, h, q, kv: kv > 50, sinks=sinks, return_lse=True, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sinks.float()[:, None].expand(2, 4, 20))
    (found,) = torch.autograd.grad(lse.sum(), sinks)
    assert torch.equal(found, torch.full_like(sinks, 40.0))
