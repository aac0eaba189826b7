"""FlashMask's call: its layout and rules, judged against dense attention; and its refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, columns, reference


def inputs(shape, dtype=torch.float64):
    return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in shape.tensors(dtype)]


def dense(q, k, v, visible):
    return reference(*(x.transpose(1, 2) for x in (q, k, v)), visible, q.shape[3] ** -0.5)


def agree(found, expected, tensors):
    """Outputs and the gradients of everything, through both of them."""
    out, lse = found
    exact, exact_lse = expected
    assert torch.allclose(out, exact.transpose(1, 2), atol=1e-12) and torch.allclose(lse, exact_lse, atol=1e-12)
    finite = exact_lse.isfinite()
    losses = ((o**2).sum() + (s[finite] ** 2).sum() for o, s in ((out, lse), (exact, exact_lse)))
    for x, y in zip(*(torch.autograd.grad(loss, tensors) for loss in losses), strict=True):
        assert torch.allclose(x, y, atol=1e-10)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4]))
def test_vectors(data, q_len, kv_len, kv_heads):
    mask = data.draw(columns(q_len, kv_len, 2, 4).filter(lambda m: m.lts.shape[1] in (1, kv_heads, 4)))
    tensors = inputs(Shape(2, 4, kv_heads, q_len, kv_len, 8, 6))
    found = (
        mf.flashmask_attention(*tensors, mask.startend_row_indices, causal=mask.causal, return_softmax_lse=True)
        if mask.causal or "ute" in mask.vectors() or "lte" in mask.vectors()
        else None
    )
    if found is not None:
        agree(found, dense(*tensors, mask.dense(q_len, kv_len, batch=2, heads=4)), tensors)


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 50), st.tuples(st.integers(0, 50), st.integers(0, 50))),
)
def test_windows_and_none(q_len, kv_len, causal, window):
    tensors = inputs(Shape(1, 2, 1, q_len, kv_len, 8, 8))
    own = torch.arange(q_len)[:, None] + kv_len - q_len
    j = torch.arange(kv_len)
    visible = (j <= own) if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        visible = visible & (own - left <= j) & (j <= own + right)
    found = mf.flashmask_attention(*tensors, causal=causal, window_size=window, return_softmax_lse=True)
    agree(found, dense(*tensors, visible[None, None]), tensors)


Q = torch.zeros(2, 6, 4, 8)
KV = torch.zeros(2, 6, 2, 8)
ENDS = torch.full((2, 1, 6, 1), 6, dtype=torch.int32)


def test_paddle_s_own_defaults_are_taken():
    defaults = {
        "return_seed_offset": False,
        "fixed_seed_offset": None,
        "rng_name": "",
        "name": "layer",
        "block_mask": None,
    }
    expected = mf.flashmask_attention(Q, KV, KV, ENDS, causal=True)
    assert torch.equal(mf.flashmask_attention(Q, KV, KV, ENDS, causal=True, **defaults), expected)


def test_what_it_returns():
    out = mf.flashmask_attention(Q, KV, KV, ENDS, causal=True, dropout=0.1, training=False, softmax_scale=0.3)
    assert out.shape == Q.shape and out.dtype == Q.dtype


@pytest.mark.parametrize(
    "given", [{"startend_row_indices": ENDS}, {"window_size": 3}, {}], ids=["vectors", "window", "no"]
)
def test_dropout_is_that_of_attention(given):
    """The same pairs are kept as by dropout_p with that seed, whatever causal aligns to."""
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6 if "startend_row_indices" in given else 9, 2, 8)
    tensors = [x.requires_grad_() for x in (q, k, torch.randn_like(k))]
    torch.manual_seed(3)
    found = mf.flashmask_attention(*tensors, causal=True, dropout=0.4, return_softmax_lse=True, **given)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    offset = k.shape[1] - q.shape[1]
    mask = mf.sliding_window(3) if "window_size" in given else mf.causal()
    inner = [x.transpose(1, 2) for x in tensors]
    out, lse = mf.attention(*inner, mask, q_offset=offset, dropout_p=0.4, seed=seed, return_lse=True)
    assert torch.equal(found[0], out.transpose(1, 2)) and torch.equal(found[1], lse)
    plain = mf.flashmask_attention(*tensors, causal=True, return_softmax_lse=True, **given)
    assert not torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], plain[1])
    gradients = (torch.autograd.grad(x.square().sum(), tensors) for x in (found[0], out))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q[0], KV, KV), {}, r"query has shape \(6, 4, 8\), expected 4 dimensions \(batch, tokens, heads, head_dim\)"),
        ((Q, KV, 3), {}, "value is a int, expected a tensor"),
        ((Q, KV, KV), {"dropout": 1}, "dropout is 1, expected at least 0 and less than 1"),
        ((Q, KV, KV), {"dropout": -0.1, "training": False}, "dropout is -0.1, expected a number from 0 to 1"),
        ((Q, KV, KV), {"return_seed_offset": True}, "return_seed_offset is True, expected it left out: dropout's seed"),
        ((Q, KV, KV), {"fixed_seed_offset": ENDS}, "fixed_seed_offset is a Tensor, expected it left out: dropout's"),
        ((Q, KV, KV), {"rng_name": "local"}, "rng_name is 'local', expected it left out: dropout's seed is torch's"),
        ((Q, KV, KV, ENDS), {"block_mask": ENDS}, "block_mask is a Tensor, expected it left out: tiles without a"),
        ((Q, KV, KV, ENDS), {"window_size": 3, "causal": True}, "window_size and startend_row_indices"),
        ((Q, KV, KV), {"window_size": (1, 2, 3)}, r"window_size is \(1, 2, 3\), expected an int or \(left, right\)"),
        ((Q, KV, KV), {"window_size": -2}, "window_size is -2, expected at least 0"),
        ((Q, KV, KV, ENDS), {}, "1 vectors in its last dimension with causal=False"),
        ((Q, KV, KV, ENDS.float()), {"causal": True}, "startend_row_indices has dtype torch.float32"),
        ((Q, KV, KV, ENDS[0]), {"causal": True}, "expected a 4-d tensor"),
        ((Q, KV, KV, ENDS.expand(2, 3, 6, 1)), {"causal": True}, "has 3 heads, expected 1 or 2 or 4"),
        ((Q, KV, KV, ENDS[:, :, :5]), {"causal": True}, r"has shape \(2, 1, 5, 1\), expected .* 6 columns"),
        ((Q, KV, KV, ENDS.expand(2, 1, 6, 1).repeat(2, 1, 1, 1)), {"causal": True}, r"expected batch 2 \(or 1\)"),
        ((Q, KV[:, :4], KV), {}, "k has 2 heads of 4 tokens and v 2 of 6"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match=message):
        mf.flashmask_attention(*args, **options)
