"""Masks that are what each query sees: the same pairs as what they were made of, and nothing malformed."""

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, masks

LENGTH = st.integers(0, 64)
ENDS = torch.tensor([[[1, 2, 1, 0], [1, 2, 2, 2], [1, 2, 4, 4]]])


@settings(max_examples=50)
@given(masks(), LENGTH, LENGTH, LENGTH)
def test_a_mask_comes_back(mask, q_len, kv_len, last):
    sizes = {"batch": 2, "heads": 2}
    found = mask.to_row_intervals(q_len, kv_len, **sizes, q_offset=max(last - q_len, 0))
    dense = mask.dense(q_len, kv_len, **sizes, q_offset=max(last - q_len, 0))
    whole, by_ends = mf.from_row_intervals(found), mf.from_row_intervals(found.to_cudnn(), kv_len, batch=2)
    for back in (whole, by_ends):
        assert torch.equal(back.dense(q_len, kv_len, **sizes), dense)
    assert mf.equivalent(whole, by_ends, q_len, kv_len, **sizes)
    if last <= q_len:
        assert mf.equivalent(mask, whole, q_len, kv_len, **sizes)


def test_it_is_a_mask_as_any_other():
    mask = mf.from_row_intervals(ENDS, 4)
    assert_matches_dense(mask, Shape(q_len=4, kv_len=4))
    joined = mask & ~mf.causal()
    assert joined.dense(4, 4)[0, 0].int().tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 1], [0] * 4]
    assert mf.equivalent(pickle.loads(pickle.dumps(mask)), mask, 4, 4)
    assert mask.row(2, 4, q_len=4) == [(0, 1), (2, 4)]
    assert bool(mask(0, 0, 2, 3)) and not mask(0, 0, 2, 1)
    called = mf.mask(lambda b, h, q, kv: mask(b, h, q, kv) and kv < 3)
    assert called.row(2, 4) == [(0, 1), (2, 3)]
    assert repr(mask) == "from_row_intervals(5 intervals)"


def test_touching_intervals_are_one_and_empty_ones_none():
    ends = torch.tensor([[[2], [2], [3], [5], [5]]])
    mask = mf.from_row_intervals(ends, 6)
    assert mask.intervals.row(0) == [(0, 3)]


def test_long_ones_cost_what_their_boundary_does():
    tokens = 1 << 13
    found = (mf.causal() & (mf.global_tokens(8) | mf.sliding_window(100))).to_row_intervals(tokens, tokens)
    mask = mf.from_row_intervals(found.to_cudnn(), tokens)
    decided = mf.compile(mask).explain(tokens, tokens).to_dict()["decided"]
    assert decided["elements"] == 0
    assert mf.equivalent(mask, mf.from_row_intervals(found), tokens, tokens)


def test_heads_and_batch_rows_of_their_own():
    ends = torch.arange(1, 9).view(2, 1, 4)  # two heads, two batch rows of two queries
    dense = mf.from_row_intervals(ends, 9, batch=2).dense(2, 9, batch=2, heads=2)
    assert dense.sum(-1).tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]


@pytest.mark.parametrize(
    ("ends", "sizes", "error", "match"),
    [
        (ENDS.float(), {"kv_len": 4}, mf.ArgumentTypeError, "intervals has dtype torch.float32"),
        (ENDS, {}, mf.ArgumentTypeError, "kv_len is missing"),
        (ENDS, {"kv_len": -1}, mf.ArgumentError, "kv_len is -1"),
        (ENDS[0], {"kv_len": 4}, mf.ArgumentError, "expected a 3-d tensor"),
        (ENDS[:, :2], {"kv_len": 4}, mf.ArgumentError, "an odd number of endpoints"),
        (ENDS[:, :0], {"kv_len": 4}, mf.ArgumentError, "an odd number of endpoints"),
        (ENDS[:0], {"kv_len": 4}, mf.ArgumentError, "with a head at least"),
        (ENDS, {"kv_len": 4, "batch": 3}, mf.ArgumentError, "4 columns, expected a multiple of the 3 batch rows"),
        (ENDS, {"kv_len": 3}, mf.ArgumentError, r"head 0 in column 2 are \[1, 2, 4\], expected .* from 0 to 3"),
        (ENDS.flip(1), {"kv_len": 4}, mf.ArgumentError, r"head 0 in column 2 are \[4, 2, 1\]"),
        (ENDS - 1, {"kv_len": 4}, mf.ArgumentError, r"head 0 in column 3 are \[-1, 1, 3\]"),
        (ENDS.to("meta"), {"kv_len": 4}, mf.ArgumentError, "has no data"),
        (mf.causal().to_row_intervals(4, 4), {"kv_len": 5}, mf.ArgumentError, "kv_len is 5, expected 4"),
        (mf.causal().to_row_intervals(4, 4), {"batch": 2}, mf.ArgumentError, "batch is 2, expected 1"),
        (mf.causal(), {"kv_len": 4}, mf.ArgumentTypeError, "intervals is causal"),
    ],
)
def test_malformed_endpoints_are_refused(ends, sizes, error, match):
    with pytest.raises(error, match=match):
        mf.from_row_intervals(ends, **sizes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": torch.tensor([0, 1, 2])},
        {"offsets": torch.tensor([0, 2, 1, 3])},
        {"offsets": torch.tensor([1, 2, 3, 3])},
        {"start": torch.tensor([0, 0, -1])},
        {"stop": torch.tensor([1, 2, 4])},
        {"stop": torch.tensor([1, 0, 3])},
        {"stop": torch.tensor([1, 2])},
        {"offsets": torch.tensor([0, 1, 3, 3]), "start": torch.tensor([0, 0, 2])},  # touches
    ],
)
def test_malformed_intervals_are_refused(wrong):
    found = mf.causal().to_row_intervals(3, 3)
    with pytest.raises(mf.ArgumentError, match="3 intervals are not apart and ascending in each of 3 rows"):
        mf.from_row_intervals(replace(found, **wrong))


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"q_len": 5}, "q_len is 5, expected 2 as in from_row_intervals"),
        ({"kv_len": 5}, "kv_len is 5, expected 9"),
        ({"batch": 3}, "batch is 3, expected 2"),
        ({"heads": 4}, "heads is 4, expected 2 .*; 1 there serves all"),
        ({"q_offset": 1}, "q_offset is 1, expected 0"),
    ],
)
def test_other_sizes_are_refused(sizes, match):
    mask = mf.from_row_intervals(torch.arange(1, 9).view(2, 1, 4), 9, batch=2)
    with pytest.raises(mf.ArgumentError, match=match):
        mask.dense(**{"q_len": 2, "kv_len": 9, "batch": 2, "heads": 2, **sizes})
