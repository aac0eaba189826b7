"""What a score function adds: each pair's number is what plain Python gets, and squares are made of their own pairs."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash import testing
from maskflash.errors import ArgumentError, ArgumentTypeError, MaskIndexError
from maskflash.visualize.effects import SAMPLES, Effect

SIZES = {"batch": 2, "heads": 4}


def effect(mask, score, q_len, kv_len, at=0.0, **call):
    return Effect.of("test", mask, score, at, q_len, kv_len, call)


def by_hand(mask, score, at, q_len, kv_len, b, h, q_offset=0):
    """(q_len, kv_len): the function itself, called with one pair after the other; NaN where the pair is hidden."""
    pairs = mask.dense(q_len, kv_len, **SIZES, q_offset=q_offset)[b, h]
    found = np.full((q_len, kv_len), np.nan)
    place = torch.tensor(b), torch.tensor(h)
    for q, kv in itertools.product(range(q_len), range(kv_len)):
        if pairs[q, kv]:
            value = float(score(torch.tensor(at), *place, torch.tensor(q + q_offset), torch.tensor(kv))) - at
            found[q, kv] = np.nan if value == -math.inf else value
    return found


@given(
    mask=testing.masks(max_len=16),
    score=testing.scores(max_len=16),
    at=st.sampled_from([0.0, 1.0, -2.5]),
    lengths=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    place=st.tuples(st.integers(0, 1), st.integers(0, 3)),
    offset=st.integers(0, 3),
    side=st.sampled_from([1, 2, 3, 7, 16]),
)
def test_numbers_are_what_plain_python_adds(mask, score, at, lengths, place, offset, side):
    with torch.no_grad():
        truth = by_hand(mask, score, at, *lengths, *place, offset)
    added = effect(mask, score, *lengths, at, **SIZES, q_offset=offset).added(*place, (side, side))
    starts = [range(0, length, side) for length in lengths]
    assert added.mean.shape == tuple(map(len, starts))
    for (i, top), (j, left) in itertools.product(*map(enumerate, starts)):
        own = truth[top : top + side, left : left + side]
        own = own[~np.isnan(own)]
        found = [numbers[i, j] for numbers in added]
        if not own.size:
            assert np.isnan(found).all()
        else:  # a few units of float32 apart: torch's functions of one number and of many round differently
            scale = np.abs(own).max() + abs(at) + 1
            assert np.allclose(found, [own.mean(), own.min(), own.max()], rtol=0, atol=16 * scale * 2**-23)


def test_of_large_squares_some_pairs_are_looked_at_from_the_first_to_the_last():
    added = effect(mf.full(), lambda score, b, h, q, kv: score + q * 1000.0 + kv, 300, 250).added(0, 0, (100, 100))
    assert added.least.tolist() == [[1e5 * i + 100 * j for j in range(3)] for i in range(3)]
    last = [99, 199, 249]
    assert added.largest.tolist() == [[1e5 * i + 99_000 + last[j] for j in range(3)] for i in range(3)]
    whole = [np.rint(np.linspace(0, side - 1, SAMPLES)).mean() for side in (100, 50)]
    assert added.mean[2, 2] == pytest.approx(1000 * (200 + whole[0]) + 200 + whole[1])


def test_the_shape_is_of_what_differs():
    slopes = torch.arange(6.0)
    assert effect(mf.causal(), mf.scores.alibi(slopes), 8, 8, batch=3, heads=6).shape == (1, 6)
    assert effect(mf.padding([3, 4, 5]), mf.scores.softcap(3.0), 8, 8, batch=3, heads=6).shape == (3, 1)
    assert effect(mf.causal(), mf.scores.softcap(3.0), 8, 8, batch=3, heads=6).shape == (1, 1)


def test_what_a_score_function_or_a_table_of_it_hides_is_hidden():
    table = torch.zeros(8)
    table[3] = -math.inf
    for score in (mf.scores.key_bias(table[None]), lambda score, b, h, q, kv: score if kv != 3 else -math.inf):
        found = effect(mf.full(), score, 8, 8)
        assert np.isnan(found.added(0, 0, (1, 1)).mean).nonzero()[1].tolist() == [3] * 8
        assert not found.sight.dense()[..., 3].any()


def test_what_is_hidden_at_one_score_alone_has_no_number_there():
    def low(score, b, h, q, kv):
        return score if score > 1 or kv != 3 else -math.inf

    for at, hidden in ((0.0, [3]), (2.0, [])):
        found = effect(mf.full(), low, 1, 8, at)
        added = found.added(0, 0, (1, 1))
        assert np.isnan(added.mean).nonzero()[1].tolist() == hidden
        assert found.added(0, 0, (8, 8)).least.tolist() == [[0.0]]


def test_arguments_of_the_mask_and_of_the_score_come_with_the_call():
    mask = mf.mask(lambda b, h, q, kv, *, n: kv < n)
    found = effect(mask, lambda score, b, h, q, kv, *, factor: score + factor * kv, 4, 4, n=3, factor=2.0)
    assert found.added(0, 0, (1, 1)).mean[0].tolist()[:3] == [0, 2, 4]
    with pytest.raises(ArgumentTypeError, match="factor"):
        effect(mask, lambda score, b, h, q, kv, *, factor: score + factor * kv, 4, 4, n=3)


@pytest.mark.parametrize("at", ["0", None, True, math.nan, math.inf])
def test_the_score_is_a_finite_number(at):
    with pytest.raises((ArgumentError, ArgumentTypeError), match="test: at is"):
        effect(mf.causal(), mf.scores.alibi(), 8, 8, at=at)


def test_a_visible_pair_that_looks_up_what_is_not_there_is_an_error():
    table = torch.zeros(4)
    with pytest.raises(MaskIndexError, match="table"):
        effect(mf.causal(), lambda score, b, h, q, kv: score + table[q - kv], 8, 8).added(0, 0, (1, 1))
    near = mf.sliding_window(3)
    assert effect(near, lambda score, b, h, q, kv: score + table[q - kv], 8, 8).added(0, 0, (1, 1)).mean[0, 0] == 0


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 7), (7, 0)])
def test_no_pairs_have_no_numbers(q_len, kv_len):
    added = effect(mf.causal(), mf.scores.alibi(), q_len, kv_len).added(0, 0, (4, 4))
    assert all(numbers.shape == (-(-q_len // 4), -(-kv_len // 4)) for numbers in added)
