"""Masks as FlashMask's vectors: the same mask, pair by pair, or the first column that does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis import changes, rows, ways
from maskflash.testing import columns, masks

LENGTH = st.integers(0, 64)


def hidden_runs(column):
    """(first, last + 1) of each run of hidden rows of a column of bits."""
    edges = torch.cat((torch.tensor([False]), ~column, torch.tensor([False]))).int().diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def fits(dense, causal):
    """Whether every column of (q_len, kv_len) bits has a form, by the definition."""
    q_len, kv_len = dense.shape[2:]
    for bits in dense.flatten(0, 1):
        for j in range(kv_len):
            future = min(max(j - (kv_len - q_len), 0), q_len)
            if causal and bits[:future, j].any():
                return False
            runs = hidden_runs(bits[:, j])
            if causal and runs and runs[0] == (0, future):
                runs = runs[1:]
            if len(runs) > 2:
                return False
    return True


@settings(max_examples=300)
@given(st.one_of(masks(), masks().map(lambda m: m & mf.causal())), LENGTH, LENGTH, st.sampled_from([None, True, False]))
def test_the_vectors_are_the_mask_or_there_are_none(mask, q_len, kv_len, causal):
    sizes = {"batch": 2, "heads": 2}
    dense = mask.dense(q_len, kv_len, **sizes)
    try:
        found = mask.to_flashmask(q_len, kv_len, causal=causal, **sizes)
    except mf.UnsupportedMask:
        assert not fits(dense, bool(causal))
        return
    assert causal in (None, found.causal)
    assert fits(dense, found.causal)
    assert torch.equal(found.dense(q_len, kv_len, **sizes), dense)
    again = mf.ColumnIntervals.from_flashmask(found.startend_row_indices, found.causal)
    assert torch.equal(again.dense(q_len, kv_len, **sizes), dense)


@settings(max_examples=100)
@given(st.data(), LENGTH, LENGTH)
def test_vectors_come_back(data, q_len, kv_len):
    mask = data.draw(columns(q_len, kv_len, 2, 4))
    dense = mask.dense(q_len, kv_len, batch=2, heads=4)
    try:
        found = mask.to_flashmask(q_len, kv_len, batch=2, heads=4)
    except mf.UnsupportedMask:
        assert not fits(dense, mask.causal)  # an lts within the future, say, can leave three runs
        return
    assert torch.equal(found.dense(q_len, kv_len, batch=2, heads=4), dense)


@settings(max_examples=150)
@given(masks(), st.integers(1, 64), st.integers(1, 64), st.sampled_from([(16, 16), (5, 7), (64, 3)]))
def test_all_ways_to_find_changes_agree(mask, q_len, kv_len, block_size):
    problem = mask.at(q_len, kv_len, batch=2, heads=2).tiled(block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK_PAIRS", 1000)
        patch.setattr(ways.columns, "PIECES_AT_ONCE", 100)
        found = [changes.find_changes(problem)]
        for fact in ("columns", "pieces"):
            patch.setattr(changes.Facts, fact, None)
            found.append(changes.find_changes(problem))
    bits = mask.dense(q_len, kv_len, batch=2, heads=2)[: problem.shape[0], : problem.shape[1]]
    before = torch.cat((torch.zeros_like(bits[:, :, :1]), bits[:, :, :-1]), 2)
    expected = (bits != before).transpose(2, 3).flatten(0, 2).nonzero(as_tuple=True)
    for way in found:
        assert torch.equal(way.column, expected[0]) and torch.equal(way.row, expected[1])


@given(masks(max_len=96), st.integers(0, 32))
def test_offsets_are_written_into_the_vectors(mask, offset):
    try:
        found = mask.to_flashmask(40, 64, batch=2, heads=2, q_offset=offset)
    except mf.UnsupportedMask:
        return
    expected = mask.dense(40, 64, batch=2, heads=2, q_offset=offset)
    assert torch.equal(found.dense(40, 64, batch=2, heads=2), expected)


def test_the_fewest_vectors():
    layouts = {
        mf.causal(): ["lts"],
        mf.causal() & mf.document([20, 30]): ["lts"],
        mf.document([20, 30]): ["lts", "ute"],
        mf.prefix_lm(20): ["lts", "ute"],
        mf.causal() & mf.global_tokens(3): ["lts"],
        mf.causal() & ~mf.document([20, 30]): ["lts", "lte"],
        mf.global_tokens(4) | mf.sliding_window(5, 5): ["lts", "lte", "uts", "ute"],
    }
    for mask, names in layouts.items():
        assert list(mask.to_flashmask(50, 50).vectors()) == names, mask


def test_what_does_not_fit_is_named():
    with pytest.raises(mf.UnsupportedMask, match=r"column 0 hides the rows 1, 3, 5 to 8; column intervals hold two"):
        mf.dilated_window(4, 2).to_flashmask(9, 9)
    with pytest.raises(mf.UnsupportedMask, match=r"column 0 hides the rows 1, 3, 5, \.\.\.; .* two runs besides what"):
        (mf.dilated_window(40, 2) & mf.causal()).to_flashmask(40, 40)
    heads = torch.tensor([1, 2])
    per_head = mf.mask(lambda b, h, q, kv: (q - kv) % heads[h] == 0)
    with pytest.raises(mf.UnsupportedMask, match=r"column 0 of head 1 hides"):
        per_head.to_flashmask(40, 40, heads=2)
    with pytest.raises(mf.UnsupportedMask, match=r"column 1 is visible at row 0, which causal=True hides"):
        mf.full().to_flashmask(4, 4, causal=True)
