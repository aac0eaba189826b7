"""Classification equals brute force, however the lattice is cut and whatever settles a tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.blocks import classify as module
from maskflash.testing import masks

SIZES = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))


def brute_force(dense, block_size):
    """The kind of every tile, from all pairs."""
    bq, bkv = (block_size, block_size) if isinstance(block_size, int) else block_size
    batch, heads, q_len, kv_len = dense.shape
    kinds = torch.zeros(batch, heads, -(-q_len // bq), -(-kv_len // bkv), dtype=torch.int8)
    for i in range(kinds.shape[2]):
        for j in range(kinds.shape[3]):
            tile = dense[:, :, i * bq : (i + 1) * bq, j * bkv : (j + 1) * bkv].flatten(2)
            kinds[:, :, i, j] = tile.any(2).to(torch.int8) + tile.all(2).to(torch.int8)
    return kinds


@settings(max_examples=300)
@given(masks(), st.integers(0, 64), st.integers(0, 64), SIZES, st.integers(1, 3), st.sampled_from([0, 1 << 16]))
def test_every_tile_is_what_all_its_pairs_say(mask, q_len, kv_len, block_size, parts, many):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MANY_TILES", many)  # 0: cut columns wherever the mask can be taken apart
        patch.setattr(module, "_BOXES_AT_ONCE", 4**parts)  # cut the lattice, so that the seams are tested too
        patch.setattr(module, "_PAIRS_AT_ONCE", 1 << (5 * parts))
        found = mask.block_map(q_len, kv_len, batch=2, heads=2, block_size=block_size).kinds()
    expected = brute_force(mask.dense(q_len, kv_len, batch=2, heads=2), block_size)
    assert torch.equal(found.expand_as(expected), expected)


@given(masks(max_len=96), st.integers(0, 32), st.lists(st.integers(0, 32), min_size=2, max_size=2), SIZES)
def test_offsets_shift_the_rows(mask, offset, offsets, block_size):
    offsets = torch.tensor(offsets)
    for value in (offset, offsets, offsets.to(torch.int32)):
        dense = mask.dense(40, 64, batch=2, heads=2, q_offset=value)
        found = mask.block_map(40, 64, batch=2, heads=2, block_size=block_size, q_offset=value)
        expected = brute_force(dense, block_size)
        assert torch.equal(found.kinds().expand_as(expected), expected)
        for b in range(2):
            rows = int(offsets[b]) if isinstance(value, torch.Tensor) else offset
            shifted = mask.dense(rows + 40, 64, batch=2, heads=2)[b, :, rows:]
            assert torch.equal(dense[b], shifted)


@pytest.mark.parametrize(
    ("predicate", "batch", "heads"),
    [
        (lambda b, h, q, kv: q >= kv, 1, 1),
        (lambda b, h, q, kv: q >= kv + b, 3, 1),
        (lambda b, h, q, kv: q >= kv + h, 1, 4),
        (lambda b, h, q, kv: q + b >= kv + h, 3, 4),
        (lambda b, h, q, kv: q + b - b * 1 >= kv, 3, 1),
    ],
)
def test_the_map_has_rows_and_heads_only_where_the_mask_looks_at_them(predicate, batch, heads):
    assert mf.mask(predicate).block_map(64, 64, batch=3, heads=4).shape[:2] == (batch, heads)


def test_what_settles_a_tile():
    """Bounds settle what lies off the diagonal, samples the diagonal, and elements what samples can't see."""
    attn = mf.compile(mf.causal())
    assert attn.explain(1024, 1024).to_dict()["decided"] == {"bounds": 56, "samples": 8, "elements": 0, "columns": 0}
    lonely = mf.compile(lambda b, h, q, kv: (q % 128 == 77) & (kv % 128 == 33))
    facts = lonely.explain(1280, 1280).to_dict()
    assert facts["decided"] == {"bounds": 0, "samples": 0, "elements": 100, "columns": 0}
    assert facts["tiles"] == {"full": 0, "partial": 100, "skip": 0}


def test_an_empty_side_gives_an_empty_map():
    for q_len, kv_len in ((0, 5), (5, 0), (0, 0)):
        found = mf.causal().block_map(q_len, kv_len)
        assert found.counts == {"full": 0, "partial": 0, "skip": 0}
        assert mf.causal().dense(q_len, kv_len).shape == (1, 1, q_len, kv_len)


def test_a_look_up_out_of_range_is_found_wherever_it_hides():
    table = torch.arange(1000)
    for predicate in (
        lambda b, h, q, kv: table[q] >= 0,  # would be full
        lambda b, h, q, kv: table[q] < 0,  # would be skip
        lambda b, h, q, kv: (q > 5000) & (table[kv] > 3),  # & reaches both sides
    ):
        mf.mask(predicate).block_map(1000, 1000)
        with pytest.raises(mf.MaskIndexError, match=r"test_classify.py:\d+.*of a table of shape \(1000,\)"):
            mf.mask(predicate).block_map(1001, 1001)


def test_a_guarded_look_up_out_of_range_is_fine():
    table = torch.arange(1000)
    guarded = mf.mask(lambda b, h, q, kv: q < 1000 and table[q] > 3)
    assert guarded.dense(1300, 1)[0, 0, :, 0].nonzero().flatten().tolist() == list(range(4, 1000))
    assert guarded.block_map(1300, 1300).counts["full"] > 0
