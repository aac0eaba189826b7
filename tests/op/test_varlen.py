"""Packed sequences attend as each would alone: held against dense float64 of the padded batch, for random masks."""

import gc
import math
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import maskflash as mf
from maskflash.backends.dense import DenseCall
from maskflash.functions.sizes import Sizes
from maskflash.masks.sequences import ARGUMENTS, InSequences
from maskflash.masks.sight import Sight
from maskflash.op import cache, places
from maskflash.scores.score import as_score
from maskflash.testing import Shape, error_budget, masks, scores
from maskflash.testing.dense import bound_score
from tests.op.ragged import PREFIX, packed, starts

MOST = 20  # tokens of a sequence
TABLES = 64
LIMITS = torch.randint(0, 300, (50,))
DOCUMENTS = torch.arange(3 * TABLES).view(3, TABLES) // 5 % 4


def padded(x, lengths):
    """(tokens, heads, head_dim) as (sequences, heads, longest, head_dim), with zeros."""
    longest = max([1, *lengths])
    rows = [torch.cat([part, part.new_zeros(longest - len(part), *x.shape[1:])]) for part in x.split(lengths)]
    return torch.stack(rows).transpose(1, 2)


def unpadded(x, lengths):
    """(sequences, heads, longest, ...) as (tokens, heads, ...)."""
    return torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(x, lengths, strict=True)])


def assert_as_alone(mask, lengths, kv_lengths, q_offset=0, score=None, sinks=None, dtype=torch.float32, **args):
    """out, lse and gradients of packed sequences are those of the padded batch, densely and in float64."""
    q, k, v = packed(sum(lengths), sum(kv_lengths), dtype)
    out, lse = mf.varlen_attention(
        *(q, k, v, mask, starts(lengths), starts(kv_lengths)),
        **{"q_offset": q_offset, "score": score, "sinks": sinks, "return_lse": True},
        **args,
    )
    assert out.is_contiguous() and out.dtype == dtype
    whole = mf.mask(mask)
    count, rows, columns = len(lengths), max([1, *lengths]), max([1, *kv_lengths])
    sizes = {"batch": count, "heads": 4, "q_offset": q_offset, "kv_offset": 0, "device": "cpu"}
    inside = [torch.arange(n) < torch.tensor(of)[:, None] for n, of in ((rows, lengths), (columns, kv_lengths))]
    dense = whole.dense(rows, columns, **sizes, **{name: args[name] for name in whole.keywords})
    dense = dense & inside[0][:, None, :, None] & inside[1][:, None, None, :]
    draw = torch.Generator().manual_seed(1)
    dout, dlse = torch.randn(out.shape, generator=draw).to(dtype), torch.randn(lse.shape, generator=draw).to(lse.dtype)
    bound, learned = None, []
    if score is not None:
        score = as_score("score", score)
        shape = Shape(count, 4, 2, rows, columns, 8, 6)
        bound = bound_score(score, shape, sizes, dtype, args)
        learned = [x for x in score.held() if x.requires_grad]
    batch = [padded(x.detach(), of) for x, of in ((q, lengths), (k, kv_lengths), (v, kv_lengths))]
    batch = [x.requires_grad_() for x in batch]
    dout_in, dlse_in = padded(dout, lengths), padded(dlse.T[..., None], lengths)[..., 0]
    call = DenseCall(*batch, dense, 8**-0.5, dout_in, dlse_in, sinks, bound, tuple(learned), None)
    exact, plain = call.results(torch.float64), call.results(dtype, backwards=True)
    terms = call.terms(exact)
    wanted = [q, k, v, *([] if sinks is None else [sinks]), *learned]
    found = torch.autograd.grad((out, lse), wanted, (dout, dlse), allow_unused=True)
    names = ["dq", "dk", "dv", *([] if sinks is None else ["dsinks"]), *(f"dtable{n}" for n in range(len(learned)))]
    ours = {"out": out, "lse": lse.T, **dict(zip(names, found, strict=True))}
    of = {"out": lengths, "lse": lengths, "dq": lengths, "dk": kv_lengths, "dv": kv_lengths}
    for name, x in ours.items():
        if x is None:
            continue
        unit = torch.finfo(dtype).eps + torch.finfo(torch.float64).eps
        expected = exact[name].double()
        budget = (error_budget(plain[name], exact[name], dtype) + unit * terms[name]) * torch.ones_like(expected)
        if name in of:
            budget, expected = (unpadded(y, of[name]) for y in (budget, expected))
        error = (x.detach().double() - expected).abs()
        alike = x.detach().double() == expected  # infinities
        assert bool((alike | (error <= budget)).all()), name


