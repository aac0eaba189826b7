"""Attention sinks: one more key whose value is 0, seen by every row, with its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, masks, shapes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCORES = st.one_of(st.floats(-6, 6), st.sampled_from([float("-inf"), -1e4, 1e4]))
PIECES = {
    "one call": mf.full(),
    "many calls": mf.document([40, 3, 90, 27]) & mf.causal(),
    "merged calls": mf.causal() & (mf.global_tokens(3) | mf.sliding_window(9)),
    "gathered rows": mf.mask(lambda b, h, q, kv: (q - kv) % 5 == 0),
    "rows that see nothing": mf.mask(lambda b, h, q, kv: (q >= kv) & (q % 7 != 3)),
    "heads of their own": mf.mask(lambda b, h, q, kv: q + h >= kv),
}


@settings(max_examples=60)
@given(masks(max_len=96), shapes(max_len=96), st.sampled_from(DTYPES), st.data())
def test_every_mask_and_shape_matches_dense_float64(mask, shape, dtype, data):
    sinks = torch.tensor(data.draw(st.lists(SCORES, min_size=shape.heads, max_size=shape.heads)))
    assert_matches_dense(mask, shape, dtype=dtype, block_size=32, sinks=sinks, return_lse=data.draw(st.booleans()))


@pytest.mark.parametrize("own_heads", [False, True])
def test_a_window_s_blocks_take_them_too(own_heads):
    mask = mf.mask(lambda b, h, q, kv: (q - 90 - h <= kv) & (kv <= q)) if own_heads else mf.sliding_window(90)
    assert_matches_dense(mask, Shape(1, 4, 2, 900, 900, 8, 8), sinks=torch.linspace(-2, 3, 4))


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_kind_of_call_takes_the_sink_once(name, dtype, kv_heads):
    shape = Shape(2, 4, kv_heads, 160, 160, 16, 8)
    assert_matches_dense(PIECES[name], shape, dtype=dtype, sinks=torch.linspace(-2, 3, 4))


def test_it_is_a_column_of_its_own():
    """As gpt-oss computes it: the sinks are one more column of the scores, which is dropped after the softmax."""
    q, k, v = torch.randn(3, 2, 3, 40, 8, dtype=torch.float64).unbind()
    sinks = torch.randn(3, dtype=torch.float64)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mf.causal().dense(40, 40), -torch.inf)
    scores = torch.cat((scores, sinks[:, None, None].expand(2, 3, 40, 1)), dim=3)
    out, lse = mf.attention(q, k, v, mf.causal(), sinks=sinks, return_lse=True)
    torch.testing.assert_close(out, scores.softmax(3)[..., :-1] @ v)
    torch.testing.assert_close(lse, scores.logsumexp(3))


def test_no_sink_is_minus_infinity():
    q, k, v = torch.randn(3, 2, 3, 40, 8).unbind()
    mask = mf.mask(lambda b, h, q, kv: kv < q - 2)  # the first rows see nothing
    plain = mf.attention(q, k, v, mask, return_lse=True)
    found = mf.attention(q, k, v, mask, sinks=torch.full((3,), -torch.inf), return_lse=True)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_row_that_sees_nothing_has_the_sink_alone():
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    sinks = torch.tensor([0.5, -3.0], requires_grad=True)
    for keys in (6, 0):
        out, lse = mf.attention(
            q, k[:, :, :keys], v[:, :, :keys], lambda b, h, q, kv: kv > 9, sinks=sinks, return_lse=True
        )
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, sinks.detach()[:, None].expand(1, 2, 6))
        assert torch.equal(torch.autograd.grad(lse.sum(), sinks)[0], torch.full((2,), 6.0))


def test_hidden_keys_may_hold_anything():
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    sinks = torch.randn(2, requires_grad=True)
    found = []
    for hidden in (0.0, torch.nan):
        k[:, :, 30:], v[:, :, 30:] = hidden, hidden
        out = mf.attention(q, k, v, lambda b, h, q, kv: kv < 30, sinks=sinks)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), sinks)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 70_000, 64, 8, 8), Shape(2, 8, 2, 600, 600, 16, 16)])
def test_the_gradient_is_the_same_whatever_the_threads(shape):
    q, k, v = shape.tensors(torch.float32)
    sinks, before, found = torch.randn(shape.heads).requires_grad_(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = mf.attention(q, k, v, mf.mask(lambda b, h, q, kv: kv <= q), sinks=sinks)
            found.append(torch.autograd.grad(out.square().sum(), sinks)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_calls_that_differ_in_the_sinks_alone_share_an_analysis():
    attn = mf.compile(mf.causal())
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    from maskflash.op import cache

    attn(q, k, v, sinks=torch.zeros(2))
    known = set(cache._entries)
    for step in range(5):
        sinks = torch.full((2,), float(step))
        out, lse = attn(q, k, v, sinks=sinks, return_lse=True)
        expected = mf.testing.reference(q, k, v, mf.causal().dense(40, 40), 8**-0.5, sinks)
        torch.testing.assert_close((out, lse), expected)
    assert set(cache._entries) == known


def test_torch_compile_and_checkpoints_take_them():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 40, 8).unbind())
    sinks = torch.randn(2, requires_grad=True)
    attn = mf.compile(mf.causal())

    def step(q, k, v, sinks):
        return attn(q, k, v, sinks=sinks).square().sum()

    expected = torch.autograd.grad(step(q, k, v, sinks), (q, k, v, sinks))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    checkpointed = torch.utils.checkpoint.checkpoint(step, q, k, v, sinks, use_reentrant=False)
    for loss in (compiled(q, k, v, sinks), checkpointed):
        for found, truth in zip(torch.autograd.grad(loss, (q, k, v, sinks)), expected, strict=True):
            torch.testing.assert_close(found, truth)


def test_their_own_dtype_is_kept():
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    for dtype in (torch.bfloat16, torch.float64):
        sinks = torch.randn(2, dtype=dtype, requires_grad=True)
        out = mf.attention(q, k, v, mf.causal(), sinks=sinks)
        assert out.dtype == q.dtype
        assert torch.autograd.grad(out.sum(), sinks)[0].dtype == dtype


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (1.0, mf.ArgumentTypeError, r"attention: sinks is 1.0, expected a Tensor; one number for each query head"),
        (torch.zeros(3), mf.ArgumentError, r"sinks have shape \(3,\), expected a dense \(2,\), one for each head of q"),
        (torch.zeros(2, 1), mf.ArgumentError, r"sinks have shape \(2, 1\), expected"),
        (torch.zeros(2, dtype=torch.int64), mf.ArgumentTypeError, "sinks have dtype torch.int64, expected a floating"),
        (torch.zeros(2, device="meta"), mf.ArgumentError, "sinks are on meta, expected q's cpu"),
    ],
)
def test_what_is_no_sinks_is_refused(sinks, error, message):
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    attn = mf.compile(mf.causal())
    attn(q, k, v, sinks=torch.zeros(2))  # a call like it has passed every check
    with pytest.raises(error, match=message):
        attn(q, k, v, sinks=sinks)


def test_a_mask_argument_can_not_have_their_name():
    with pytest.raises(mf.ArgumentError, match="sinks"):
        mf.mask(lambda b, h, q, kv, *, sinks: sinks > q)
