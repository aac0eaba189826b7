"""What rows see as intervals of keys: decoded here by their own definition, and compared with every pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

LENGTH = st.integers(0, 64)


def decoded(found):
    """(B, H, q_len, kv_len) bool of intervals; also that they are apart and ascending."""
    pairs = torch.zeros(*found.shape, found.q_len, found.kv_len, dtype=torch.bool)
    for row, bits in enumerate(pairs.flatten(0, 2)):
        last = -1
        for place in range(int(found.offsets[row]), int(found.offsets[row + 1])):
            start, stop = int(found.start[place]), int(found.stop[place])
            assert last < start < stop, "apart, ascending, none empty"
            bits[start:stop] = True
            last = stop
    assert len(found.offsets) == found.shape[0] * found.shape[1] * found.q_len + 1
    return pairs


@settings(max_examples=200)
@given(masks(), LENGTH, LENGTH, LENGTH)
def test_they_are_the_mask(mask, q_len, kv_len, last):
    sizes = {"batch": 2, "heads": 2, "q_offset": max(last - q_len, 0)}  # the masks' tables end at 64
    found = mask.to_row_intervals(q_len, kv_len, **sizes)
    dense = mask.dense(q_len, kv_len, **sizes)
    assert torch.equal(decoded(found).expand(dense.shape), dense)


def test_a_row_is_the_masks_own():
    mask = mf.causal() & (mf.global_tokens(4) | mf.sliding_window(100))
    found = mask.to_row_intervals(4096, 4096)
    assert found.row(1000) == mask.row(1000, 4096) == [(0, 4), (900, 1001)]
    assert repr(found) == "RowIntervals(4096 x 4096 tokens, shape (1, 1), 8087 intervals, at most 2 in a row)"
    with pytest.raises(mf.ArgumentError, match=r"RowIntervals.row: q is 4096"):
        found.row(4096)


def test_many_intervals_of_a_row_are_all_there():
    found = mf.mask(lambda b, h, q, kv: (q + kv) % 2 == 0).to_row_intervals(9, 33)
    assert found.count.tolist() == [17, 16, 17, 16, 17, 16, 17, 16, 17]
