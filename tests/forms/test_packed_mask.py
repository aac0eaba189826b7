"""FlashInfer's packed masks: bits decoded as its kernels read them, and compared with every pair; and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.forms.packed_mask import set_bits
from maskflash.testing import masks

LENGTH = st.integers(0, 64)


def decoded(form):
    """(B, 1, q_len, kv_len) bool, pair by pair."""
    batch = len(form.indptr) - 1
    seen = torch.zeros(batch, 1, form.q_len, form.kv_len, dtype=torch.bool)
    held, starts = form.packed.tolist(), form.indptr.tolist()
    for b in range(batch):
        for q in range(form.q_len):
            for kv in range(form.kv_len):
                offset = q * form.kv_len + kv
                seen[b, 0, q, kv] = bool(held[starts[b] + offset // 8] >> (offset % 8) & 1)
    return seen


@settings(max_examples=60)
@given(masks(heads=1), LENGTH, LENGTH, LENGTH)
def test_bits_are_the_mask(mask, q_len, kv_len, last):
    sizes = {"batch": 2, "q_offset": max(last - q_len, 0)}
    form = mask.to_packed_mask(q_len, kv_len, **sizes)
    dense = mask.dense(q_len, kv_len, **sizes)
    assert torch.equal(decoded(form), dense)
    assert torch.equal(form.unpacked(), dense.flatten())
    for b in range(2):  # as FlashInfer's segment_packbits has them, bits after the last pair too
        own = form.packed[int(form.indptr[b]) : int(form.indptr[b + 1])]
        assert own.tolist() == np.packbits(dense[b].numpy().flatten(), bitorder="little").tolist()


@settings(max_examples=60)
@given(masks(heads=1), LENGTH, LENGTH)
def test_a_mask_comes_back(mask, q_len, kv_len):
    form = mask.to_packed_mask(q_len, kv_len, batch=2)
    found = mf.from_packed_mask(form.packed, q_len, kv_len, batch=2)
    assert torch.equal(found.dense(q_len, kv_len, batch=2), mask.dense(q_len, kv_len, batch=2))


@settings(max_examples=200)
@given(st.lists(st.booleans(), max_size=200))
def test_any_bits_are_set(bits):
    edges = np.diff(np.array([False, *bits, False]).astype(np.int8))
    start, stop = (torch.from_numpy(np.flatnonzero(edges == step)) for step in (1, -1))
    assert (
        set_bits(start, stop, -(-len(bits) // 8)).tolist()
        == np.packbits(np.array(bits, bool), bitorder="little").tolist()
    )


def test_one_sequence_serves_any_batch_where_it_is_given_so():
    form = mf.causal().to_packed_mask(8, 8)
    found = mf.from_packed_mask(form.packed, 8, 8)
    assert mf.equivalent(found, mf.causal(), 8, 8, batch=3)
    assert repr(form) == "PackedMask(8 x 8 tokens, 1 sequences, 8 bytes)"


def test_bits_that_do_not_fit_are_refused():
    held = torch.ones(8, dtype=torch.uint8)
    with pytest.raises(mf.ArgumentError, match="packed has 8 bytes, expected 9: 9 for each of 1 sequences of 8 x 9"):
        mf.from_packed_mask(held, 8, 9)
    with pytest.raises(mf.ArgumentTypeError, match=r"packed has dtype torch.int64, expected torch.uint8"):
        mf.from_packed_mask(held.long(), 8, 8)
    with pytest.raises(mf.UnsupportedMask, match="FlashInfer counts"):
        mf.causal().to_packed_mask(2**17, 2**17)
