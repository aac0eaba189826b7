"""Score functions and dropout in the kernels: results and gradients equal dense float64, the same bits each time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import tile_choice
from maskflash.testing import Shape, assert_matches_dense, dropout_keep, masks, shapes
from tests.backends.triton.conftest import expressions
from tests.conftest import EMULATED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPE = Shape(1, 2, 1, 24, 40, 16, 16)


def random(*sizes, device, seed=3):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


def scores(device, batch=1, heads=2, room=100):
    """Score functions of every kind, for calls of these sizes."""
    slopes, table, pairs = (
        random(*sizes, device=device) for sizes in ((heads,), (8, heads), (batch, heads, room, room))
    )
    rows, columns, tokens = (random(*sizes, device=device) for sizes in ((heads, room), (batch, room), (room,)))
    cap, power = random(device=device), torch.tensor(1.5, device=device)
    ahead, steps = torch.arange(room, device=device) < 30, torch.arange(room, device=device) // 7
    return {
        "alibi": mf.scores.alibi(slopes),
        "the paper's alibi": mf.scores.alibi(),
        "soft-cap": mf.scores.softcap(1.5),
        "relative bias": mf.scores.relative_bias(table, max_distance=20),
        "relative table": mf.scores.relative_table(random(heads, 39, device=device)),
        "pairs": mf.scores.bias(pairs),
        "keys": mf.scores.key_bias(columns),
        "temperature": mf.scores.temperature(rows),
        "one tensor twice": lambda s, b, h, q, kv: s + tokens[q] * 2.0 - tokens[kv],
        "a number that learns": lambda s, b, h, q, kv: s * torch.sigmoid(cap + s),
        "hidden by value": lambda s, b, h, q, kv: torch.where(ahead[q] | (kv % 3 == 0), s, -math.inf) + slopes[h],
        "hidden by the score": lambda s, b, h, q, kv: torch.where((s > 1.5) | (kv % 16 == 9) & (q > 15), s, -math.inf),
        "a factor of pairs": lambda s, b, h, q, kv: s * torch.tanh(columns[b, kv] + tokens[q]) + rows[h, q],
        "functions": lambda s, b, h, q, kv: torch.log1p(torch.exp(s)) + torch.erf(s) * torch.atan(s - power),
        "powers": lambda s, b, h, q, kv: torch.abs(s) ** power + s**2 * 0.25 - torch.expm1(-abs(s)),
        "waves": lambda s, b, h, q, kv: s + torch.sin(tokens[q] * 3) * torch.cos((q - kv) / 8) - torch.rsqrt(1 + s * s),
        "integers": lambda s, b, h, q, kv: s + tokens[(steps[q] - steps[kv]) % 4] / (1 + abs(q - kv) // 5),
        "no score": lambda s, b, h, q, kv: columns[b, kv],
        "a constant": lambda s, b, h, q, kv: s * 0.0 + 1.0,
    }


NAMES = sorted(scores("cpu"))
BRANCHING = {"functions", "waves"}  # erf, sin and cos are a library's, whose branches the emulator doesn't follow
RUNS = sorted(set(NAMES) - BRANCHING) if EMULATED else NAMES


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_scores_match_dense_float64(device, name):
    given = {"score": scores(device)[name], "block_size": 16, "backend": "triton", "device": device}
    assert_matches_dense(mf.sliding_window(24, 9), SHAPE, q_offset=9, **given)


@settings(max_examples=8)
@given(masks(max_len=48), shapes(max_len=40, max_heads=2), st.sampled_from(RUNS), st.data())
def test_every_mask_and_shape_matches_dense_float64(device, mask, shape, name, data):
    chosen = scores(device, shape.batch, shape.heads)[name]
    given = {"dtype": data.draw(st.sampled_from([torch.float32, torch.float16]))}
    given["dropout_p"] = data.draw(st.sampled_from([0.0, 0.3]))
    with expressions():
        assert_matches_dense(mask, shape, score=chosen, block_size=16, backend="triton", device=device, **given)


DROPPED = {
    "a group of heads": (mf.causal(), Shape(2, 4, 2, 20, 24), {}),
    "offsets": (mf.sliding_window(24, 9), Shape(1, 2, 1, 24, 40, 24, 8), {"q_offset": 12, "kv_offset": -3}),
    "offsets of rows": (mf.full(), Shape(2, 1, 1, 20, 20), {"q_offset": [3, 70], "kv_offset": [9, 0]}),
}


@pytest.mark.parametrize("case", DROPPED)
def test_dropout_matches_dense_float64(device, case):
    mask, shape, offsets = DROPPED[case]
    offsets = {name: torch.tensor(x, device=device) if isinstance(x, list) else x for name, x in offsets.items()}
    assert_matches_dense(mask, shape, dropout_p=0.4, block_size=16, backend="triton", device=device, **offsets)


def test_the_pairs_that_are_kept_are_those_of_the_definition(device):
    """Values are unit vectors, so that out shows the weights one by one."""
    q, k = (torch.randn(2, 4, 20, 16, device=device) for _ in range(2))
    v = torch.eye(20, 32, device=device).expand(2, 4, 20, 32)
    given = {"seed": -(2**40) + 5, "q_offset": 2**33, "kv_offset": -7}
    out = mf.attention(q, k, v, mf.full(), dropout_p=0.3, block_size=16, backend="triton", **given)
    expected = dropout_keep(given.pop("seed"), 0.3, 2, 4, 20, 20, **given)
    assert torch.equal(out[..., :20].cpu() != 0, expected)


@pytest.mark.parametrize("name", ["relative bias", "one tensor twice", "pairs"])
def test_offsets_of_batch_rows_and_columns_before_the_first(device, name):
    offsets = {"q_offset": torch.tensor([30, 7], device=device), "kv_offset": torch.tensor([-5, 3], device=device)}
    given = {"score": scores(device, batch=2)[name], "block_size": 16, "backend": "triton", "device": device, **offsets}
    assert_matches_dense(mf.sliding_window(40, 9), Shape(2, 2, 1, 20, 20), **given)


@pytest.mark.parametrize("score", ["hidden by value", "soft-cap", None])
def test_sinks_beside_a_score_and_dropout(device, score):
    given = {"score": score and scores(device)[score], "block_size": 16, "backend": "triton", "device": device}
    sinks = torch.tensor([0.5, -1.0], device=device)
    assert_matches_dense(mf.causal(), SHAPE, sinks=sinks, dropout_p=0.2, **given)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty_lengths(device, lengths):
    shape, bias = Shape(1, 2, 1, *lengths), scores(device)["relative bias"]
    assert_matches_dense(mf.full(), shape, score=bias, dropout_p=0.5, backend="triton", device=device)


def run(mask, q, k, v, tables, **given):
    """out, lse and all gradients."""
    out, lse = mf.attention(q, k, v, mask, block_size=16, backend="triton", return_lse=True, **given)
    draw = torch.Generator().manual_seed(5)
    arriving = torch.randn(out.shape, generator=draw).to(out), torch.randn(lse.shape, generator=draw).to(lse)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v, *tables), arriving)


def test_same_inputs_same_bits_whatever_the_order_of_programs(device, monkeypatch):
    q, k, v = Shape(1, 4, 2, 20, 20).tensors(torch.float16, device=device)
    table, tokens = random(9, 4, device=device), random(40, device=device)

    def biased(score, b, h, q, kv):
        return score + table[abs(q - kv) % 9, h] + tokens[q] * tokens[kv]

    found = []
    for share in (1, 3):
        monkeypatch.setattr(gpu, "heads_in_cache", lambda device, size, group, heads, share=share: min(heads, share))
        found.append(run(mf.causal(), q, k, v, (table, tokens), score=biased, dropout_p=0.1, seed=3))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_hidden_pairs_read_and_compute_reaches_nothing(device, poison):
    """A table holds it where hidden pairs look alone, and so do hidden tokens; the score divides by 0 there."""
    q, k, v = Shape(1, 2, 1, 24, 24).tensors(torch.float32, device=device)
    table, hidden = random(24, 24, device=device), torch.arange(24, device=device) >= 20
    mask = mf.sliding_window(9, 0) & mf.mask(lambda b, h, q, kv: kv < 20)
    shown = mask.dense(24, 24, device=device)[0, 0]

    def results(fill):
        filled = table.detach().masked_fill(~shown, fill).requires_grad_()
        inputs = [q, *(x.detach().masked_fill(hidden[:, None], fill).requires_grad_() for x in (k, v))]

        def score(s, b, h, q, kv):
            return s * 2 / (1 + (q >= kv) - (kv > q)) + filled[q, kv] * torch.rsqrt(q - kv + 1.0)

        return run(mask, *inputs, (filled,), score=score)

    clean, dirty = results(0.0), results(poison)
    assert same(clean, dirty)
    assert all(x.isfinite().all() for x in dirty[2:])


def test_a_slope_without_end_where_the_weight_is_0(device):
    """exp(s) overflows, and what it is taken from is -inf: as torch's own, the gradient must not be NaN."""
    q, k, v = Shape(1, 1, 1, 20, 20).tensors(torch.float32, device=device)
    _, _, *gradients = run(mf.causal(), q, k, v, (), score=lambda s, b, h, q, kv: s - torch.exp((q - kv) * 40.0 + s))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("far", [-1e9, -1e30])
