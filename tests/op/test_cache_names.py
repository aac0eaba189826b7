"""Calls like one before are answered before anything is checked again, for as long as nothing has changed."""

import gc

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.ground import qkv
from maskflash.op import cache

Q, K, V = torch.randn(3, 2, 4, 96, 8).unbind()


@pytest.fixture
def analyses(monkeypatch):
    """The problems analysed during a test."""
    found = []
    original = cache.analyse
    monkeypatch.setattr(cache, "analyse", lambda problem, backend: found.append(problem) or original(problem, backend))
    cache._entries.clear()
    return found


def documents():
    return torch.arange(192).view(2, 96) // 17


# Calls like one before, answered before anything is checked again: one batch row, so that one dense call is all


@mf.mask
def together(b, h, q, kv, *, doc, loose=False):
    """Inside documents; whole where loose."""
    return loose or doc[q] == doc[kv]


@pytest.fixture
def checked(monkeypatch):
    """The calls that went the long way."""
    calls = []
    original = qkv.check
    monkeypatch.setattr(qkv, "check", lambda *args: calls.append(args) or original(*args))
    return calls


def one(x):
    return x[:1].clone()


def expected(doc, **given):
    return scaled_dot_product_attention(one(Q), one(K), one(V), attn_mask=together.dense(96, 96, doc=doc, **given))


def test_a_call_like_one_before_is_not_checked_again(checked):
    ids = documents()[0]
    attn, q, k, v = mf.compile(together), one(Q), one(K), one(V)
    for _ in range(3):
        torch.testing.assert_close(attn(q, k, v, doc=ids), expected(ids))
    assert len(checked) == 1
    attn(one(Q), one(K), one(V), doc=ids)  # other tensors alike
    assert len(checked) == 1


def test_what_is_unlike_is_checked(checked):
    ids = documents()[0]
    attn, q, k, v = mf.compile(together), one(Q), one(K), one(V)
    attn(q, k, v, doc=ids)
    with pytest.raises(mf.ArgumentTypeError, match="k has dtype"):
        attn(q, k.double(), v, doc=ids)
    with pytest.raises(mf.ArgumentError, match="k has 4 heads"):
        attn(q, k, v[:, :2], doc=ids)
    with pytest.raises(mf.ArgumentTypeError, match="layout"):
        attn(q.to_sparse(), k, v, doc=ids)
    with pytest.raises(mf.ArgumentTypeError, match="unexpected argument 'docs'"):
        attn(q, k, v, docs=ids)
    with pytest.raises(mf.ArgumentTypeError, match="q is a list"):
        attn(q.tolist(), k, v, doc=ids)
    count = len(checked)
    torch.testing.assert_close(mf.compile(together, backend="triton")(q, k, v, doc=ids), expected(ids))
    assert len(checked) == count + 1
    assert attn(q.bfloat16(), k.bfloat16(), v.bfloat16(), doc=ids).dtype == torch.bfloat16
    assert attn(q, k, v, doc=ids, return_lse=True)[1].shape == (1, 4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert attn(q, k, v, doc=ids).dtype == torch.bfloat16


def test_values_of_other_types_are_other_calls():
    ids = documents()[0]
    attn, q, k, v = mf.compile(together), one(Q), one(K), one(V)
    for _ in range(2):
        for loose in (False, True):
            torch.testing.assert_close(attn(q, k, v, doc=ids, loose=loose), expected(ids, loose=loose))
    shifted = mf.compile(mf.mask(lambda b, h, q, kv, *, by: q >> by == kv >> by))
    shifted(q, k, v, by=1)
    with pytest.raises(mf.MaskTraceError):
        shifted(q, k, v, by=1.0)


def test_the_sign_of_zero_tells_calls_apart():
    place = torch.arange(96) + 1.0
    attn, q, k, v = mf.compile(lambda b, h, q, kv, *, by: 1 / (place[q] * by) > 0), one(Q), one(K), one(V)
    for by in (0.0, -0.0, 0.0):
        assert attn(q, k, v, by=by).any() == (str(by) == "0.0")


@pytest.mark.parametrize("captured", [False, True])
def test_a_write_to_a_table_of_a_call_like_one_before_is_seen(captured):
    ids = documents()[0]
    attn = mf.compile(mf.document(ids=ids) if captured else together)
    given = {} if captured else {"doc": ids}
    for change in (lambda: None, lambda: ids.add_(ids.flip(0)), lambda: ids[40:].zero_()):
        change()
        for _ in range(2):
            torch.testing.assert_close(attn(one(Q), one(K), one(V), **given), expected(ids))
    ids.numpy()[:] = 0
    attn.invalidate()
    torch.testing.assert_close(attn(one(Q), one(K), one(V), **given), expected(torch.zeros_like(ids)))


def test_a_write_to_a_table_that_a_call_leaves_out_is_seen():
    """It is the default of an argument: neither captured nor given."""
    ids = documents()[0]
    attn = mf.compile(mf.mask(lambda b, h, q, kv, *, doc=ids: doc[q] == doc[kv]))
    for change in (lambda: None, lambda: ids[40:].zero_()):
        change()
        for _ in range(2):
            torch.testing.assert_close(attn(one(Q), one(K), one(V)), expected(ids))


def test_a_table_and_a_mask_in_a_dead_one_s_place_are_not_taken_for_it():
    for n in range(1, 20):
        ids = documents()[0] // n
        for mask, given in ((together, {"doc": ids}), (mf.document(ids=ids), {})):
            attn = mf.compile(mask)
            for _ in range(2):
                torch.testing.assert_close(attn(one(Q), one(K), one(V), **given), expected(ids))
        del ids, attn, mask, given
        gc.collect()


def test_scale_is_the_op_s_own():
    ids = documents()[0]
    for scale in (0.1, 1.0, None):
        out = mf.compile(together, scale=scale)(one(Q), one(K), one(V), doc=ids)
        dense = together.dense(96, 96, doc=ids)
        torch.testing.assert_close(
            out, scaled_dot_product_attention(one(Q), one(K), one(V), attn_mask=dense, scale=scale)
        )
