"""Questions about two masks: answered as brute force would, with a pair that proves a no."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

LENGTH = st.integers(0, 64)


@settings(max_examples=200)
@given(masks(), masks(), LENGTH, LENGTH, st.booleans())
def test_answers_are_those_of_all_pairs(x, y, q_len, kv_len, nested):
    y = x & y if nested else y
    sizes = {"batch": 2, "heads": 2}
    first, second = (mask.dense(q_len, kv_len, **sizes) for mask in (x, y))
    same = mf.equivalent(x, y, q_len, kv_len, **sizes)
    within = mf.implies(x, y, q_len, kv_len, **sizes)
    assert bool(same) == torch.equal(first, second) and same.holds == (same.counterexample is None)
    assert bool(within) == bool((first <= second).all())
    if not same:
        assert first[same.counterexample] != second[same.counterexample]
    if not within:
        assert first[within.counterexample] and not second[within.counterexample]
    assert mf.equivalent(x, ~~x, q_len, kv_len, **sizes) and mf.implies(x & y, x, q_len, kv_len, **sizes)


def test_a_single_pair_among_many_is_found():
    n = 20_000
    mask = mf.causal() & mf.document([7_000, 13_000])
    vectors = mask.to_flashmask(n, n)
    assert mf.equivalent(mask, vectors, n, n)
    vectors.lts[0, 0, 123] -= 1
    assert mf.equivalent(mask, vectors, n, n).counterexample == (0, 0, 6_999, 123)
    assert mf.implies(vectors, mask, n, n)
    assert not mf.implies(mask, vectors, n, n)


def test_arguments_reach_both_masks():
    x = mf.mask(lambda b, h, q, kv, *, doc: doc[q] == doc[kv])
    y = mf.mask(lambda b, h, q, kv, *, doc: not (doc[q] < doc[kv] or doc[q] > doc[kv]))
    assert mf.equivalent(x, y, 40, 40, doc=torch.arange(40) // 9)
