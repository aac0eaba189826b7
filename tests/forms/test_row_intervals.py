"""What rows see as intervals of keys, and as cuDNN's endpoints: decoded here by their own definition, pair by pair."""

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


def of_cudnn(ends, batch, heads, q_len, kv_len):
    """(batch, heads, q_len, kv_len) bool of cuDNN's endpoints, by what create_mask_plan says and its kernels check."""
    assert ends.dtype == torch.int32 and ends.is_contiguous()
    hmask, n, total = ends.shape
    assert hmask in (1, heads) and n % 2 == 1 and total == batch * q_len
    pairs = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for q in range(q_len):
                ends_of_row = ends[h if hmask > 1 else 0, :, b * q_len + q].tolist()
                previous = 0
                for i in range(0, n, 2):
                    begin, end = ends_of_row[i - 1] if i else 0, ends_of_row[i]
                    assert 0 <= previous <= begin <= end <= kv_len
                    pairs[b, h, q, begin:end] = True
                    previous = end
    return pairs


@settings(max_examples=60)
@given(masks(), LENGTH, LENGTH, LENGTH)
def test_cudnn_reads_the_mask(mask, q_len, kv_len, last):
    sizes = {"batch": 2, "heads": 2, "q_offset": max(last - q_len, 0)}
    ends = mask.to_row_intervals(q_len, kv_len, **sizes).to_cudnn()
    assert torch.equal(of_cudnn(ends, 2, 2, q_len, kv_len), mask.dense(q_len, kv_len, **sizes))


def test_cudnn_gets_no_more_endpoints_than_it_needs():
    ends = [mf.full(), mf.causal(), mf.sliding_window(2), ~mf.sliding_window(1, 1)]
    assert [mask.to_row_intervals(8, 8).to_cudnn().shape[1] for mask in ends] == [1, 1, 3, 3]


def test_cudnn_gets_an_offset_for_each_batch_row_and_a_head_for_each_query_head():
    offsets = torch.tensor([0, 3])
    mask = mf.mask(lambda b, h, q, kv: kv <= q - h)
    found = mask.to_row_intervals(3, 5, batch=2, heads=2, q_offset=offsets).to_cudnn()
    assert found.tolist() == [[[1, 2, 3, 4, 5, 5]], [[0, 1, 2, 3, 4, 5]]]


def test_too_many_endpoints_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr("maskflash.forms.row_intervals._MOST_ENDPOINTS", 50)
    found = mf.mask(lambda b, h, q, kv: (kv % 2 == 0) & (kv <= q + h)).to_row_intervals(8, 8, heads=2)
    with pytest.raises(mf.UnsupportedMask, match=r"to_cudnn: row 6 of head 0 sees 4 intervals of keys"):
        found.to_cudnn()
