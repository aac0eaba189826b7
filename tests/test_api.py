"""The op as users call it: results against float64, promises of the semantics, and errors before any work."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.ground.qkv import same_device
from maskflash.testing import Shape, assert_matches_dense, masks, shapes

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
BLOCKS = st.sampled_from([16, 32, 128, (16, 64), (7, 50)])


def tensors(batch=1, heads=2, length=64, dim=16, **kwargs):
    return Shape(batch, heads, heads, length, length, dim, dim).tensors(torch.float32, **kwargs)


@settings(max_examples=250)
@given(masks(), shapes(), DTYPES, BLOCKS, st.booleans())
def test_every_mask_shape_and_dtype_matches_dense_float64(mask, shape, dtype, block_size, return_lse):
    assert_matches_dense(mask, shape, dtype=dtype, block_size=block_size, return_lse=return_lse)


@given(
    masks(max_len=96),
    shapes(max_len=48),
    st.lists(st.integers(0, 48), min_size=2, max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_offsets_match_dense_float64(mask, shape, offsets, per_row, return_lse):
    offset = torch.tensor(offsets)[: shape.batch] if per_row else offsets[0]
    assert_matches_dense(mask, shape, block_size=32, q_offset=offset, return_lse=return_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_packed_sequence_matches_dense_float64(dtype):
    lengths = [700, 33, 1, 500, 290, 612]  # 2,136 of 2,200 tokens: the rest is padding
    shape = Shape(batch=1, heads=4, kv_heads=2, q_len=2200, kv_len=2200, head_dim=64, v_head_dim=32)
    assert_matches_dense(mf.causal() & mf.document(lengths), shape, dtype=dtype)


def test_decoding_by_an_offset_is_the_last_rows_of_the_whole():
    q, k, v = tensors(length=100)
    attn = mf.compile(mf.causal() & mf.sliding_window(20))
    whole = attn(q, k, v)
    part = attn(q[:, :, 90:], k, v, q_offset=90)
    torch.testing.assert_close(part, whole[:, :, 90:])


def test_scale_and_the_functional_form():
    q, k, v = tensors()
    for scale in (None, 0.3, 7):
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        torch.testing.assert_close(mf.attention(q, k, v, mf.causal(), scale=scale), expected)
    torch.testing.assert_close(mf.attention(q, k, v), scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(
        mf.attention(q, k, v, lambda b, h, q, kv: q >= kv), scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_keyword_arguments_reach_the_mask():
    @mf.mask
    def packed(b, h, q, kv, *, doc, window=10):
        return 0 <= q - kv < window and doc[b, q] == doc[b, kv]

    q, k, v = tensors(batch=2)
    ids = torch.arange(128).view(2, 64) // 13
    attn = mf.compile(packed)
    for extra in ({}, {"window": 3}):
        dense = packed.dense(64, 64, batch=2, doc=ids, **extra)
        torch.testing.assert_close(attn(q, k, v, doc=ids, **extra), scaled_dot_product_attention(q, k, v, dense))


def test_a_row_that_sees_nothing():
    q, k, v = tensors()
    out, lse = mf.attention(q, k, v, lambda b, h, q, kv: q > 30 and kv < q - 30, return_lse=True)
    assert (out[:, :, :31] == 0).all()
    assert (lse[:, :, :31] == -math.inf).all()
    gradients = torch.autograd.grad((out.sum(), lse[:, :, 31:].sum()), (q, k, v))
    assert (gradients[0][:, :, :31] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    everywhere = torch.autograd.grad(mf.attention(q, k, v, ~mf.full(), return_lse=True), (q, k, v), (out, lse))
    assert all((gradient == 0).all() for gradient in everywhere)


@given(masks(), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans(), DTYPES)
def test_what_nobody_sees_may_hold_anything(mask, poison, with_lse, dtype):
    """NaN in hidden K and V, and in Q and dO of blind rows: outputs and gradients finite and unchanged, bit by bit."""
    shape = Shape(batch=2, heads=4, kv_heads=2, q_len=50, kv_len=60, head_dim=8, v_head_dim=8)
    q, k, v = shape.tensors(dtype)
    dense = mask.dense(50, 60, batch=2, heads=4)
    blind = ~dense.any(3, keepdim=True)
    hidden = ~dense.unflatten(1, (2, 2)).any(2).any(2)[..., None]
    attn = mf.compile(mask, block_size=16)
    dout, dlse = torch.randn(2, 4, 50, 8).to(dtype), torch.randn(2, 4, 50)

    def run(*inputs):
        q, k, v, dout = (x.detach().clone() for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attn(*leaves, return_lse=True)
        arriving = ((out, lse), leaves, (dout, dlse.to(lse.dtype))) if with_lse else (out, leaves, dout)
        return out, lse, *torch.autograd.grad(*arriving)

    clean = run(q, k, v, dout)
    dirty = run(
        q.masked_fill(blind, poison),
        k.masked_fill(hidden, poison),
        v.masked_fill(hidden, poison),
        dout.masked_fill(blind, poison),
    )
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before, after)
        assert not after.isnan().any()


def test_same_inputs_same_bits():
    q, k, v = tensors(length=300)
    attn = mf.compile(mf.causal() & mf.document([100, 90, 110]))
    first, second = (torch.autograd.grad(attn(q, k, v).sin().sum(), (q, k, v)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_any_strides():
    packed = torch.randn(2, 70, 3, 4, 16)  # (B, S, 3, H, D), as a fused projection gives it
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    attn = mf.compile(mf.sliding_window(9, 4))
    expected = attn(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attn(q, k, v), expected)
    mirrored = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(attn(*mirrored), expected)
    shared = k[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(attn(q, shared, shared), attn(q, k[:, :1], k[:, :1]))


def test_gradients_in_float64_are_the_derivatives():
    shape = Shape(1, 2, 1, 9, 11, 4, 3)
    q, k, v = shape.tensors(torch.float64)
    attn = mf.compile(lambda b, h, q, kv: kv <= q + h, block_size=4)
    assert torch.autograd.gradcheck(lambda *x: attn(*x, return_lse=True), (q, k, v))


def test_a_second_derivative_is_refused():
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(mf.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        dq.sum().backward()


def test_writing_to_a_table_between_forward_and_backward_is_an_error():
    q, k, v = tensors()
    ids = torch.arange(64) // 9
    out, _ = mf.attention(q, k, v, mf.document(ids=ids), return_lse=True)
    ids[3] = 7
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_where_it_is_no_error_the_gradients_are_those_of_the_mask_before():
    """One call of torch's kernel has the mask as it was, and needs no table any more."""
    ids = torch.arange(64) // 9
    gradients = []
    for written in (False, True):
        q, k, v = tensors()
        out = mf.attention(q, k, v, mf.document(ids=ids))
        if written:
            ids[3] = 7
        gradients.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert all(torch.equal(before, after) for before, after in zip(*gradients, strict=True))