def test_rows_whose_first_values_are_far_below_the_others(device, far):
    """Whole tiles of such values come first, and some rows have no others."""
    near = torch.arange(40, device=device) // 16 == 1

    def padded(score, b, h, q, kv):
        return score + torch.where(near[kv] & (q % 5 != 0), 0.0, far)

    assert_matches_dense(mf.full(), SHAPE, score=padded, block_size=16, backend="triton", device=device)


def test_a_sum_that_is_no_number_is_told_by_the_whole_table(device):
    q, k, v = Shape(1, 2, 2, 20, 20).tensors(torch.float32, device=device)
    table, other = random(2, device=device), random(2, device=device)
    v = v.detach().index_fill(2, torch.tensor([3], device=device), math.inf).requires_grad_()
    found = run(mf.causal(), q, k, v, (table,), score=lambda s, b, h, q, kv: s + table[h] + other[h])
    assert found[-1].isnan().all()


# Refusals


def test_an_inexact_number_that_decides_an_index_is_refused(device):
    table = random(40, device=device)
    q, k, v = Shape(1, 1, 1, 20, 20).tensors(torch.float32, device=device)

    def logarithmic(score, b, h, q, kv):
        return score + table[torch.log2(abs(q - kv) + 1.0).long()]

    with pytest.raises(mf.BackendError, match=r"`log2` .* in logarithmic \(.*test_scores.py:\d+\); .* into a table"):
        mf.attention(q, k, v, mf.causal(), score=logarithmic, backend="triton")