FEW = settings(max_examples=25)
LENGTHS = st.lists(st.integers(0, MOST), min_size=1, max_size=3)


@st.composite
def calls(draw):
    """Lengths of queries and of keys, and an offset for each sequence, or for all."""
    lengths = draw(LENGTHS)
    kv_lengths = draw(st.one_of(st.just(lengths), st.lists(st.integers(0, MOST), min_size=len(lengths), max_size=3)))
    kv_lengths = (kv_lengths + [2] * len(lengths))[: len(lengths)]
    number = st.integers(0, MOST)
    several = st.lists(number, min_size=len(lengths), max_size=len(lengths)).map(torch.tensor)
    return lengths, kv_lengths, draw(st.one_of(st.just(0), number, several))


@FEW
@given(mask=masks(TABLES, batch=3, heads=4), call=calls())
def test_random_masks(mask, call):
    assert_as_alone(mask, *call)


@FEW
@given(mask=masks(TABLES, batch=3, heads=4), score=scores(TABLES, batch=3, heads=4), call=calls())
def test_random_masks_and_scores(mask, score, call):
    assert_as_alone(mask, *call, score=score)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "mask",
    [
        mf.full(),
        mf.causal(),
        mf.sliding_window(3, 2),
        mf.causal() & (mf.global_tokens(2) | mf.sliding_window(4)),
        mf.prefix_lm(PREFIX),
        mf.dilated_window(9, 2),
        lambda b, h, q, kv: q >= kv and DOCUMENTS[b, q] == DOCUMENTS[b, kv],
        lambda b, h, q, kv: (kv // 2) * 2 <= q * 3 - b and kv + 3 > PREFIX[b],
        lambda b, h, q, kv: abs(kv - q + b) % 3 < 2 and q < 9 - h,
        lambda b, h, q, kv: b == 1 or max(q - 3, 0) <= kv,
    ],
)
def test_masks(mask, dtype):
    assert_as_alone(mask, [5, 0, 17], [9, 4, 30], dtype=dtype)
    assert_as_alone(mask, [5, 0, 17], [9, 4, 30], torch.tensor([4, 4, 13]), dtype=dtype)
    assert_as_alone(mask, [7, 12, 3], [7, 12, 3], dtype=dtype)
    assert_as_alone(mask, [9, 4, 20], [5, 0, 7], torch.tensor([-4, -4, 3]), dtype=dtype)


@pytest.mark.parametrize(
    "score",
    [
        mf.scores.alibi(),
        mf.scores.softcap(2.0),
        mf.scores.temperature(torch.rand(4, requires_grad=True)),
        mf.scores.relative_table(torch.randn(4, 81, requires_grad=True)),
        mf.scores.bias(torch.randn(3, 4, 60, 40, requires_grad=True)),
        mf.scores.forget_gate(-torch.rand(3, 4, 60)),
        lambda score, b, h, q, kv: torch.where(kv % 3 == b % 3, -math.inf, score + b * 0.1),
    ],
)
def test_scores(score):
    for offset in (0, torch.tensor([4, 4, 13])):
        assert_as_alone(mf.causal(), [5, 0, 17], [9, 4, 30], offset, score)


def test_arguments_of_mask_and_score_and_sinks():
    def mask(b, h, q, kv, *, window, reach):
        return -reach[b] <= q - kv < window

    def score(score, b, h, q, kv, *, by):
        return score * by[b]

    args = {"window": 4, "reach": torch.tensor([1, 2, 0]), "by": torch.rand(3)}
    sinks = torch.randn(4, requires_grad=True)
    assert_as_alone(mask, [5, 0, 17], [9, 4, 30], 3, score, sinks, **args)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1, 0]])
