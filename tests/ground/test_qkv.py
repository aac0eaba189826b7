"""q, k and v that attention can't take are told, with what makes them ones that it can."""

import warnings

import pytest
import torch

import maskflash as mf

Q, K, V = torch.randn(3, 2, 4, 8, 16).unbind()


def nested(rows, layout=torch.strided):
    with warnings.catch_warnings(action="ignore"):  # the layout is a prototype
        return torch.nested.nested_tensor(rows, layout=layout)


# q, k and v


def test_tensors_of_other_dimensions_are_told_how_to_get_four():
    with pytest.raises(mf.ArgumentError, match=r"q has shape \(4, 8, 16\), .*; q\[None\] adds a batch of 1"):
        mf.attention(Q[0], K[0], V[0])
    with pytest.raises(mf.ArgumentError, match=r"q.unflatten\(-1, \(heads, -1\)\).transpose\(1, 2\) takes heads"):
        mf.attention(*(x.transpose(1, 2).flatten(2) for x in (Q, K, V)))
    with pytest.raises(
        mf.ArgumentError, match=r"k has shape \(1, 2, 4, 8, 16\), .*; k.flatten\(0, 1\) makes one batch"
    ):
        mf.attention(Q, K[None], V)
    hidden = [x.transpose(1, 2).flatten(2) for x in (Q, K, V)]
    whole = mf.attention(Q, K, V, mf.causal())
    assert torch.equal(mf.attention(*(x.unflatten(-1, (4, -1)).transpose(1, 2) for x in hidden), mf.causal()), whole)
    assert torch.equal(mf.attention(*(x[0][None] for x in (Q, K, V)), mf.causal()), whole[:1])
    assert torch.equal(mf.attention(*(x[None].flatten(0, 1) for x in (Q, K, V)), mf.causal()), whole)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_beside_dense_ones_are_told(layout):
    rows = nested([Q[0], Q[1]], layout)
    attn = mf.compile(mf.causal())
    for call in (lambda: attn(rows, K, V), lambda: attn(Q, rows, V), lambda: attn(Q, K, rows, return_lse=True)):
        with pytest.raises(mf.ArgumentTypeError, match=r"nested.* layout torch\.jagged"):
            call()


def test_other_tensors_are_told():
    with warnings.catch_warnings(action="ignore"):  # quantized tensors are on their way out
        quantized = torch.quantize_per_tensor(Q, 1, 0, torch.quint8)
    for wrong in (Q.to_sparse(), quantized, Q.numpy(), Q.tolist(), None):
        with pytest.raises(mf.ArgumentTypeError, match=r"^attention: q "):
            mf.attention(wrong, K, V)


@pytest.mark.parametrize(("heads", "kv_heads"), [(0, 0), (0, 4), (4, 0)])
def test_no_heads_are_told(heads, kv_heads):
    q, (k, v) = Q[:, :1].expand(-1, heads, -1, -1), (x[:, :1].expand(-1, kv_heads, -1, -1) for x in (K, V))
    with pytest.raises(mf.ArgumentError, match=f"q has {heads} heads and k {kv_heads}; expected at least 1 each"):
        mf.attention(q, k, v)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("score", [None, mf.scores.alibi()])
def test_what_torch_s_old_tracer_records_is_told(score):
    attn = mf.compile(mf.causal(), score=score)
    attn(Q, K, V)  # what is remembered of a call doesn't serve one that is recorded
    with pytest.raises(mf.BackendError, match=r"^attention: torch.jit.trace is recording this call, .*torch.export"):
        torch.jit.trace(lambda q, k, v: attn(q, k, v), (Q, K, V))
    assert attn(Q, K, V).shape == Q.shape
