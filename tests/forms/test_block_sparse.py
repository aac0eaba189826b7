"""FlashAttention 4's block lists: decoded by the rules of its kernels, and compared with every pair; and back."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

LENGTH = st.integers(0, 64)
BLOCK = st.sampled_from([16, (8, 16), (32, 8), (64, 64)])
FIELDS = ["mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx"]


def decoded(lists, mask_mod, lengths, transposed=False):
    """The pairs of a kernel that walks each line's lists from their ends, and is cut at kv_len in the first it meets.

    A kernel works on whole blocks: what it shows past the lengths, but where FlashAttention 4 cuts, is an error.
    """
    rows, columns = lists.block_size
    batch, heads, lines = lists.mask_block_cnt.shape
    n_q, n_kv = -(-lengths[0] // rows), -(-lengths[1] // columns)
    seen = torch.zeros(batch, heads, n_q * rows, n_kv * columns, dtype=torch.bool)
    past = 0, n_kv * columns - lengths[1], 0, n_q * rows - lengths[0]
    mask_mod = torch.nn.functional.pad(mask_mod, past, value=True)  # whatever it says there
    for b, h, line in torch.cartesian_prod(*map(torch.arange, (batch, heads, lines))).tolist():
        for kind in ("mask", "full"):
            count = int(getattr(lists, f"{kind}_block_cnt")[b, h, line])
            held = getattr(lists, f"{kind}_block_idx")[b, h, line, :count].tolist()
            assert held == sorted(set(held)), "each once, ascending"
            for place, other in enumerate(reversed(held)):
                i, j = (other, line) if transposed else (line, other)
                block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                shown = torch.ones(rows, columns, dtype=torch.bool)
                if kind == "mask":
                    shown = mask_mod[b, h][block]
                if transposed or place == 0:
                    shown = shown & (torch.arange(n_kv * columns)[block[1]] < lengths[1])
                seen[b, h][block] |= shown
    assert not seen[..., lengths[1] :].any()
    return seen[:, :, : lengths[0], : lengths[1]]


@settings(max_examples=40)
@given(masks(), LENGTH, LENGTH, LENGTH, BLOCK)
def test_lists_are_the_mask(mask, q_len, kv_len, last, block_size):
    sizes = {"batch": 2, "heads": 2, "q_offset": max(last - q_len, 0)}
    form = mask.to_block_sparse(q_len, kv_len, block_size=block_size, **sizes)
    dense = mask.dense(q_len, kv_len, **sizes)
    for lists, transposed in ((form.forward, False), (form.backward, True)):
        assert all(getattr(lists, name).dtype == torch.int32 for name in FIELDS)
        found = decoded(lists, dense, (q_len, kv_len), transposed)
        assert torch.equal(found.expand(dense.shape), dense)


@settings(max_examples=60)
@given(masks(), LENGTH, LENGTH, BLOCK)
def test_a_mask_comes_back(mask, q_len, kv_len, block_size):
    sizes = {"batch": 2, "heads": 2}
    form = mask.to_block_sparse(q_len, kv_len, block_size=block_size, **sizes)
    found = mf.from_block_sparse(form.forward, mask, q_len, kv_len)
    assert torch.equal(found.dense(q_len, kv_len, **sizes), mask.dense(q_len, kv_len, **sizes))


def test_full_blocks_count_whatever_the_function_says():
    form = mf.full().to_block_sparse(64, 64, block_size=16)
    nothing = mf.mask(lambda b, h, q, kv: kv < 0)
    found = mf.from_block_sparse(form.forward, nothing, 64, 64)
    assert bool(found.dense(64, 64).all())
    assert found.name == "from_block_sparse(<lambda>)"


def test_indices_are_as_wide_as_the_longest_line():
    """FlashAttention 4 takes compact lists, which keep a million tokens from a quadratic tensor."""
    form = (mf.causal() & mf.document([512] * 16)).to_block_sparse(8192, 8192)
    assert form.forward.full_block_idx.shape == (1, 1, 64, 3)
    assert form.forward.mask_block_idx.shape == (1, 1, 64, 1)
    assert repr(form) == (
        "BlockSparse(8192 x 8192 tokens, blocks of 128 x 128, shape (1, 1, 64, 64), 96 full, 64 partial)"
    )


def test_a_ragged_block_of_visible_pairs_is_full():
    """As compute_block_sparsity of FlashAttention 4 has it, unlike FlexAttention's create_block_mask."""
    form = mf.full().to_block_sparse(100, 100, block_size=64)
    assert form.forward.full_block_cnt.tolist() == [[[2, 2]]]
    assert form.forward.block_size == form.backward.block_size == (64, 64)