def test_hardly_any_token(lengths):
    q, k, v = packed(sum(lengths), sum(lengths))
    at = starts(lengths)
    out, lse = mf.varlen_attention(q, k, v, mf.causal(), at, at, return_lse=True)
    assert out.shape == (sum(lengths), 4, 6) and lse.shape == (4, sum(lengths))
    torch.autograd.grad(out.sum(), (q, k, v))
    if sum(lengths):
        assert torch.equal(out, v.repeat_interleave(2, 1))


def test_queries_whose_keys_are_all_missing():
    q, k, v = packed(5, 3)
    out, lse = mf.varlen_attention(q, k, v, None, starts([2, 3]), starts([0, 3]), return_lse=True)
    assert (out[:2] == 0).all() and (lse[:, :2] == -torch.inf).all()
    assert all(x[:2].abs().sum() == 0 for x in torch.autograd.grad(out.sum(), (q,)))


def in_sequences(mask, lengths, kv_lengths, q_offset=0):
    """The mask of packed tokens, densely."""
    twin = mf.mask(mask).twin(InSequences)
    total, kv_total = sum(lengths), sum(kv_lengths)
    tables = places.find(starts(lengths), starts(kv_lengths), q_offset, total, kv_total)
    sizes = Sizes.checked("test", total, kv_total)
    return Sight.of(twin, sizes, dict(zip(map(str, ARGUMENTS), tables, strict=True)))


FAR = torch.tensor([2**62, -(2**63), 2**63 - 1])


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, kv: kv < FAR[b],
        lambda b, h, q, kv: FAR[b] <= kv,
        lambda b, h, q, kv: q - FAR[b] <= kv,  # wraps, as in torch
        lambda b, h, q, kv: kv - FAR[b] > q,
        lambda b, h, q, kv: q - kv < FAR[b],
        lambda b, h, q, kv: q < FAR[b] + kv,
        lambda b, h, q, kv: kv + 2**62 + 2**62 > q,
        lambda b, h, q, kv: q * 2**60 < kv * 2**60,
    ],
)
@pytest.mark.parametrize("q_offset", [0, 2**60, -(2**60), torch.tensor([2**60, -(2**60), 5])])
def test_numbers_of_any_size(mask, q_offset):
    found = in_sequences(mask, [3, 2, 4], [2, 5, 4], q_offset).dense()[0, 0]
    alone = mf.mask(mask).dense(4, 5, batch=3, q_offset=q_offset)[:, 0]
    expected = torch.block_diag(*(x[:n, :m].int() for x, n, m in zip(alone, [3, 2, 4], [2, 5, 4], strict=True)))
    assert torch.equal(found.int(), expected)


@pytest.mark.parametrize("q_offset", [0, "bottom right"])
@pytest.mark.parametrize(
    "mask",
    [
        mf.causal(),
        mf.sliding_window(300),
        mf.sliding_window(200, 100),
        mf.causal() & mf.padding(torch.randint(0, 600, (50,))),
        mf.mask(lambda b, h, q, kv: q >= kv and q - kv < LIMITS[b]),
    ],
)
def test_analysis_looks_at_no_tile(mask, q_offset):
    lengths = torch.randint(0, 500, (50,), generator=torch.Generator().manual_seed(0))
    kv_lengths = lengths + torch.arange(50) * 7 if q_offset else lengths
    offset = kv_lengths - lengths if q_offset else 0
    attn = mf.compile(mask)
    q, k, v = packed(int(lengths.sum()), int(kv_lengths.sum()))
    cache.invalidate()
    attn.varlen(q, k, v, starts(lengths), starts(kv_lengths), q_offset=offset)
    ((_, entry),) = cache._entries.items()
    decided = {name for name, tiles in entry.analysis.decided.items() if tiles}
    assert decided in ({"intervals"}, {"columns"})


def test_a_write_in_place_is_seen_and_nothing_is_traced_again():
    attn = mf.compile(mf.causal() & mf.prefix_lm(PREFIX))
    q, k, v = packed(12, 12)
    at = torch.tensor([0, 3, 5, 12], dtype=torch.int32)
    before = attn.varlen(q, k, v, at, at)
    analyses = len(cache._entries)
    assert torch.equal(attn.varlen(q, k, v, at, at), before) and len(cache._entries) == analyses
    at[1] = 2
    after = attn.varlen(q, k, v, at, at)
    assert not torch.equal(after, before)
    assert torch.equal(after, mf.compile(attn.given).varlen(q, k, v, at.long(), at.clone()))
    (trace,) = attn._of_tokens.mask.traces.all()
    assert trace.text in attn.given.twin(InSequences).traces.texts


