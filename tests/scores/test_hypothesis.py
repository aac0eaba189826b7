"""Random score functions under random masks: as near to dense as rounding, blind to what is hidden, always the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.scores.form import form_of
from maskflash.scores.lifting import lift
from maskflash.testing import Shape, assert_matches_dense, masks, scores, shapes

LEN, BATCH, HEADS = 40, 2, 4
MASKS, SHAPES = masks(LEN, BATCH, HEADS), shapes(LEN, BATCH, HEADS, 12)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOTH = st.sampled_from(DTYPES).flatmap(lambda dtype: st.tuples(st.just(dtype), scores(LEN, BATCH, HEADS, dtype)))
SOMETIMES = st.sampled_from([None, None, 1, 2])


def with_sinks(seed, heads, dtype=torch.float32):
    return None if seed is None else torch.randn(heads, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60)
@given(
    mask=MASKS, shape=SHAPES, both=BOTH, sinks=SOMETIMES, p=st.sampled_from([0.0, 0.0, 0.4]), seed=st.integers(0, 99)
)
def test_all_that_is_computed_is_as_dense(mask, shape, both, sinks, p, seed):
    dtype, score = both
    given = {"score": score, "sinks": with_sinks(sinks, shape.heads, dtype), "dropout_p": p, "seed": seed}
    assert_matches_dense(mask, shape, dtype=dtype, block_size=16, **given)


def computed(mask, score, tensors, sinks, p):
    """out, lse and all gradients of a call."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    out, lse = mf.attention(q, k, v, mask, score=score, sinks=sinks, dropout_p=p, seed=7, return_lse=True)
    tables = [table for table in mf.score(score).held() if table.requires_grad]
    wanted = (q, k, v, *tables)
    draw = torch.Generator().manual_seed(1)
    arriving = [torch.randn(x.shape, generator=draw).to(x.dtype) for x in (out, lse)]
    gradients = torch.autograd.grad((out, lse), wanted, arriving, allow_unused=True)
    return [out, lse, *(x for x in gradients if x is not None)]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@settings(max_examples=25)
@given(mask=MASKS, shape=SHAPES, score=scores(LEN, BATCH, HEADS), sinks=SOMETIMES, p=st.sampled_from([0.0, 0.4]))
def test_what_nobody_sees_may_be_anything(mask, shape, score, sinks, p):
    shape = replace(shape, batch=1, heads=1, kv_heads=1)
    q, k, v = shape.tensors(torch.float32)
    seen = mask.dense(shape.q_len, shape.kv_len, batch=1, heads=1)[0, 0]
    clean, wild = [], []
    for x, unseen in ((q, ~seen.any(1)), (k, ~seen.any(0)), (v, ~seen.any(0))):
        clean.append(x.detach().masked_fill(unseen[:, None], 0.0))
        wild.append(x.detach().masked_fill(unseen[:, None], float("nan")))
    sinks = with_sinks(sinks, 1)
    found = computed(mask, score, wild, sinks, p)
    assert not any(x.isnan().any() for x in found)
    assert same(found, computed(mask, score, clean, sinks, p))


@pytest.mark.parametrize(
    "function",
    [
        lambda score, b, h, q, kv, *, t: (score if (q + kv) % 5 else -torch.inf) * t[h],
        lambda score, b, h, q, kv, *, t: (score if score > -0.5 else -torch.inf) * t[h],
        lambda score, b, h, q, kv, *, t: torch.log(torch.relu(score)) * t[h],
        lambda score, b, h, q, kv, *, t: torch.log(torch.relu(score) * t[h]),
    ],
    ids=range(4),
)
def test_what_hides_itself_gives_no_gradient(function):
    """Of a pair whose value is -inf neither the slope nor what its table gets may be anything but zero."""
    t = torch.tensor([0.5, 1.5], requires_grad=True)
    q, k, v = Shape(1, 2, 1, LEN, LEN, 8, 8).tensors(torch.float32)
    out = mf.attention(q, k, v, mf.causal(), score=function, t=t)
    found = torch.autograd.grad(out.square().sum(), (q, k, v, t))
    assert all(x.isfinite().all() for x in (out, *found))
    assert (found[-1] != 0).all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradients_of_tables_are_the_same_bits_whatever_the_threads(threads, dtype, p):
    draw = torch.Generator().manual_seed(2)
    n = 300
    t, per_head = torch.randn(2 * n, generator=draw), torch.randn(4, 9, generator=draw)
    t.requires_grad_(), per_head.requires_grad_()

    def score(score, b, h, q, kv):
        return 4 * torch.tanh(score * t[q] / 4) + t[kv - q + n] + per_head[h, (q * kv) % 9] - t[kv]

    tensors = [x.detach() for x in Shape(2, 4, 2, n, n, 16, 16).tensors(dtype)]
    found = []
    for count in (1, 2, 1, 2, 3):
        threads(count)
        found.append(computed(mf.causal(), score, tensors, with_sinks(1, 4), p))
    assert all(same(found[0], other) for other in found[1:])


def test_the_strategy_reaches_every_class():
    missing = {(kind, hides) for kind in ("folded", "additive", "general") for hides in (False, True)}

    def nothing_missing(score):
        split = lift(score.traced({}).expr)
        missing.discard((form_of(split.rest).kind, split.mask is not None))
        return not missing

    find(scores(8, 1, 2), nothing_missing, settings=settings(max_examples=300, phases=[Phase.generate]))
