"""Few rows over many keys: nothing is planned, and all is as dense float64 says, in parts of the keys too."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.cpu import few, scored
from maskflash.op import cache
from maskflash.op.few_rows import FewRows
from maskflash.testing import Shape, assert_matches_dense, masks, scores

DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
Q = torch.randn(2, 4, 1, 16)


@pytest.fixture
def looked_at(monkeypatch):
    """How many calls were answered without a plan."""
    calls, honest = [], few.forward
    monkeypatch.setattr(few, "forward", lambda *given: calls.append(given) or honest(*given))
    return calls


@settings(max_examples=60)
@given(masks(), st.data(), DTYPES, st.booleans())
def test_few_rows_agree_with_dense_float64(mask, data, dtype, split):
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2)]))
    q_len, batch = data.draw(st.sampled_from([1, 1, 2, 5, 16])), data.draw(st.integers(1, 2))
    kv_len = data.draw(st.integers(few._WIDE * q_len, 64))
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    shape = Shape(batch, kv_heads * group, kv_heads, q_len, kv_len, 16, data.draw(st.sampled_from([16, 8, 24])))
    with pytest.MonkeyPatch.context() as patch:
        if split:
            patch.setattr(few, "_PART", 7)
            patch.setattr(few, "_PARTS", 2)
        if data.draw(st.booleans()):
            patch.setattr(few, "_LEAD", 2)
        assert_matches_dense(mask, shape, dtype=dtype, sinks=sinks, q_offset=max(kv_len - q_len, 0))


@settings(max_examples=40)
@given(masks(), scores(), st.data(), DTYPES, st.booleans())
def test_few_rows_with_scores_agree_with_dense_float64(mask, score, data, dtype, split):
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2)]))
    q_len, batch = data.draw(st.sampled_from([1, 1, 2, 5, 16])), data.draw(st.integers(1, 2))
    kv_len = data.draw(st.integers(few._WIDE * q_len, 64))
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    shape = Shape(batch, kv_heads * group, kv_heads, q_len, kv_len, 16, data.draw(st.sampled_from([16, 8, 24])))
    with pytest.MonkeyPatch.context() as patch:
        if split:
            patch.setattr(scored, "_PAIRS", kv_heads * group * q_len * kv_len * 3 // 2)
        assert_matches_dense(mask, shape, dtype=dtype, sinks=sinks, score=score, q_offset=max(kv_len - q_len, 0))


@pytest.mark.parametrize("layout", ["heads, tokens", "tokens, heads"])
@pytest.mark.parametrize("tokens", [4096, 8192, 9001])
def test_long_keys_are_computed_in_parts(layout, tokens, looked_at, monkeypatch):
    monkeypatch.setattr(few, "_PARTS", 2)
    shape = (2, 2, tokens, 16) if layout == "heads, tokens" else (2, tokens, 2, 16)
    k, v = torch.randn(2, *shape).unbind()
    if layout == "tokens, heads":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = mf.mask(lambda b, h, q, kv: kv < 50 + 8900 * q)  # some rows see nothing of some parts
    attn = mf.compile(mask)
    for q in (torch.randn(2, 4, 3, 16), torch.randn(2, 4, 40, 16)):
        out, lse = attn(q, k, v, return_lse=True)
        keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
        scores = (q.double() @ keys.mT / 4).masked_fill(~mask.dense(q.shape[2], tokens), -torch.inf)
        torch.testing.assert_close(lse, scores.logsumexp(-1).float())
        torch.testing.assert_close(out, (scores.softmax(-1) @ values).float())
    assert len(looked_at) == 2


@pytest.mark.parametrize("score", [None, mf.scores.softcap(5.0)])
def test_a_row_has_the_same_bits_whatever_else_is_in_its_batch_and_on_any_number_of_threads(score, monkeypatch):
    monkeypatch.setattr(few, "_PARTS", 2)
    k, v = torch.randn(2, 3, 2, 9000, 16).unbind()
    q, attn = torch.randn(3, 4, 1, 16), mf.compile(mf.causal(), score=score)
    whole = attn(q, k, v, q_offset=8999)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(attn(q, k, v, q_offset=8999), whole)
            assert torch.equal(attn(q[1:2], k[1:2], v[1:2], q_offset=8999), whole[1:2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("q_len", "kv_heads", "v_head_dim"), [(8, 4, 16), (8, 2, 8), (40, 2, 8), (1, 4, 8)])
def test_results_are_laid_out_as_compiled_graphs_expect(q_len, kv_heads, v_head_dim, looked_at):
    q, k, v = torch.randn(2, 4, q_len, 16), torch.randn(2, kv_heads, 200, 16), torch.randn(2, kv_heads, 200, v_head_dim)
    attn = mf.compile(mf.causal())
    found = attn(q, k, v, q_offset=150, return_lse=True)
    assert all(x.is_contiguous() for x in found)
    compiled = torch.compile(lambda: attn(q, k, v, q_offset=150, return_lse=True), fullgraph=True, backend="aot_eager")
    for x, again in zip(found, compiled(), strict=True):
        assert torch.equal(x, again)
        assert x.stride() == again.stride()
    assert len(looked_at) == 2


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("visible", [lambda b, h, q, kv: kv <= q, lambda b, h, q, kv: kv <= q + b])
@pytest.mark.parametrize("offset", [100, torch.zeros(0, dtype=torch.int64)])
def test_a_batch_of_nothing(visible, q_len, offset, looked_at):
    q, k, v = torch.randn(0, 4, q_len, 16), torch.randn(0, 2, 200, 16), torch.randn(0, 2, 200, 8)
    out, lse = mf.attention(q, k, v, visible, q_offset=offset, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, q_len, 8), (0, 4, q_len))
    assert len(looked_at) == 1


def test_a_default_device_is_not_taken_for_that_of_the_call(looked_at):
    k, v = torch.randn(2, 2, 2, 400, 16).unbind()
    attn = mf.compile(mf.mask(lambda b, h, q, kv: kv >= b + h and kv <= q and kv % 7 != 0))
    q = torch.randn(2, 4, 3, 16)
    want = attn(q, k, v, q_offset=300)
    with torch.device("meta"):
        assert torch.equal(attn(q, k, v, q_offset=300), want)
    assert len(looked_at) == 2


def test_what_no_row_sees_may_hold_anything(looked_at):
    k, v = torch.randn(2, 2, 2, 64, 16).unbind()
    lengths = torch.tensor([40, 0])
    visible = mf.mask(lambda b, h, q, kv, *, lengths: kv < lengths[b] and kv % 3 != 1)
    attn = mf.compile(visible)
    clean = attn(Q, k, v, lengths=lengths)
    hidden = ~visible.dense(1, 64, batch=2, lengths=lengths)[:, 0, 0]
    for x in (k, v):
        x.transpose(1, 2)[hidden] = torch.nan
    dirty, lse = attn(Q, k, v, lengths=lengths, return_lse=True)
    assert torch.equal(dirty, clean)
    assert torch.equal(dirty[1], torch.zeros_like(dirty[1]))
    assert bool((lse[1] == -torch.inf).all())
    lengths += 5  # a write is seen, as nothing is kept
    assert not torch.equal(attn(Q, k.nan_to_num(), v.nan_to_num(), lengths=lengths)[0], clean[0])
    assert len(looked_at) == 3


def test_steps_leave_nothing_behind(looked_at):
    cache.invalidate()
    before = dict(cache._names)
    k, v = torch.randn(2, 1, 4, 300, 16).unbind()
    attn = mf.compile(mf.causal() & mf.sliding_window(50))
    for step in range(100, 300):
        attn(Q[:1], k[:, :, :step], v[:, :, :step], q_offset=step - 1)
    gc.collect()
    assert len(looked_at) == 200
    assert not cache._entries
    assert cache._names == before


def test_a_call_has_the_same_bits_however_often_it_comes():
    k, v = torch.randn(2, 1, 4, 300, 16).unbind()
    attn = mf.compile(mf.causal())
    first = attn(Q[:1], k, v, q_offset=299)
    assert all(torch.equal(attn(Q[:1], k, v, q_offset=299), first) for _ in range(100))


@pytest.mark.parametrize("score", [None, mf.scores.softcap(5.0)])
def test_gradients_come_from_an_analysis(score, looked_at):
    q, k, v = Q.clone().requires_grad_(), *torch.randn(2, 2, 4, 64, 16, requires_grad=True).unbind()
    out = mf.attention(q, k, v, mf.causal(), score=score, q_offset=40)
    assert len(looked_at) == 1
    for x in torch.autograd.grad(out.sum(), (q, k)):
        assert bool((x != 0).any())


def test_a_fault_names_the_users_line():
    table = torch.arange(10)
    with pytest.raises(mf.MaskIndexError, match=r"table\[kv\]"):
        mf.attention(Q, *torch.randn(2, 2, 4, 64, 16).unbind(), lambda b, h, q, kv: table[kv] >= 0)


def test_what_scores_look_up_is_there_wherever_the_mask_shows_it():
    bias, zero, (k, v) = torch.randn(10), torch.tensor([1, 0]), torch.randn(2, 2, 4, 64, 16).unbind()
    attn = mf.compile(mf.causal(), score=lambda score, b, h, q, kv: score + bias[kv])
    assert attn(Q, k, v, q_offset=9).isfinite().all()  # what is hidden may look anywhere
    with pytest.raises(mf.MaskIndexError, match=r"bias\[kv\].* index 10 .* at b=1, h=0, q=10, kv=10"):
        attn(Q, k, v, q_offset=torch.tensor([9, 10]))
    with pytest.raises(mf.MaskIndexError, match=r"divides by zero at b=1"):
        mf.attention(Q, k, v, mf.causal(), score=lambda score, b, h, q, kv: score + kv // zero[b])


@pytest.mark.parametrize(
    ("q_len", "kv_len", "given", "few_rows"),
    [
        (1, 64, {}, True),
        (32, 64, {}, False),
        (1, 64, {"score": mf.scores.softcap(5.0)}, True),
        (1, 64, {"dropout_p": 0.1}, False),
        (128, 8192, {"score": mf.scores.softcap(5.0)}, False),  # as many pairs of all heads as one evaluates at most
    ],
)
def test_other_calls_have_an_analysis(q_len, kv_len, given, few_rows, monkeypatch):
    made, honest = [], FewRows.of
    monkeypatch.setattr(FewRows, "of", lambda *given: made.append(honest(*given)) or made[-1])
    q, (k, v) = torch.randn(1, 2, q_len, 16), torch.randn(2, 1, 2, kv_len, 16)
    mf.attention(q, k, v, mf.causal(), **given, q_offset=8)
    assert any(x is not None for x in made) == few_rows


def test_explain_says_so():
    few_rows = mf.compile(mf.causal()).explain(1, 64, q_offset=63).to_dict()["passes"]
    assert few_rows["forward"] == {"rows, evaluated at each call without a plan": 1}
    assert "forward" not in mf.compile(mf.causal()).explain(64, 64).to_dict()["passes"]
    capped = mf.compile(mf.causal(), score=mf.scores.softcap(5.0)).explain(1, 64, q_offset=63).to_dict()["passes"]
    assert capped["forward"] == few_rows["forward"]
