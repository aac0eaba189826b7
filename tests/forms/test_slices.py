"""Masks as MagiAttention's slices: decoded here by what each type means, and each pair once."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, masks

LENGTH = st.integers(0, 48)
STEPS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def decoded(slices, queries, keys):
    """(queries, keys) bool of slices, by MagiAttention's words: to the bottom right, to the top left, or both."""
    assert {x.dtype for x in (slices.q_ranges, slices.k_ranges, slices.types)} == {torch.int32}
    times = torch.zeros(queries, keys, dtype=torch.int32)
    numbers = zip(slices.q_ranges.tolist(), slices.k_ranges.tolist(), slices.types.tolist(), strict=True)
    for (q0, q1), (k0, k1), kind in numbers:
        assert 0 <= q0 < q1 <= queries and 0 <= k0 < k1 <= keys and kind in range(4)
        for q in range(q0, q1):
            first, last = k0, k1 - 1
            if kind in (1, 3):  # the last query of the range sees the last key, and one before it a key less
                last -= q1 - 1 - q
            if kind in (2, 3):  # the first query sees the first key
                first += q - q0
            times[q, first : max(last + 1, first)] += 1
    assert int(times.max() if times.numel() else 0) <= 1, "no pair is in two slices"
    return times.bool()


def along_tokens(dense):
    """Batch rows, of one head, one after the other along queries and keys."""
    return (
        torch.block_diag(*dense.int()).bool()
        if dense.numel()
        else dense.new_zeros(len(dense) * dense.shape[1], len(dense) * dense.shape[2])
    )


@settings(max_examples=100)
@given(masks(), LENGTH, LENGTH, st.integers(0, 64))
def test_slices_are_the_mask_or_heads_differ(mask, q_len, kv_len, last):
    sizes = {"batch": 2, "heads": 2, "q_offset": max(last - q_len, 0)}
    dense = mask.dense(q_len, kv_len, **sizes)
    try:
        found = mask.to_slices(q_len, kv_len, **sizes)
    except mf.UnsupportedMask as error:
        b, q = (dense[:, 0] != dense[:, 1]).any(-1).nonzero()[0].tolist()
        assert str(error).startswith(f"to_slices: row {q} of batch row {b} sees ")
        return
    assert torch.equal(dense[:, 0], dense[:, 1])
    tokens = along_tokens(dense[:, 0])
    assert torch.equal(decoded(found, 2 * q_len, 2 * kv_len), tokens)
    back = mf.from_slices(found.q_ranges, found.k_ranges, found.types)
    assert torch.equal(back.dense(2 * q_len, 2 * kv_len)[0, 0], tokens)


@settings(max_examples=25)
@given(masks(heads=1), LENGTH, LENGTH)
def test_slices_come_back(mask, q_len, kv_len):
    found = mask.to_slices(q_len, kv_len)
    back = mf.from_slices(found.q_ranges, found.k_ranges, found.types)
    assert mf.equivalent(mask, back, q_len, kv_len)


def fewest(steps):
    """The least number of slices that rows with these steps between them can be cut into: over all ways to cut."""
    least = [0]
    for row in range(len(steps) + 1):
        alike = [first for first in range(row + 1) if len(set(steps[first:row])) <= 1]
        least.append(min(least[first] + 1 for first in alike))
    return least[-1]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=10))
def test_there_are_as_few_as_can_be(runs):
    steps = [STEPS[kind] for kind, times in runs for _ in range(times)]
    start, stop = [0], [len(steps) + 1]
    for left, right in steps:
        start.append(start[-1] + left)
        stop.append(stop[-1] + right)
    ends = torch.stack((torch.zeros(len(start), dtype=torch.int64), torch.tensor(start), torch.tensor(stop)))
    mask = mf.from_row_intervals(ends[None], stop[-1])
    found = mask.to_slices(len(start), stop[-1])
    assert len(found) == fewest(steps)
    assert torch.equal(decoded(found, len(start), stop[-1]), mask.dense(len(start), stop[-1])[0, 0])


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (mf.full(), "1 full"),
        (mf.causal(), "1 causal"),
        (~mf.causal(), "1 inverse causal"),
        (mf.document([300, 724]), "2 full"),
        (mf.causal() & mf.document([300, 724]), "2 causal"),
        (mf.sliding_window(100), "1 causal, 1 bi-causal"),
        (mf.sliding_window(100, 100), "1 causal, 1 inverse causal, 1 bi-causal"),
        (mf.prefix_lm(100), "1 full, 1 causal"),
        (mf.causal() & (mf.global_tokens(4) | mf.sliding_window(100)), "1 full, 1 causal, 1 bi-causal"),
        (mf.full() & ~mf.full(), "none"),
    ],
)
def test_counts_of_known_masks(mask, told):
    found = mask.to_slices(1024, 1024)
    assert repr(found) == f"Slices({told})"
    assert mf.compile(mask).explain(1024, 1024).to_dict()["slices"] == len(found) == sum(found.counts.values())


def test_batch_rows_lie_one_after_the_other():
    found = mf.causal().to_slices(2, 3, batch=2)
    assert found.q_ranges.tolist() == [[0, 2], [2, 4]]
    assert found.k_ranges.tolist() == [[0, 2], [3, 5]]
    own = mf.padding([1, 0, 3]).to_slices(4, 3, batch=3)
    assert own.q_ranges.tolist() == [[0, 4], [8, 12]]
    assert own.k_ranges.tolist() == [[0, 1], [6, 9]]


