"""Scores and dropout on the CPU equal dense float64 attention within the error budget, and always to the same bits."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.cpu import biases, softmax, tile, work
from maskflash.testing import Shape, assert_matches_dense

LEN = 300


def parameter(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def scores(batch, heads, dtype=torch.float32, seed=0):
    """A score function of each kind of look-up, by name, over tables that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    slope, warm = parameter(heads, seed=1, dtype=dtype), parameter(heads, LEN, seed=2, dtype=dtype)
    relative = parameter(heads, 2 * LEN - 1, seed=3, dtype=dtype)
    shared, number = parameter(2 * LEN, seed=4, dtype=dtype), parameter(seed=5, dtype=dtype)
    buckets, tokens = parameter(32, heads, seed=6, dtype=dtype), parameter(LEN, seed=7, dtype=dtype)
    pairs = parameter(batch, heads, LEN, LEN, seed=8, dtype=dtype)
    bucket = torch.randint(0, 32, (2 * LEN,), generator=generator)
    relation = torch.randint(0, 32, (batch, LEN, LEN), generator=generator)
    gates = parameter(batch, heads, LEN, seed=9, dtype=dtype)
    return {
        "capped": lambda score, b, h, q, kv: 4 * torch.tanh(score / 4),
        "erased": lambda score, b, h, q, kv: tokens[kv] + 0 * score,
        "slopes": lambda score, b, h, q, kv: score + slope[h] * 0.01 * (kv - q),
        "number": lambda score, b, h, q, kv: score * number + slope[h],
        "warm": lambda score, b, h, q, kv: score * warm[h, q],
        "warm keys": lambda score, b, h, q, kv: score * tokens[kv] + warm[h, q],
        "relative": lambda score, b, h, q, kv: score + relative[h, kv - q + LEN - 1],
        "clamped": lambda score, b, h, q, kv: score + shared[min(max(q - kv, -9), 30) + 9] * torch.tanh(score),
        "from the end": lambda score, b, h, q, kv: torch.sigmoid(score) * shared[kv - q - LEN],
        "buckets": lambda score, b, h, q, kv: score + buckets[bucket[kv - q + LEN], h],
        "twice": lambda score, b, h, q, kv: torch.tanh(score + tokens[q] + tokens[kv]),
        "gates": lambda score, b, h, q, kv: score + gates[b, h, q] - gates[b, h, kv],
        "pairs": lambda score, b, h, q, kv: score + pairs[b, h, q, kv],
        "relations": lambda score, b, h, q, kv: score * slope[h] + buckets[relation[b, q, kv], h] * torch.sin(score),
        "hides": lambda score, b, h, q, kv: torch.where(score < 0.3, score, -torch.inf) + warm[h, kv],
        "faults where hidden": lambda score, b, h, q, kv: torch.tanh(score * torch.sqrt(q - kv + 1)),
    }


