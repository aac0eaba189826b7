"""Largest scores, probabilities of rows and top keys are those of dense float64, whatever the mask, score and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.op import inside
from maskflash.testing import error_budget, masks, shapes

CAPPED = mf.scores.softcap(2.0)


@mf.score
def mixed(score, b, h, q, kv, *, strength):
    return torch.tanh(score) * 3 - strength[h] * abs(q - kv)


def tensors(dtype=torch.float32, batch=2, heads=4, kv_heads=2, q_len=70, kv_len=90, dim=8):
    q = torch.randn(batch, heads, q_len, dim).to(dtype)
    return q, torch.randn(batch, kv_heads, kv_len, dim).to(dtype)


def dense(q, k, visible, score=None, sinks=None, scale=None):
    """Scores with -inf where hidden, and probabilities, in the dtype of q and k; plain operations on all pairs."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    values = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    values = (values if score is None else score(values)).masked_fill(~visible, -torch.inf)
    empty = torch.full((q.shape[1],), -torch.inf) if sinks is None else sinks
    lse = torch.logaddexp(values.logsumexp(-1), empty.to(q.dtype)[:, None])
    return values, (values - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()


def mixed_densely(q_len, kv_len, strength, dtype, q_offset=0):
    rows, columns = torch.arange(q_len)[:, None] + q_offset, torch.arange(kv_len)
    return lambda s: torch.tanh(s) * 3 - strength.to(dtype)[:, None, None] * (rows - columns).abs()


def within(found, plain, exact):
    """Whether a result is as near to the truth as a plain computation may be, and -inf where that is."""
    assert torch.equal(found == -torch.inf, exact == -torch.inf)
    error = torch.where(exact.isfinite(), found.double() - exact, 0.0).abs().max().item() if exact.numel() else 0.0
    return error <= error_budget(plain, exact)


@settings(max_examples=25)
@given(masks(), shapes(), st.sampled_from([None, CAPPED]), st.booleans(), st.integers(1, 64))
def test_of_any_mask_and_shape(mask, shape, score, with_sinks, block_size):
    q, k, _ = (x.detach() for x in shape.tensors(torch.float32))
    visible = mask.dense(shape.q_len, shape.kv_len, batch=shape.batch, heads=shape.heads)
    sinks = torch.randn(shape.heads) if with_sinks else None
    attn = mf.compile(mask, score=score, block_size=block_size)
    capped = None if score is None else lambda s: 2.0 * torch.tanh(s / 2.0)
    (exact, shares), (plain, plain_shares) = (
        dense(q.to(dtype), k.to(dtype), visible, capped, sinks) for dtype in (torch.float64, torch.float32)
    )
    lowest = torch.full(q.shape[:2], -torch.inf)
    largest = [x.flatten(2).amax(2) if x.numel() else lowest.to(x.dtype) for x in (plain, exact)]
    assert within(attn.max_logits(q, k), *largest)
    rows = list(range(shape.q_len))[::-3]
    assert within(attn.probabilities(q, k, rows, sinks=sinks), plain_shares[:, :, rows], shares[:, :, rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_each_dtype(dtype):
    q, k = tensors(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mask, strength = mf.causal() & mf.document([40, 50]), torch.rand(4, dtype=torch.float64)
    visible = mask.dense(70, 90, batch=2, heads=4, q_offset=20)
    attn = mf.compile(mask, score=mixed, scale=0.7, block_size=32)
    call = {"q_offset": 20, "strength": strength}
    found = attn.max_logits(q, k, **call), attn.probabilities(q, k, [0, -1, 33], **call)
    assert {x.dtype for x in found} == {wide}
    (exact, shares), (plain, plain_shares) = (
        dense(a.to(to), b.to(to), visible, mixed_densely(70, 90, strength, to, 20), scale=0.7)
        for to, a, b in ((torch.float64, q, k), (wide, q.flip(3), k.flip(3)))  # float64, too, has an error of its own
    )
    assert within(found[0], plain.amax((2, 3)), exact.amax((2, 3)))
    assert within(found[1], plain_shares[:, :, [0, -1, 33]], shares[:, :, [0, -1, 33]])


def test_probabilities_are_those_of_the_call():
    q, k = tensors(torch.float64)
    v, sinks = torch.randn(2, 2, 90, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    attn = mf.compile(mf.causal() & mf.sliding_window(30))
    out = attn(q, k, v, q_offset=20, sinks=sinks)
    shares = attn.probabilities(q, k, range(70), q_offset=20, sinks=sinks)
    torch.testing.assert_close(shares @ v.repeat_interleave(2, 1), out)


def test_top_keys():
    q, k = tensors()
    attn, sinks = mf.compile(mf.causal() & mf.sliding_window(5)), torch.randn(4)
    values, indices = attn.top_keys(q, k, 40, 8, q_offset=20, sinks=sinks)
    shares = attn.probabilities(q, k, 40, q_offset=20, sinks=sinks)[:, :, 0]
    assert torch.equal(values[..., :6], shares.sort(descending=True).values[..., :6])
    assert torch.equal(shares.gather(-1, indices[..., :6]), values[..., :6])
    assert torch.equal(indices[..., 6:], torch.full((2, 4, 2), -1))
    assert not values[..., 6:].any()
    assert indices[..., :6].sort().values[0, 0].tolist() == [55, 56, 57, 58, 59, 60]


def test_of_equal_scores_the_first_key_comes_first():
    q, k = torch.zeros(2, 1, 1, 300, 4).unbind()
    assert mf.compile(mf.causal()).top_keys(q, k, 250, 20)[1][0, 0].tolist() == list(range(20))


def test_what_is_hidden_may_hold_anything():
    q, k = tensors()
    attn = mf.compile(mf.padding(torch.tensor([50, 60])), score=mf.scores.bias(torch.randn(1, 1, 90)))
    clean = attn.max_logits(q, k), attn.probabilities(q, k, [3, 4])
    k[0, :, 50:], k[1, :, 60:] = torch.nan, torch.inf
    assert torch.equal(attn.max_logits(q, k), clean[0])
    assert torch.equal(attn.probabilities(q, k, [3, 4]), clean[1])


def test_rows_and_heads_that_see_nothing():
    q, k = tensors()
    attn = mf.compile(lambda b, h, q, kv: h != 1 and b == 0 and q > 5)
    largest = attn.max_logits(q, k)
    assert torch.equal(largest == -torch.inf, torch.tensor([[False, True, False, False], [True] * 4]))
    assert not attn.probabilities(q, k, [0, 5]).any()
    assert attn.top_keys(q, k, 5, 3)[1].eq(-1).all()


def test_no_more_pairs_at_once_than_said(monkeypatch):
    q, k = tensors(batch=1, heads=2, q_len=150, kv_len=170)
    attn = mf.compile(mf.mask(lambda b, h, q, kv: (q - kv) % 5 != h), score=CAPPED, block_size=16)
    whole = attn.max_logits(q, k), attn.probabilities(q, k, range(150))
    pairs, honest = [], inside.Look._values

    def watched(look, rows, columns, full):
        pairs.append(2 * len(rows) * len(columns))
        return honest(look, rows, columns, full)

    monkeypatch.setattr(inside, "_PAIRS_AT_ONCE", 600)
    monkeypatch.setattr(inside.Look, "_values", watched)
    torch.testing.assert_close((attn.max_logits(q, k), attn.probabilities(q, k, range(150))), whole)
    assert len(pairs) > 50
    assert max(pairs) <= 600


def test_skipped_tiles_are_not_looked_at(monkeypatch):
    q, k = tensors(batch=1, q_len=1024, kv_len=1024)
    pairs, honest = [], inside.Look._values

    def watched(look, rows, columns, full):
        pairs.append(len(rows) * len(columns))
        return honest(look, rows, columns, full)

    monkeypatch.setattr(inside.Look, "_values", watched)
    mf.compile(mf.causal() & mf.sliding_window(100)).max_logits(q, k)
    assert sum(pairs) == 15 * 128**2


def test_nothing_is_differentiable():
    q, k = (x.requires_grad_() for x in tensors())
    attn = mf.compile(mf.causal(), score=mf.scores.bias(torch.randn(70, 90, requires_grad=True)))
    assert not attn.max_logits(q, k).requires_grad
    assert not attn.probabilities(q, k, [0]).requires_grad


def test_autocast_rounds_q_and_k_only():
    q, k = tensors()
    attn = mf.compile(mf.causal())
    with torch.autocast("cpu", torch.bfloat16):
        found = attn.max_logits(q, k)
    assert torch.equal(found, attn.max_logits(q.bfloat16(), k.bfloat16()))


@pytest.mark.parametrize(
    ("look", "error", "message"),
    [
        (lambda a, q, k: a.probabilities(q, k, [70]), mf.ArgumentError, "rows holds 70, expected from -70 to 69"),
        (lambda a, q, k: a.probabilities(q, k, -71), mf.ArgumentError, "rows holds -71"),
        (lambda a, q, k: a.probabilities(q, k, [0.5]), mf.ArgumentTypeError, "rows"),
        (lambda a, q, k: a.top_keys(q, k, 70, 1), mf.ArgumentError, "row holds 70, expected"),
        (lambda a, q, k: a.top_keys(q, k, 0, 91), mf.ArgumentError, "n is 91, expected at most 90"),
        (lambda a, q, k: a.top_keys(q, k, [0], 1), mf.ArgumentTypeError, "row is"),
        (lambda a, q, k: a.max_logits(q, k[0]), mf.ArgumentError, "k has shape"),
        (lambda a, q, k: a.max_logits(q, k, window=3), mf.ArgumentTypeError, "unexpected argument 'window'"),
        (lambda a, q, k: a.probabilities(q, k, 0, sinks=torch.zeros(3)), mf.ArgumentError, "sinks have shape"),
    ],
)
def test_what_does_not_fit_is_refused(look, error, message):
    with pytest.raises(error, match=message):
        look(mf.compile(mf.causal()), *tensors())


def test_a_look_up_out_of_range_is_an_error():
    q, k = tensors()
    attn = mf.compile(mf.causal(), score=mf.scores.bias(torch.zeros(60, 90)))
    with pytest.raises(mf.MaskIndexError):
        attn.max_logits(q, k)