def test_heads_that_differ_are_named():
    mask = mf.mask(lambda b, h, q, kv: (kv <= q) & ((kv > 1) | (h == 0) | (q < 3)))
    with pytest.raises(
        mf.UnsupportedMask,
        match=r"to_slices: row 3 of batch row 0 sees the keys 2 to 3 in head 1 and the keys 0 to 3 in head 0",
    ):
        mask.to_slices(8, 8, heads=2)
    assert mf.compile(mask).explain(8, 8, heads=2).to_dict()["slices"] is None
    same = mf.mask(lambda b, h, q, kv: (kv <= q) & (h >= 0))
    assert len(same.to_slices(8, 8, heads=2)) == 1


def test_more_tokens_than_32_bits_number_are_refused():
    with pytest.raises(mf.UnsupportedMask, match=r"3 batch rows have 3,221,225,472 tokens"):
        mf.padding([1]).to_slices(2, 1 << 30, batch=3)


def test_a_mask_of_slices_is_as_any_other():
    mask = mf.from_slices([[0, 2], [2, 4]], [[0, 2], [1, 4]], [1, 3])
    assert mask.dense(5, 6)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert_matches_dense(mask, Shape(q_len=6, kv_len=5))
    assert mf.equivalent(pickle.loads(pickle.dumps(mask)), mask, 7, 5)
    called = mf.mask(lambda b, h, q, kv: mask(b, h, q, kv) and kv > 1)
    assert called.dense(5, 6)[0, 0].sum() == 3
    assert bool(mask(0, 0, 3, 3)) and not mask(0, 0, 9, 3)
    assert mf.from_slices([[0, 2]], [[1, 3]]).dense(2, 3)[0, 0].tolist() == [[False, True, True]] * 2
    assert not mf.from_slices([], [], []).dense(2, 2).any()


def test_slices_may_have_rows_that_see_nothing():
    causal, inverse, both = (mf.from_slices([[0, 5]], [[0, 2]], [kind]).dense(5, 2)[0, 0] for kind in (1, 2, 3))
    assert causal.int().tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert inverse.int().tolist() == [[1, 1], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert not both.any()


@pytest.mark.parametrize(
    ("ranges", "error", "match"),
    [
        (([[0, 2]], [[0, 2]], [4]), mf.ArgumentError, "slice 0 has type 4, expected 0 full"),
        (([[0, 2]], [[0, 2]], [-1]), mf.ArgumentError, "slice 0 has type -1"),
        (([[0, 2]], [[0, 2]], [0, 0]), mf.ArgumentError, "types has 2 entries, expected 1"),
        (([[0, 2]], [[0, 2], [2, 3]], [0]), mf.ArgumentError, "k_ranges has 2 entries, expected 1"),
        (([[0, 2]], [[2, 1]], [0]), mf.ArgumentError, r"slice 0 has k_ranges \(2, 1\), expected 0 <= start <= stop"),
        (([[0, 2], [-1, 2]], [[0, 1]] * 2, [0, 0]), mf.ArgumentError, r"slice 1 has q_ranges \(-1, 2\)"),
        (([[0, 2**40]], [[0, 1]], [0]), mf.ArgumentError, "expected 0 <= start <= stop <= 2,147,483,647"),
        (([0, 2], [[0, 1]], [0]), mf.ArgumentError, r"q_ranges has shape \(2,\), expected \(slices, 2\)"),
        (([[0, 2, 3]], [[0, 1]], [0]), mf.ArgumentError, r"q_ranges has shape \(1, 3\)"),
        (([[0, 2]], [[0.0, 1]], [0]), mf.ArgumentTypeError, "k_ranges has dtype torch.float32"),
        ((torch.zeros(1, 2, device="meta").int(), [[0, 1]], [0]), mf.ArgumentError, "q_ranges has no data"),
        (([[0, 4], [3, 5]], [[0, 4], [3, 9]], [0, 0]), mf.ArgumentError, "slices 0 and 1 overlap at query 3, key 3"),
        (([[0, 4], [0, 4]], [[0, 4], [0, 4]], [1, 2]), mf.ArgumentError, "slices 0 and 1 overlap at query 0, key 0"),
    ],
)
def test_malformed_slices_are_refused(ranges, error, match):
    with pytest.raises(error, match=match):
        mf.from_slices(*ranges)


def test_slices_that_only_touch_are_disjoint():
    lower = mf.from_slices([[0, 4], [0, 4]], [[0, 4], [1, 5]], [1, 2])  # a triangle, and the one right above it
    assert mf.equivalent(lower, mf.from_slices([[0, 4]], [[0, 5]], [0]), 4, 5)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"q_len": 3}, "q_len is 3, expected at least 4 as in from_slices"),
        ({"kv_len": 3}, "kv_len is 3, expected at least 4"),
        ({"q_offset": 1}, "q_offset is 1, expected 0"),
    ],
)
def test_calls_that_are_too_short_are_refused(sizes, match):
    mask = mf.from_slices([[0, 4]], [[0, 4]], [1])
    with pytest.raises(mf.ArgumentError, match=match):
        mask.dense(**{"q_len": 4, "kv_len": 4, **sizes})
