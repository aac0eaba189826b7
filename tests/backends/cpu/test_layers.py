"""Layers: a few intervals per row, told apart exactly, or left to strips."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.analysis.rows import RowSpans, Strip
from maskflash.backends.cpu.layers import Layers


def bits_of(layers, q_len, kv_len):
    """How many layers hold each pair: (Sq, Skv)."""
    x = np.arange(kv_len)
    return sum(((x >= s.start[:, None]) & (x < s.stop[:, None])).astype(int) for s in layers)


@st.composite
def banded(draw, rows, columns):
    """Bits with a few intervals per row, whose ends stay or slide by one token a row, and jump here and there."""
    bits = np.zeros((rows, columns), dtype=np.bool_)
    for _ in range(draw(st.integers(1, 3))):
        low, high = sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        left, width = draw(st.integers(-5, columns)), draw(st.integers(1, columns))
        steps = draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
        t, x = np.arange(high - low)[:, None], np.arange(columns)
        bits[low:high] |= (x >= left + steps[0] * t) & (x < left + width + steps[1] * t)
    return bits


@settings(max_examples=200)
@given(data=st.data())
def test_layers_hold_every_bit_once(data):
    rows, columns, top, left = data.draw(st.tuples(*(st.integers(1, 40),) * 2, *(st.integers(0, 5),) * 2))
    bits = data.draw(banded(rows, columns))
    layers = Layers(top + rows + 2)
    taken = layers.take(Strip(top, left + np.arange(bits.shape[1]), bits))
    wanted = np.zeros((top + rows + 2, left + columns), dtype=int)
    wanted[top : top + rows, left:] = bits if taken else 0
    nothing = RowSpans(np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.int64))
    found = layers.joined(nothing)
    assert (bits_of(found, *wanted.shape) == wanted).all()
    for before, after in pairwise(found):
        some = after.stop > after.start
        assert (before.stop < after.start)[some].all()  # ascending, with a gap: so merging always finds a result


def test_rows_in_no_strip_are_in_the_first_layer():
    layers = Layers(4)
    assert layers.take(Strip(2, np.arange(1, 4), np.array([[1, 0, 1], [1, 0, 1]], dtype=np.bool_)))
    first, second = layers.joined(RowSpans(np.array([0, 1, 0, 0]), np.array([3, 2, 0, 0])))
    assert (first.start.tolist(), first.stop.tolist()) == ([0, 1, 1, 1], [3, 2, 2, 2])
    assert (second.start.tolist(), second.stop.tolist()) == ([0, 0, 3, 3], [0, 0, 4, 4])


@pytest.mark.parametrize("columns", [60, 4])
def test_scattered_bits_are_no_layers(columns):
    bits = np.random.default_rng(0).random((64, columns)) < 0.5
    layers = Layers(64)
    assert not layers.take(Strip(0, np.arange(bits.shape[1]), bits))
    assert layers.start == []
