"""Cells are what tiles of their size would be, for any mask, and found without a lattice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.errors import ArgumentError
from maskflash.testing import masks
from maskflash.visualize.cells import cells

MAX = 40


def brute(kinds, side):
    """Cells from the whole lattice, one at a time."""
    bands = [[[int(part.min()), int(part.max())] for part in band.split(side, 1)] for band in kinds.split(side, 0)]
    return [[low if low == high else 1 for low, high in band] for band in bands]


@settings(max_examples=60)
@given(
    masks(MAX),
    st.integers(1, MAX),
    st.integers(1, MAX),
    st.sampled_from([1, 2, 3, 7]),
    st.integers(1, 12),
    st.integers(0, 1),
    st.integers(0, 3),
)
def test_cells_are_the_tiles_they_hold(mask, q_len, kv_len, block, most, row, head):
    block_map = mask.block_map(q_len, kv_len, batch=2, heads=4, block_size=(block, block + 1))
    found = cells(block_map, most, row, head)
    kinds = block_map.kinds().expand(2, 4, -1, -1)[row, head]
    assert found.kinds.tolist() == brute(kinds, found.side)
    assert max(found.kinds.shape) <= most
    assert found.side == 1 or -(-max(kinds.shape) // (found.side - 1)) > most  # no coarser than needed
    assert (found.rows[0], found.rows[-1], found.columns[-1]) == (0, q_len, kv_len)
    assert (np.diff(found.rows)[:-1] == block * found.side).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_tiles_are_no_cells(q_len, kv_len):
    found = cells(mf.causal().block_map(q_len, kv_len, block_size=2), 8)
    assert found.kinds.shape == (-(-q_len // 2), -(-kv_len // 2))


@pytest.mark.parametrize(("given", "said"), [({"batch_row": 2}, "batch_row is 2"), ({"head": 4}, "head is 4")])
def test_a_row_or_head_that_is_not_there_is_an_error(given, said):
    spans = torch.arange(1, 5)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    mask = mf.mask(lambda b, h, q, kv: ids[b, q] == ids[b, kv] and q - kv < spans[h])
    with pytest.raises(ArgumentError, match=said):
        cells(mask.block_map(8, 8, batch=2, heads=4), 8, **given)


def test_a_million_tokens_cost_their_runs():
    block_map = mf.sliding_window(4096).block_map(1 << 20, 1 << 20)
    found = cells(block_map, 512)
    assert found.kinds.shape == (512, 512)
    i, j = np.nonzero(found.kinds)
    assert (i - j).min() == 0
    assert (i - j).max() == 2  # 4,096 tokens back, in cells of 2,048