def test_only_what_needs_gradients_gets_them():
    q, k, v = (x.detach() for x in tensors())
    assert not mf.attention(q, k, v).requires_grad
    v.requires_grad_()
    mf.attention(q, k, v).sum().backward()
    assert v.grad is not None
    assert q.grad is None


def test_the_explanation_says_what_was_decided():
    @mf.mask
    def packed(b, h, q, kv, *, doc):
        return q >= kv and doc[b, q] == doc[b, kv]

    attn = mf.compile(packed, block_size=64)
    ids = torch.arange(512).view(2, 256) // 60
    explained = attn.explain(256, 256, batch=2, doc=ids)
    facts = explained.to_dict()
    assert facts["visible"] == "(q >= kv) and (doc[b, q] == doc[b, kv])"
    assert facts["tables"] == {"doc": [2, 256]}
    assert facts["reads"] == ["b", "q", "kv"]
    assert facts["shape"] == [2, 1, 4, 4]
    assert facts["tiles"] == packed.block_map(256, 256, batch=2, block_size=64, doc=ids).counts
    assert sum(facts["decided"].values()) == sum(facts["tiles"].values()) == 32
    text = str(explained)
    assert repr(explained) == text  # what a session shows of it
    assert "pairs, in float32" in text
    assert facts["passes"]["forward float32"]["compute"] == "float32"
    for piece in (
        "packed",
        facts["visible"],
        "block maps of its own for each batch row",
        "cpu, since the tensors are on cpu",
        "calls",
    ):
        assert piece in text


