"""Presets that drop tokens: each equals a causal mask with rectangles painted out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash import presets

LENGTH = st.integers(0, 30)


def triangle(q_len, kv_len):
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4), LENGTH, LENGTH, st.randoms())
def test_dropped_segments_do_not_see_themselves(gaps, q_len, kv_len, random):
    segments, start, expected = [], 0, triangle(q_len, kv_len)
    for gap, length in gaps:
        start += gap
        segments.append((start, length))
        expected[start : start + length, start : start + length] = False
        start += length
    random.shuffle(segments)
    assert torch.equal(presets.qk_sparse(segments).dense(q_len, kv_len)[0, 0], expected)


@given(LENGTH, LENGTH, LENGTH, st.sampled_from([torch.int32, torch.int64]), st.data())
def test_evicted_keys_are_forgotten(tokens, q_len, kv_len, dtype, data):
    batch, heads = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    rows = torch.randint(0, 40, (batch, heads, tokens), dtype=dtype)
    expected = torch.zeros(2, 3, q_len, kv_len, dtype=torch.bool)
    for b in range(2):
        for h in range(3):
            expected[b, h, :, :tokens] = triangle(q_len, kv_len)[:, :tokens]
            for column, row in enumerate(rows[b % batch, h % heads].tolist()[:kv_len]):
                expected[b, h, row:, column] = False
    assert torch.equal(presets.random_eviction(rows).dense(q_len, kv_len, batch=2, heads=3), expected)
    if heads == 1:
        assert torch.equal(presets.random_eviction(rows[:, 0]).dense(q_len, kv_len, batch=2, heads=3), expected)
    if batch == heads == 1:
        assert torch.equal(presets.random_eviction(rows[0, 0]).dense(q_len, kv_len, batch=2, heads=3), expected)


def test_evictions_are_kept_by_reference():
    rows = torch.tensor([4, 4, 4, 4])
    mask = presets.random_eviction(rows)
    rows[0] = 1
    assert mask.dense(4, 4)[0, 0, :, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("mask", [presets.qk_sparse([(3, 4), (9, 2)]), presets.random_eviction([9] * 12)], ids=str)
@pytest.mark.parametrize("offset", [-20, -5, 3, 20])
def test_rows_may_be_shifted(mask, offset):
    whole = torch.zeros(60, 20, dtype=torch.bool)  # row 20 is row 0 of the mask
    whole[20:] = mask.dense(40, 20)[0, 0]
    assert torch.equal(mask.dense(20, 20, q_offset=offset)[0, 0], whole[20 + offset : 40 + offset])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: presets.qk_sparse([1, 2]),
            mf.ArgumentError,
            r"qk_sparse: segments has shape \(2,\), expected a \(start,",
        ),
        (lambda: presets.qk_sparse([(1, 2, 3)]), mf.ArgumentError, r"segments has shape \(1, 3\), expected a \(start"),
        (
            lambda: presets.qk_sparse([(0, -2)]),
            mf.ArgumentError,
            r"segments holds \(0, -2\), expected starts and lengths",
        ),
        (lambda: presets.qk_sparse([(-1, 2)]), mf.ArgumentError, r"segments holds \(-1, 2\), expected starts"),
        (
            lambda: presets.qk_sparse([(4, 2), (1, 4)]),
            mf.ArgumentError,
            "segments overlap at token 4, expected disjoint",
        ),
        (lambda: presets.qk_sparse("ab"), mf.ArgumentTypeError, "qk_sparse: segments is 'ab', expected integers"),
        (
            lambda: presets.random_eviction(torch.zeros(3)),
            mf.ArgumentTypeError,
            "random_eviction: evicted_at has dtype torch.float32, expected an integer dtype",
        ),
        (
            lambda: presets.random_eviction(torch.zeros(1, 1, 1, 3).int()),
            mf.ArgumentError,
            r"evicted_at has shape \(1, 1, 1, 3\), expected a 1-d or 2-d or 3-d tensor",
        ),
    ],
)
def test_wrong_arguments_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
