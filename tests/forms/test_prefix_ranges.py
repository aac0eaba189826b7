"""Windows and bidirectional ranges: decoded pair by pair as vLLM's kernel does, found again, and refused exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

LENGTH = st.integers(0, 64)
WINDOW = st.none() | st.integers(1, 12)


def decoded(window, ranges, batch, q_len, kv_len):
    """(B, 1, q_len, kv_len) bool, by the conditions of vLLM's compute_kv_seq_mask."""
    seen = torch.zeros(batch, 1, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for row in range(q_len):
            q = kv_len - q_len + row
            for kv in range(kv_len):
                visible = kv <= q and (window is None or q - kv < window)
                for start, end in ranges[b] if ranges is not None else ():
                    if start < end and start <= q <= end and start <= kv <= end:
                        visible = True
                seen[b, 0, row, kv] = visible
    return seen


@st.composite
def ranges_of(draw):
    """A number of keys, of queries, and two sequences' ranges, which may lie within one another."""
    kv_len = draw(st.integers(1, 20))
    q_len, count = draw(st.integers(0, kv_len)), draw(st.integers(0, 4))
    place = st.integers(0, kv_len - 1)
    pairs = st.lists(st.tuples(place, place).map(sorted), min_size=count, max_size=count)
    return q_len, kv_len, torch.tensor(draw(st.tuples(pairs, pairs)), dtype=torch.int32).view(2, count, 2)


@settings(max_examples=120)
@given(ranges_of(), WINDOW)
def test_any_ranges_are_found_again(given_ranges, window):
    q_len, kv_len, ranges = given_ranges
    expected = decoded(window, ranges.tolist(), 2, q_len, kv_len)
    sizes = {"batch": 2, "q_offset": kv_len - q_len}
    mask = mf.from_prefix_ranges(ranges, window)
    assert torch.equal(mask.dense(q_len, kv_len, **sizes), expected)
    form = mask.to_prefix_ranges(q_len, kv_len, **sizes)
    held = None if form.mm_prefix_range is None else form.mm_prefix_range.tolist()
    assert torch.equal(decoded(form.sliding_window, held, 2, q_len, kv_len), expected)


@settings(max_examples=100)
@given(masks(heads=1), LENGTH, LENGTH)
def test_what_has_no_such_form_is_refused(mask, q_len, kv_len):
    dense = mask.dense(q_len, kv_len, batch=2)
    try:
        form = mask.to_prefix_ranges(q_len, kv_len, batch=2)
    except mf.UnsupportedMask as error:
        assert "to_prefix_ranges: row" in str(error)
        return
    held = None if form.mm_prefix_range is None else form.mm_prefix_range.tolist()
    assert torch.equal(decoded(form.sliding_window, held, 2, q_len, kv_len), dense)


def test_the_plainest_form_is_found():
    causal = mf.causal().to_prefix_ranges(64, 64)
    assert (causal.sliding_window, causal.mm_prefix_range) == (None, None)
    assert mf.sliding_window(9).to_prefix_ranges(64, 64).sliding_window == 10
    assert mf.sliding_window(64).to_prefix_ranges(64, 64).sliding_window is None
    assert mf.full().to_prefix_ranges(64, 64).mm_prefix_range.tolist() == [[[0, 63]]]
    prefix = mf.prefix_lm(10).to_prefix_ranges(64, 64)
    assert (prefix.sliding_window, prefix.mm_prefix_range.tolist()) == (None, [[[0, 9]]])


def test_a_chunk_has_the_positions_of_its_keys():
    """A chunk of queries whose image began before them."""
    mask = mf.from_prefix_ranges(torch.tensor([[20, 50]]), 8)
    form = mask.to_prefix_ranges(30, 60, q_offset=30)
    assert (form.sliding_window, form.mm_prefix_range.tolist()) == (8, [[[20, 50]]])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (mf.causal() & mf.global_tokens(1), "row 1 of batch row 0 sees 0 to 0"),
        (mf.causal() & mf.document([4, 4]), "row 0 of batch row 0 sees 0 to 0"),
        (mf.dilated_window(4, 2) & mf.causal(), "row 2 of batch row 0 sees 2 intervals"),
        (mf.causal() & (lambda b, h, q, kv: q != 5), "row 5 of batch row 0 sees 0 intervals"),
    ],
)
def test_the_first_row_is_named(mask, said):
    with pytest.raises(mf.UnsupportedMask, match=said):
        mask.to_prefix_ranges(8, 8)


@pytest.mark.parametrize(
    ("ranges", "window", "said"),
    [
        (torch.zeros(2, 3), None, "float32"),
        (torch.zeros(2, 3, dtype=torch.int32), None, r"has shape \(2, 3\), expected \(B, n, 2\)"),
        (torch.tensor([[-1, 3]]), None, "holds -1"),
        (torch.tensor([[0, 2**40]]), None, "holds 1099511627776, expected positions below"),
        (None, 0, "sliding_window is 0, expected at least 1"),
    ],
)
def test_ranges_that_are_none_are_refused(ranges, window, said):
    with pytest.raises(mf.MaskflashError, match=said):
        mf.from_prefix_ranges(ranges, window)
