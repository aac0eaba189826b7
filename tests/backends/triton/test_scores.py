"""Score functions and dropout in the kernels: results and gradients equal dense float64, and come out the same again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, dropout_keep, masks, shapes
from tests.backends.triton.conftest import expressions

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPE = Shape(1, 2, 1, 24, 40, 16, 16)


def random(*sizes, device, seed=3):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


def scores(device, batch=1, heads=2, room=100):
    """Score functions of every kind, for calls of these sizes."""
    slopes, table, pairs = (random(*sizes, device=device) for sizes in ((heads,), (8, heads), (batch, heads, room, room)))
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
        "a factor of pairs": lambda s, b, h, q, kv: s * torch.tanh(columns[b, kv] + tokens[q]) + rows[h, q],
        "functions": lambda s, b, h, q, kv: torch.log1p(torch.exp(s)) + torch.erf(s) * torch.atan(s - power),
        "powers": lambda s, b, h, q, kv: torch.abs(s) ** power + s**2 * 0.25 - torch.expm1(-abs(s)),
        "waves": lambda s, b, h, q, kv: s + torch.sin(tokens[q] * 3) * torch.cos((q - kv) / 8) - torch.rsqrt(1 + s * s),
        "integers": lambda s, b, h, q, kv: s + tokens[(steps[q] - steps[kv]) % 4] / (1 + abs(q - kv) // 5),
        "no score": lambda s, b, h, q, kv: columns[b, kv],
        "a constant": lambda s, b, h, q, kv: s * 0.0 + 1.0,
    }


NAMES = sorted(scores("cpu"))


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_scores_match_dense_float64(device, name):
    given = {"score": scores(device)[name], "block_size": 16, "backend": "triton", "device": device}
    assert_matches_dense(mf.sliding_window(24, 9), SHAPE, q_offset=9, **given)


@settings(max_examples=8)
@given(masks(max_len=48), shapes(max_len=40, max_heads=2), st.sampled_from(NAMES), st.data())
def test_every_mask_and_shape_matches_dense_float64(device, mask, shape, name, data):
    chosen = scores(device, shape.batch, shape.heads)[name]
    given = {"dtype": data.draw(st.sampled_from([torch.float32, torch.float16]))}
    given["dropout_p"] = data.draw(st.sampled_from([0.0, 0.3]))
    with expressions():
        assert_matches_dense(mask, shape, score=chosen, block_size=16, backend="triton", device=device, **given)