def test_an_inexact_number_of_the_score_may_decide(device):
    assert_matches_dense(
        mf.causal(),
        Shape(1, 1, 1, 20, 20),
        score=lambda s, b, h, q, kv: torch.where(torch.exp(s) > 1.5, s, s * 0.5) + abs(torch.tanh(s)),
        backend="triton",
        device=device,
    )


# Nothing is rendered or compiled again


def test_another_number_renders_and_compiles_nothing(device, compiled):
    rendered, loaded, keys = compiled

    @mf.score
    def capped(score, b, h, q, kv, *, cap, table):
        return cap * torch.tanh(score / cap) + table[h, abs(q - kv) % 40]

    for seed, p, cap in ((3, 0.1, 5.0), (4, 0.5, 0.25), (-1, 0.9, 1e9)):
        for length in (20, 33):
            table = random(2, 20 + length, device=device, seed=seed)
            given = {"cap": cap, "table": table, "dropout_p": p, "seed": seed, "q_offset": seed + 1}
            q, k, v = Shape(1, 2, 1, 20, length).tensors(torch.float16, device=device)
            run(mf.causal(), q, k, v, (table,), score=capped, **given)
            assert len(rendered) == len(loaded) == 5  # forward, delta, dk and dv, dq, tables
            assert len(keys) == 6  # those of tables measure, then sum


def test_scores_have_tiles_of_their_own(device):
    q, k, v = Shape(1, 2, 1, 20, 20).tensors(torch.float32, device=device)
    cases, slopes = [], [mf.scores.alibi(random(2, device=device, seed=seed)) for seed in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        find = tile_choice.find
        patch.setattr(tile_choice, "find", lambda case: cases.append(case) or find(case))
        for given in ({}, {"score": slopes[0]}, {"score": slopes[1]}, {"dropout_p": 0.5}):
            mf.attention(q.detach(), k.detach(), v.detach(), mf.causal(), backend="triton", seed=1, **given)
    plain, biased, again, dropped = cases
    assert len({plain, biased, dropped}) == 3
    assert biased == again
    assert plain.key == biased.key[:-1]  # what was measured without a score stays found