Q, K, V = torch.zeros(3, 2, 4, 8, 16).unbind()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.attention([1], K, V), mf.ArgumentTypeError, "attention: q is a list, expected a tensor"),
        (lambda: mf.attention(Q[0], K, V), mf.ArgumentError, r"q has shape \(4, 8, 16\), expected 4 dimensions"),
        (lambda: mf.attention(Q, K.int(), V), mf.ArgumentTypeError, "k has dtype torch.int32, expected one of float32"),
        (lambda: mf.attention(Q, K.half(), V), mf.ArgumentTypeError, "k has dtype torch.float16, expected q's"),
        (lambda: mf.attention(Q, K, V.to("meta")), mf.ArgumentError, "v is on meta, expected q's cpu"),
        (lambda: mf.attention(Q, K.to_sparse(), V), mf.ArgumentTypeError, "k has layout torch.sparse_coo"),
        (lambda: mf.attention(Q, K[:1], V[:1]), mf.ArgumentError, "k has batch 1, expected q's 2"),
        (lambda: mf.attention(Q, K[..., :8], V), mf.ArgumentError, "head_dim is 16 for q, 8 for k and 16 for v"),
        (lambda: mf.attention(Q[..., :0], K[..., :0], V), mf.ArgumentError, "head_dim is 0 for q"),
        (lambda: mf.attention(Q, K[:, :, :5], V), mf.ArgumentError, "k has 4 heads of 5 tokens and v 4 of 8"),
        (lambda: mf.attention(Q, K[:, :3], V[:, :3]), mf.ArgumentError, "q has 4 heads and k 3; expected"),
        (lambda: mf.attention(Q, K[:, :0], V[:, :0]), mf.ArgumentError, "q has 4 heads and k 0"),
        (lambda: mf.attention(Q, K, V, q_offset=1.0), mf.ArgumentTypeError, "q_offset is 1.0, expected an int"),
        (
            lambda: mf.attention(Q, K, V, q_offset=torch.zeros(3).int()),
            mf.ArgumentError,
            r"shape \(3,\), expected \(2,\).*tensor of one element",
        ),
        (lambda: mf.attention(Q, K, V, doc=1), mf.ArgumentTypeError, "unexpected argument 'doc'.*are: none"),
        (lambda: mf.attention(Q, K, V, 3), mf.ArgumentTypeError, "mask is a int, expected a predicate"),
        (lambda: mf.compile(None), mf.ArgumentTypeError, "compile: mask is a NoneType, expected a predicate"),
        (lambda: mf.compile(mf.full(), backend="gpu"), mf.ArgumentError, "backend is 'gpu', expected \"auto\""),
        (lambda: mf.compile(mf.full(), block_size=-8), mf.ArgumentError, "block_size is -8, expected at least 1"),
        (lambda: mf.compile(mf.full(), scale="1"), mf.ArgumentTypeError, "scale is '1', expected a number"),
        (lambda: mf.compile(mf.full(), scale=math.nan), mf.ArgumentError, "scale is nan, expected a finite positive"),
        (lambda: mf.compile(mf.full(), scale=-1), mf.ArgumentError, "scale is -1, .* number; negate q instead"),
        (
            lambda: mf.attention(*[x.to("meta") for x in (Q, K, V)]),
            mf.BackendError,
            "tensors are on meta, expected cpu",
        ),
    ],
)
def test_wrong_arguments_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_argument_on_another_device_is_told():
    elsewhere = torch.zeros(8, device="meta")
    with pytest.raises(mf.ArgumentError, match=r"the mask's doc is on meta, expected q's cpu; move it once"):
        same_device(Q.device, [("doc", elsewhere)])
    mask = mf.mask(lambda b, h, q, kv, *, doc: doc[q] == doc[kv])
    with pytest.raises(mf.ArgumentError, match=r"doc is on meta, which holds no data; make it on the call's device"):
        mf.attention(Q, K, V, mask, doc=elsewhere)


def test_a_look_up_out_of_range_names_the_line():
    table = torch.zeros(5)
    with pytest.raises(mf.MaskIndexError, match=r"test_api.py:\d+.*table\[q\].*reads index 5"):
        mf.attention(Q, K, V, lambda b, h, q, kv: table[q] == 0)


def test_every_error_is_a_maskflash_error_and_a_builtin_one():
    assert issubclass(mf.ArgumentError, (mf.MaskflashError, ValueError))
    for error, builtin in (
        (mf.ArgumentError, ValueError),
        (mf.ArgumentTypeError, TypeError),
        (mf.MaskTraceError, TypeError),
        (mf.MaskIndexError, IndexError),
        (mf.BackendError, RuntimeError),
    ):
        assert issubclass(error, mf.MaskflashError)
        assert issubclass(error, builtin)