def test_a_write_that_torch_does_not_see_takes_invalidate():
    attn = mf.compile(mf.causal())
    q, k, v = packed(8, 8)
    at = torch.tensor([0, 3, 8])
    before = attn.varlen(q, k, v, at, at)
    at.numpy()[1] = 5
    assert torch.equal(attn.varlen(q, k, v, at, at), before)
    mf.invalidate()
    assert not torch.equal(attn.varlen(q, k, v, at, at), before)
    checked = mf.compile(mf.causal(), check=True)
    checked.varlen(q, k, v, at, at)
    at.numpy()[1] = 6
    with pytest.raises(mf.ArgumentError, match="table cu_seqlens_q holds something else"):
        checked.varlen(q, k, v, at, at)


def test_memory_does_not_grow():
    attn = mf.compile(mf.causal())
    q, k, v = packed(8, 8)
    for step in range(40):
        at = torch.tensor([0, step % 8, 8])
        attn.varlen(q, k, v, at, at, q_offset=step % 3)
    del at
    gc.collect()
    attn.varlen(q, k, v, *[torch.tensor([0, 8])] * 2)
    assert len(places._kept) <= 2
    assert sum(entry.analysis.block_map.q_len == 8 for entry in cache._entries.values()) <= 4


def test_threads_make_and_forget_places():
    given = [torch.tensor([0, 3, 8]) for _ in range(40)]
    failed, before = [], sys.getswitchinterval()

    def work(forgets):
        try:
            for _ in range(20):
                for each in given:
                    places.find(each, each, 0, 8, 8)
                    if forgets:
                        places.forget()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(forgets,)) for forgets in (False, False, True)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failed == []


def test_inference_mode():
    attn = mf.compile(mf.causal())
    with torch.inference_mode():
        q, k, v = packed(8, 8)
        at = torch.tensor([0, 3, 8])
        first = attn.varlen(q, k, v, at, at)
        analyses = len(cache._entries)
        assert torch.equal(attn.varlen(q, k, v, at, at.clone()), first) and len(cache._entries) == analyses
    q, k, v = packed(8, 8)
    out = attn.varlen(q, k, v, at, at)
    assert torch.equal(out, first)
    torch.autograd.grad(out.sum(), (q, k, v))


def test_a_compiled_op_is_pickled():
    attn = mf.compile(mf.causal(), score=mf.scores.softcap(2.0))
    q, k, v = packed(8, 8)
    at = starts([3, 5])
    out = attn.varlen(q, k, v, at, at)
    assert torch.equal(pickle.loads(pickle.dumps(attn)).varlen(q, k, v, at, at), out)


MASK = mf.sliding_window(3)
ATTN = mf.compile(MASK)
CAPPED = mf.compile(lambda b, h, q, kv, *, window: 0 <= q - kv < window, score=mf.scores.softcap(2.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda *args: ATTN.varlen(*args),
        lambda *args: CAPPED.varlen(*args, window=3),
        lambda q, k, v, at, kv_at: mf.varlen_attention(q, k, v, MASK, at, kv_at, q_offset=1),
    ],
)
def test_torch_compile_takes_it_whole_and_other_starts_compile_nothing(call):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(call, backend=counter, fullgraph=True)
    for lengths in ([3, 5, 2], [1, 8, 1], [0, 9, 1], [10, 5], [7, 7, 7], [6, 0, 2, 1]):
        q, k, v = packed(sum(lengths), sum(lengths))
        at = starts(lengths)
        ours, eager = fast(q, k, v, at, at), call(q, k, v, at, at)
        assert torch.equal(ours, eager)
        for x, y in zip(*(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (ours, eager)), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 2  # the second number of tokens made the dimension dynamic
    with pytest.raises(mf.ArgumentError, match="cu_seqlens_q ends with 9, expected 8"):
        fast(*packed(8, 8), torch.tensor([0, 4, 9]), torch.tensor([0, 4, 8]))
    torch._dynamo.reset()
