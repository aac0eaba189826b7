"""FlashInfer's block-sparse rows: bits decoded as its kernels read them, and compared with every pair; and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

LENGTH = st.integers(0, 64)
BLOCK = st.sampled_from([16, (8, 16), (32, 8), (1, 1), (5, 7)])


def decoded(form):
    """(M, N) bool: row of blocks by row of blocks, as a sequence of its own whose keys are the listed blocks'."""
    seen = torch.zeros(form.M, form.N, dtype=torch.bool)
    for line in range(len(form.indptr) - 1):
        blocks = form.indices[int(form.indptr[line]) : int(form.indptr[line + 1])].tolist()
        assert blocks == sorted(set(blocks))
        keys = [block * form.C + c for block in blocks for c in range(form.C)]
        assert all(key < form.N for key in keys)
        rows = min(form.M, (line + 1) * form.R) - line * form.R
        for r in range(rows):
            for place, key in enumerate(keys):
                visible = True
                if form.packed_mask is not None:
                    offset = r * len(keys) + place
                    byte = int(form.packed_mask[int(form.mask_indptr[line]) + offset // 8])
                    visible = byte >> (offset % 8) & 1
                seen[line * form.R + r, key] = bool(visible)
    return seen


def sequences(form, seen, q_len, kv_len):
    """(batch, 1, q_len, kv_len) of what sequences one after the other, on whole blocks, see; and nothing else."""
    own = torch.zeros(form.batch, 1, q_len, kv_len, dtype=torch.bool)
    q_step, kv_step = -(-q_len // form.R) * form.R, -(-kv_len // form.C) * form.C
    for b in range(form.batch):
        rows = seen[b * q_step : b * q_step + q_len]
        own[b, 0] = rows[:, b * kv_step : b * kv_step + kv_len]
        assert rows.sum() == own[b].sum()
    return own


@settings(max_examples=40)
@given(masks(heads=1), LENGTH, LENGTH, LENGTH, BLOCK)
def test_they_are_the_mask(mask, q_len, kv_len, last, block_size):
    sizes = {"batch": 2, "q_offset": max(last - q_len, 0)}
    form = mask.to_block_rows(q_len, kv_len, block_size=block_size, **sizes)
    assert torch.equal(sequences(form, decoded(form), q_len, kv_len), mask.dense(q_len, kv_len, **sizes))


@settings(max_examples=60)
@given(masks(heads=1), LENGTH, LENGTH, BLOCK, st.booleans())
def test_a_mask_comes_back(mask, q_len, kv_len, block_size, packed):
    form = mask.to_block_rows(q_len, kv_len, block_size=block_size, batch=2)
    bits = {"packed_mask": form.packed_mask} if packed else {"mask": form.unpacked()}
    found = mf.from_block_rows(form.indptr, form.indices, form.M, form.N, (form.R, form.C), **bits)
    seen = found.dense(form.M, form.N)[0, 0]
    assert torch.equal(sequences(form, seen, q_len, kv_len), mask.dense(q_len, kv_len, batch=2))


def test_full_blocks_need_no_bits():
    form = mf.document([32, 32]).to_block_rows(64, 64, block_size=16)
    assert form.packed_mask is None and form.unpacked() is None
    assert form.indices.tolist() == [0, 1] * 2 + [2, 3] * 2
    assert repr(form) == "BlockRows(64 x 64 tokens, blocks of 16 x 16, 8 blocks, 0 bytes of bits)"


def test_no_batch_row_is_no_sequence():
    form = mf.causal().to_block_rows(20, 20, block_size=16, batch=0)
    assert (form.M, form.N, len(form.indices)) == (0, 0, 0)


def test_heads_that_differ_are_refused():
    steps = torch.tensor([[1, 1], [1, 2]])
    mask = mf.mask(lambda b, h, q, kv: abs(q - kv) < steps[b, h])
    with pytest.raises(mf.UnsupportedMask, match="row 0 of batch row 1 sees other keys in head 1 than in head 0"):
        mask.to_block_rows(8, 8, block_size=4, batch=2, heads=2)
    alike = mf.mask(lambda b, h, q, kv: q >= kv + h * 0).to_block_rows(8, 8, block_size=4, heads=2)
    assert torch.equal(decoded(alike), mf.causal().dense(8, 8)[0, 0])


RIGHT = {"indptr": [0, 1, 3], "indices": [0, 0, 1], "M": 8, "N": 8, "block_size": 4}
WRONG = {
    "expected a multiple of C, 4": {"N": 9},
    r"indptr has shape \(2,\), expected 3 numbers": {"indptr": [0, 3]},
    "numbers that rise from 0 to 3": {"indptr": [0, 4, 3]},
    "indices is 2 at 1, expected a block of keys from 0 to 1": {"indices": [0, 2, 1]},
    "indices falls or repeats at 2": {"indices": [0, 1, 1]},
    "packed_mask has 1 bytes, expected 6": {"packed_mask": torch.ones(1, dtype=torch.uint8)},
    r"mask is torch.bool \(3, 4\), expected torch.bool \(3, 4, 4\)": {"mask": torch.ones(3, 4, dtype=torch.bool)},
    "mask is a int": {"mask": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_rows_that_are_none_are_refused(message):
    with pytest.raises(mf.ArgumentError, match=message):
        mf.from_block_rows(**{**RIGHT, **WRONG[message]})