FORWARD = mf.causal().to_block_sparse(64, 64, block_size=16).forward
WRONG = {
    r"mask_block_cnt has shape \(1, 1, 3\) and mask_block_idx \(1, 1, 4, 1\)": {
        "mask_block_cnt": FORWARD.mask_block_cnt[..., :3]
    },
    "counts more blocks than": {"mask_block_cnt": FORWARD.mask_block_cnt + 1},
    r"mask_block_idx is 4 at \(0, 0, 0, 0\), expected a kv block from 0 to 3": {
        "mask_block_idx": FORWARD.mask_block_idx + 4
    },
    r"lists a block twice in line \(0, 0, 2\)": {"full_block_idx": FORWARD.full_block_idx * 0},
    r"tile \(0, 0, 1, 0\) is in the list": {"mask_block_idx": FORWARD.mask_block_idx * 0},
    "block_size is None": {"block_size": None},
    "expected batch and heads as in": {
        "mask_block_cnt": FORWARD.mask_block_cnt.expand(2, 1, 4),
        "mask_block_idx": FORWARD.mask_block_idx.expand(2, 1, 4, 1),
        "full_block_cnt": FORWARD.full_block_cnt.expand(3, 1, 4),
        "full_block_idx": FORWARD.full_block_idx.expand(3, 1, 4, -1),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_lists_that_are_none_are_refused(message):
    with pytest.raises(mf.ArgumentError, match=message):
        mf.from_block_sparse(FORWARD._replace(**WRONG[message]), mf.causal(), 64, 64)


def test_it_is_for_one_size():
    found = mf.from_block_sparse(FORWARD, mf.causal(), 64, 64)
    with pytest.raises(
        mf.ArgumentError, match=r"the block-sparse form is for .* \(1, 1, 64, 64\), got \(1, 1, 32, 64\)"
    ):
        found.dense(32, 64)
    with pytest.raises(mf.ArgumentTypeError, match="mask_block_cnt"):
        mf.from_block_sparse(object(), mf.causal(), 64, 64, block_size=16)


def test_what_needs_more_than_a_pair_is_no_mask_mod():
    form = mf.causal().to_block_sparse(40, 40, block_size=16).forward
    for mask_mod, what in (
        (mf.from_arguments("flash_attn", causal=True), "depends on the lengths of a call"),
        (lambda b, h, q, kv, *, w: q - kv < w, "needs w"),
    ):
        with pytest.raises(mf.ArgumentTypeError, match=f"from_block_sparse: mask_mod .* {what}"):
            mf.from_block_sparse(form, mask_mod, 40, 40)


def test_copies_are_for_the_same_size():
    blocks = mf.causal().to_block_sparse(40, 40, block_size=16).forward
    whole = mf.from_block_sparse(blocks, mf.causal(), 40, 40)
    fewer = blocks._replace(full_block_cnt=torch.zeros_like(blocks.full_block_cnt))
    packed = mf.from_packed_mask(mf.causal().to_packed_mask(40, 40).packed, 40, 40)
    for mask in (whole, mf.from_block_sparse(fewer, mf.causal(), 40, 40), packed):
        copied = copy.deepcopy(mask)
        for same in (copied, pickle.loads(pickle.dumps(mask)), pickle.loads(pickle.dumps(copied))):
            assert torch.equal(same.dense(40, 40), mask.dense(40, 40)) and str(same) == str(mask)
            with pytest.raises(mf.ArgumentError, match=r"for \(batch, heads, q_len, kv_len\)"):
                same.dense(41, 40)
