"""Calls with a score function or with dropout: what reaches the op, what is refused, what others see of it."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense

SHAPE = Shape(batch=2, heads=4, kv_heads=2, q_len=70, kv_len=70, head_dim=8, v_head_dim=8)


def tensors(grad=False):
    return [x.detach().requires_grad_(grad) for x in SHAPE.tensors(torch.float32)]


def near(score, b, h, q, kv):
    return torch.where(abs(q - kv) < 9, score, -torch.inf)


# Floating tensors in place of a mask


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
@pytest.mark.filterwarnings("ignore:.*got a dense mask")
def test_a_floating_mask_is_torch_s(lowest):
    q, k, v = tensors()
    hidden = torch.rand(2, 1, 70, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    given = torch.randn(2, 4, 70, 70).masked_fill(hidden, lowest)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=given, enable_gqa=True)
    torch.testing.assert_close(mf.attention(q, k, v, given), expected)
    skipped = mf.compile(torch.zeros(256, 256).masked_fill(torch.ones(256, 256).triu(1) > 0, lowest))
    assert skipped.explain(256, 256).to_dict()["tiles"] == {"full": 1, "partial": 2, "skip": 1}


@pytest.mark.filterwarnings("ignore:.*got a dense mask")
def test_a_floating_mask_is_learned():
    q, k, v = tensors()
    given = torch.randn(70, 70, requires_grad=True)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=given, enable_gqa=True).square().sum()
    found = mf.attention(q, k, v, given).square().sum()
    (one,), (other,) = (torch.autograd.grad(x, given) for x in (found, expected))
    torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*got a dense mask")
def test_a_floating_mask_comes_after_the_score():
    q, k, v = tensors()
    given = torch.randn(70, 70)
    found = mf.attention(q, k, v, given, score=mf.scores.temperature(2.0))
    torch.testing.assert_close(found, scaled_dot_product_attention(2 * q, k, v, attn_mask=given, enable_gqa=True))


# What hides pairs


def test_what_a_table_hides_is_hidden_and_shown_again():
    q, k, v = tensors()
    table = torch.zeros(70, 70).masked_fill(torch.ones(70, 70).triu(1) > 0, -torch.inf)
    attn = mf.compile(mf.full(), score=mf.scores.bias(table))
    torch.testing.assert_close(attn(q, k, v), mf.attention(q, k, v, mf.causal()))
    table.zero_()
    torch.testing.assert_close(attn(q, k, v), mf.attention(q, k, v))
    table[:, 5:] = -torch.inf
    table[3] = -torch.inf
    out, lse = attn(q, k, v, return_lse=True)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    torch.testing.assert_close(out[:, :, 4:], mf.attention(q, k, v, mf.mask(lambda b, h, q, kv: kv < 5))[:, :, 4:])


def test_a_row_that_its_learned_table_hides_sees_nothing():
    q, k, v = tensors(grad=True)
    table = torch.randn(70, 70)
    table[3] = -torch.inf
    table.requires_grad_()
    out, lse = mf.attention(q, k, v, score=mf.scores.bias(table), return_lse=True)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    *found, dtable = torch.autograd.grad(out.square().sum(), (q, k, v, table))
    assert (
        all(x.isfinite().all() for x in (*found, dtable)) and (dtable[3] == 0).all() and (found[0][:, :, 3] == 0).all()
    )


def test_another_rule_in_the_closure_hides_other_pairs():
    q, k, v = tensors()
    rules = {"hide": False}

    def ruled(score, b, h, q, kv):
        return torch.where(kv <= q, score, -torch.inf) if rules["hide"] else score

    attn = mf.compile(mf.full(), score=ruled)
    torch.testing.assert_close(attn(q, k, v), mf.attention(q, k, v))
    rules["hide"] = True
    torch.testing.assert_close(attn(q, k, v), mf.attention(q, k, v, mf.causal()))


def test_a_function_can_t_call_the_mask_of_an_op_with_a_score():
    attn = mf.compile(mf.causal(), score=near)
    joined = attn.mask & mf.document([30, 40])
    assert joined.row(35, 70) == [(30, 36)]
    with pytest.raises(mf.ArgumentTypeError, match=r"what near leaves: a function can't call it; combine masks with &"):
        mf.mask(lambda b, h, q, kv: attn.mask(b, h, q, kv))


# What others see


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keyword_arguments_of_both(dtype):
    weights, doc = torch.randn(70, requires_grad=True), torch.arange(70).expand(2, -1) // 30

    def weighed(score, b, h, q, kv, *, w, c):
        return score + c * w[kv]

    @mf.mask
    def packed(b, h, q, kv, *, doc):
        return q >= kv and doc[b, q] == doc[b, kv]

    assert_matches_dense(packed, SHAPE, dtype=dtype, score=weighed, doc=doc, w=weights, c=0.5)
    q, k, v = (x.to(dtype) for x in tensors())
    with pytest.raises(mf.ArgumentTypeError, match="the mask needs w"):
        mf.compile(packed, score=weighed)(q, k, v, doc=doc, c=1.0)
    with pytest.raises(mf.ArgumentTypeError, match="unexpected argument 'x'"):
        mf.compile(packed, score=weighed)(q, k, v, doc=doc, c=1.0, w=weights, x=1)


def test_compiled_graphs_have_scores_and_dropout():
    table = torch.nn.Parameter(torch.randn(32, 4))
    attn = mf.compile(mf.causal(), score=mf.scores.relative_bias(table))

    def step(q, k, v):
        return attn(q, k, v, dropout_p=0.2, seed=3), attn(q, k, v)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = tensors(grad=True)
    for one, other in zip(compiled(*given), step(*given), strict=True):
        assert torch.equal(one, other)
        both = (torch.autograd.grad(x.square().sum(), (*given, table), retain_graph=True) for x in (one, other))
        assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))
    drawn = torch.compile(lambda q, k, v: attn(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(drawn(*given), drawn(*given))


def test_recomputation_draws_the_same():
    q, k, v = tensors(grad=True)
    attn = mf.compile(mf.causal())
    found = []
    for run in (attn, lambda *given, **rest: checkpoint(attn, *given, use_reentrant=False, **rest)):
        torch.manual_seed(7)
        found.append(torch.autograd.grad(run(q, k, v, dropout_p=0.4).square().sum(), (q, k, v)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_only_what_drops_draws():
    q, k, v = tensors()
    before = torch.get_rng_state()
    mf.attention(q, k, v, dropout_p=0.0)
    mf.attention(q, k, v, dropout_p=0.5, seed=1)
    mf.attention(q, k, v, dropout_p=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    mf.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(before, torch.get_rng_state())


def test_an_op_with_a_score_is_pickled_and_copied():
    q, k, v = tensors()
    attn = mf.compile(mf.causal(), score=(mf.scores.softcap(3.0), near))
    for other in (pickle.loads(pickle.dumps(attn)), copy.deepcopy(attn)):
        assert torch.equal(other(q, k, v), attn(q, k, v))


@pytest.mark.parametrize(
    ("score", "error", "said"),
    [
        (mf.causal(), mf.ArgumentTypeError, "score is a Predicate, expected a function"),
        (mf.scores.softcap, mf.ArgumentTypeError, r"got softcap, which makes a score function; call it: mf.scores"),
        ((), mf.ArgumentTypeError, "score is empty"),
        (lambda b, h, q, kv: 1.0, mf.ArgumentError, r"takes \(score, b, h, q, kv\), got \(b, h, q, kv\)"),
        (lambda score, b, h, q, kv: q >= kv, mf.MaskTraceError, "What returns a truth is a mask"),
        (lambda score, b, h, q, kv: q - kv, mf.MaskTraceError, "returns a float, got torch.int64"),
    ],
)
def test_what_is_no_score_is_refused(score, error, said):
    with pytest.raises(error, match=said):
        mf.compile(mf.causal(), score=score)


def test_second_derivatives_stay_refused():
    q, k, v = tensors(grad=True)
    out = mf.attention(q, k, v, score=mf.scores.softcap(3.0))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()