NAMES = list(scores(1, 1))
MASKS = {
    "causal": mf.causal(),
    "documents": mf.causal() & mf.mask(lambda b, h, q, kv: q // 70 == kv // 70),
    "window": mf.causal() & mf.sliding_window(40),
    "sinks": mf.causal() & (mf.sliding_window(30) | mf.mask(lambda b, h, q, kv: kv < 4)),
    "dilated": mf.mask(lambda b, h, q, kv: ((q - kv) % 3 == 0) & (q >= kv)),
    "heads": mf.mask(lambda b, h, q, kv: (q - kv >= h) & (q - kv < 60 * (h + 1))),
    "emptied": mf.mask(lambda b, h, q, kv: (q % 7 != 3) & (q >= kv)),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that tests have many of them."""
    monkeypatch.setattr(work, "TILE", 1 << 13)
    monkeypatch.setattr(work, "WIDTH", 64)
    monkeypatch.setattr(tile, "WIDTH", 64)
    monkeypatch.setattr(work, "_HEIGHT", 64)
    monkeypatch.setattr(biases, "_MATRIX", 1 << 12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", ["sinks"])
def test_scores_and_gradients_of_tables(small_tiles, name, mask):
    assert_matches_dense(MASKS[mask], Shape(2, 4, 2, LEN, LEN, 16, 8), score=scores(2, 4)[name])


@settings(max_examples=8)
@given(
    name=st.sampled_from(NAMES),
    mask=st.sampled_from(list(MASKS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    batch=st.integers(1, 2),
    sizes=st.tuples(st.integers(1, LEN // 2), st.integers(0, LEN // 2)),
    dims=st.sampled_from([(8, 8), (5, 12), (16, 4)]),
    offsets=st.tuples(st.integers(0, LEN // 2), st.booleans()),
    dropout_p=st.sampled_from([0.0, 0.0, 0.5]),
    sinks=st.booleans(),
)
def test_everything_together(name, mask, dtype, heads, batch, sizes, dims, offsets, dropout_p, sinks):
    (count, kv_heads), (offset, per_row) = heads, offsets
    shape = Shape(batch, count, kv_heads, *sizes, *dims)
    q_offset = torch.arange(offset, offset + batch).clamp(max=LEN // 2) if per_row else offset
    assert_matches_dense(
        MASKS[mask],
        shape,
        dtype=dtype,
        score=scores(batch, count, dtype)[name],
        q_offset=q_offset,
        dropout_p=dropout_p,
        sinks=torch.linspace(-1, 1, count, dtype=dtype).requires_grad_() if sinks else None,
    )


@pytest.mark.parametrize("mask", ["causal", "window", "dilated", "heads"])
def test_dropout_alone(small_tiles, mask):
    assert_matches_dense(MASKS[mask], Shape(2, 4, 2, LEN, LEN, 16, 8), dropout_p=0.3, seed=5)


def results(mask, score, wanted, dtype=torch.float32, length=LEN, **given):
    q, k, v = Shape(2, 4, 2, length, length, 16, 8).tensors(dtype)
    out, lse = mf.attention(q, k, v, mask, score=score, return_lse=True, **given)
    return out, lse, *torch.autograd.grad((out, lse), (q, k, v, *wanted), (out.detach() + 1, lse.detach().cos()))


@pytest.mark.parametrize("name", ["warm", "relative", "buckets", "twice", "pairs", "relations"])
def test_the_same_bits_whatever_the_number_of_threads(small_tiles, name):
    score, threads = scores(2, 4)[name], torch.get_num_threads()
    wanted = [cell.cell_contents for cell in score.__closure__ if getattr(cell.cell_contents, "requires_grad", False)]
    found = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(results(MASKS["sinks"], score, wanted, dropout_p=0.2, seed=3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_what_nobody_sees_may_hold_anything():
    mask = mf.mask(lambda b, h, q, kv: (q >= kv) & (q % 5 != 2) & (kv % 4 != 1))
    tokens = torch.arange(LEN)
    for name in ("capped", "relative", "relations", "faults where hidden"):
        score = scores(2, 4)[name]
        found = []
        for junk in (0.0, torch.nan, torch.inf):
            q, k, v = (x.detach() for x in Shape(2, 4, 2, LEN, LEN, 16, 16).tensors(torch.float32))
            q[:, :, tokens % 5 == 2] = junk
            k[:, :, tokens % 4 == 1] = v[:, :, tokens % 4 == 1] = junk
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out = mf.attention(*inputs, mask, score=score)
            found.append((out, *torch.autograd.grad(out.sum(), inputs)))
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True)), name


def test_hidden_pairs_may_look_up_nan():
    table = torch.randn(LEN)
    table[LEN // 2 :] = torch.nan
    table.requires_grad_()
    mask = mf.mask(lambda b, h, q, kv: (kv < LEN // 2) & (q >= kv))
    for score in (
        lambda score, b, h, q, kv: score + table[kv],
        lambda score, b, h, q, kv: torch.tanh(score * table[kv]),
    ):
        found = results(mask, score, [table])
        assert not any(x.isnan().any() for x in found)
        assert not found[-1][LEN // 2 :].any()


OVERFLOWS = [
    lambda one, other: lambda score, b, h, q, kv: score + one[q, kv] * other[q, kv],
    lambda one, other: lambda score, b, h, q, kv: torch.tanh(score) + one[q, kv] * other[q, kv],
    lambda one, other: lambda score, b, h, q, kv: torch.tanh(score * one[q, kv] * one[q, kv]) * other[q, kv],
    lambda one, other: lambda score, b, h, q, kv: torch.sin(one[q, kv] * score) - score * other[q, kv] ** 2 / 9,
    lambda one, other: lambda score, b, h, q, kv: torch.tanh(score) * score * score * one[q, kv] * other[q, kv],
    lambda one, other: lambda score, b, h, q, kv: torch.tanh(score) / (1 / one[q, kv]) - other[q, kv],
]


@settings(max_examples=30)
@given(
    score=st.sampled_from(OVERFLOWS),
    huge=st.sampled_from(
        [(1e20, 1e20), (1e20, -1e20), (3e38, 2.0), (1e29, 1e29), (300.0, 300.0), (torch.inf, 0.0), (torch.nan, 1.0)]
    ),
    dropout_p=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
@example(OVERFLOWS[0], (300.0, 300.0), 0.2, torch.float32, True, 0)
@example(OVERFLOWS[0], (300.0, 300.0), 0.0, torch.float32, True, 0)
def test_what_hidden_pairs_compute_may_overflow(score, huge, dropout_p, dtype, half, seed):
    """The product of two numbers that float32 holds may be more than it does."""
    hidden = ~mf.causal().dense(80, 80)[0, 0]
    tables = [parameter(80, 80, seed=seed + n).detach().abs() + 0.5 for n in range(2)]
    tables = [x.masked_fill(hidden, number) for x, number in zip(tables, huge, strict=True)]
    tables = [x.half() for x in tables] if half else tables
    given = {"dtype": dtype, "dropout_p": dropout_p, "seed": seed}
    assert_matches_dense(mf.causal(), Shape(1, 2, 1, 80, 80, 8, 8), score=score(*tables), **given)
    learned = [x.requires_grad_() for x in tables]
    assert all(x.isfinite().all() for x in results(mf.causal(), score(*learned), learned, length=80, **given))


def test_a_row_whose_values_are_all_minus_infinity_sees_nothing():
    rows = torch.zeros(LEN)
    rows[::3] = -torch.inf
    for score in (lambda score, b, h, q, kv: score + rows[q], lambda score, b, h, q, kv: torch.tanh(score) + rows[q]):
        out, lse, *gradients = results(MASKS["sinks"], score, [])
        assert (out[:, :, ::3] == 0).all()
        assert (lse[:, :, ::3] == -torch.inf).all()
        assert (gradients[0][:, :, ::3] == 0).all()
        assert not any(x.isnan().any() for x in (out, *gradients))


def test_merging_parts_that_saw_nothing():
    nothing, some = -torch.inf, 0.5
    out, lse = torch.tensor([[0.0], [0.0], [3.0]]), torch.tensor([nothing, nothing, some])
    softmax.merge_some(out, lse, torch.tensor([[0.0], [7.0], [0.0]]), torch.tensor([nothing, some, nothing]))
    assert out.tolist() == [[0], [7], [3]]
    assert lse.tolist() == [nothing, some, some]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_good_to_the_last_bits(dtype):
    x = torch.linspace(-60, 0, 4096, dtype=dtype)
    exact = x.double().exp()
    found = x.clone()
    softmax.exponentials(found)
    assert ((found - exact).abs() <= torch.finfo(dtype).eps).all()
    assert ((found / exact - 1).abs() <= torch.finfo(dtype).eps * (1 + x.abs())).all()
    probabilities = x.clone()
    softmax.probabilities(probabilities)
    torch.testing.assert_close(probabilities, x.exp(), rtol=torch.finfo(dtype).eps, atol=0)
    for function in (softmax.exponentials, softmax.probabilities):
        extremes = torch.tensor([-torch.inf, -1e30, -800, torch.nan], dtype=dtype)
        function(extremes)
        assert extremes.tolist()[:3] == [0, 0, 0]
        assert extremes[3].isnan()


def test_memory_is_linear_in_the_tokens():
    # Peak of what torch allocates, from its own records.
    q, k, v = Shape(1, 1, 1, 4096, 4096, 16, 16).tensors(torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = mf.attention(q, k, v, mf.causal(), score=mf.scores.softcap(5.0))
        torch.autograd.grad(out.sum(), (q, k, v))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4096 * 4096  # a quarter of one dense matrix of scores
