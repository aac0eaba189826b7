"""Rows and columns as runs: those of the dense mask, whatever the parts they are looked at in."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.masks import lines
from maskflash.testing import columns, masks

LENGTH = st.integers(1, 40)


def runs_of(line):
    """(start, stop) of the runs of True, one token at a time."""
    found, place = [], 0
    for visible, run in itertools.groupby(line.tolist()):
        stop = place + len(list(run))
        found += [(place, stop)] * visible
        place = stop
    return found


@given(masks(), LENGTH, LENGTH, st.integers(0, 10**6), st.integers(1, 50))
def test_lines_are_those_of_the_dense_mask(mask, q_len, kv_len, seed, at_once):
    dense = mask.dense(q_len, kv_len, batch=2, heads=3)
    b, h, q, kv = seed % 2, seed % 3, seed % q_len, seed % kv_len
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_PAIRS_AT_ONCE", at_once)
        assert mask.row(q, kv_len, b=b, h=h) == runs_of(dense[b, h, q])
        assert mask.column(kv, q_len, b=b, h=h) == runs_of(dense[b, h, :, kv])


@given(st.data(), LENGTH, LENGTH)
def test_lines_of_column_intervals(data, q_len, kv_len):
    mask = data.draw(columns(q_len, kv_len, batch=2, heads=4))
    dense = mask.dense(q_len, kv_len, batch=2, heads=4)
    sizes = {"batch": 2, "heads": 4}
    assert mask.row(q_len // 2, kv_len, b=1, h=3, q_len=q_len, **sizes) == runs_of(dense[1, 3, q_len // 2])
    assert mask.column(kv_len // 2, q_len, b=1, h=2, kv_len=kv_len, **sizes) == runs_of(dense[1, 2, :, kv_len // 2])


@pytest.mark.parametrize("offset", [0, 7, -3, torch.tensor([5, -2])])
def test_an_offset_counts(offset):
    mask = mf.mask(lambda b, h, q, kv: q - 3 <= kv <= q + b)
    dense = mask.dense(9, 12, batch=2, q_offset=offset)
    for b, q in itertools.product(range(2), range(9)):
        assert mask.row(q, 12, b=b, q_offset=offset) == runs_of(dense[b, 0, q])
    for b, kv in itertools.product(range(2), range(12)):
        assert mask.column(kv, 9, b=b, q_offset=offset) == runs_of(dense[b, 0, :, kv])


def test_one_line_of_very_many_tokens():
    n = 10_000_019
    assert (mf.causal() & mf.sliding_window(5)).row(n - 1, n) == [(n - 6, n)]
    assert mf.causal().column(3, n) == [(3, n)]


def test_lines_without_tokens():
    assert mf.full().row(0, 0) == []
    assert mf.full().column(5, 0) == []
    assert mf.full().row(0, 1) == [(0, 1)]


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda m: m.row(-1, 4), mf.ArgumentError, "Mask.row: q is -1, expected at least 0"),
        (lambda m: m.row(1.0, 4), mf.ArgumentTypeError, "Mask.row: q is 1.0, expected an int"),
        (lambda m: m.row(4, 4, q_len=4), mf.ArgumentError, "Mask.row: q is 4, expected less than q_len, 4"),
        (lambda m: m.row(0, -4), mf.ArgumentError, "Mask.row: kv_len is -4"),
        (lambda m: m.column(4, 4, kv_len=3), mf.ArgumentError, "Mask.column: kv is 4, expected less than kv_len, 3"),
        (lambda m: m.column(0, 4, b=2, batch=2), mf.ArgumentError, "b is 2, expected less than batch, 2"),
        (lambda m: m.row(0, 4, doc=3), mf.ArgumentTypeError, "Mask.row: unexpected argument 'doc'"),
        (
            lambda m: m.row(0, 4, b=2, q_offset=torch.tensor([1, 2])),
            mf.ArgumentError,
            "b is 2, expected less than batch",
        ),
    ],
)
def test_wrong_arguments_are_told(ask, error, message):
    with pytest.raises(error, match=message):
        ask(mf.causal())


def test_a_mask_with_sizes_of_its_own_asks_for_them():
    mask = mf.ColumnIntervals(torch.tensor([2, 2, 4, 4]), causal=True)
    assert mask.row(1, 4, q_len=4) == [(0, 2)]
    with pytest.raises(mf.ArgumentError, match=r"Mask.row: .* depends on the sizes of a call; pass q_len=\.\.\. as"):
        (mask & mf.causal()).row(1, 4)
    with pytest.raises(mf.ArgumentError, match=r"Mask.row: kv_len is 5, expected 4"):
        mask.row(1, 5, q_len=4)


def test_a_look_up_out_of_range_is_an_error():
    table = torch.tensor([1, 2, 3])
    with pytest.raises(mf.MaskIndexError, match="reads index 3"):
        mf.mask(lambda b, h, q, kv: table[kv] == 2).row(0, 4)
