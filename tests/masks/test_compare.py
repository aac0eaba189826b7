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


# How two masks differ


@settings(max_examples=60)
@given(masks(), masks(), st.integers(0, 20), st.integers(0, 20))
def test_what_differs_is_counted_and_drawn(x, y, q_len, kv_len):
    sizes = {"batch": 2, "heads": 3}
    first, second = (mask.dense(q_len, kv_len, **sizes) for mask in (x, y))
    found = mf.compare(x, y, q_len, kv_len, **sizes)
    assert bool(found) == torch.equal(first, second) == (found.picture == "")
    for only, differ in ((found.only_a, first & ~second), (found.only_b, second & ~first)):
        assert (0 if only is None else only.pairs) == int(differ.sum())
        assert only is None or differ[only.first]
    for drawn in found.picture.split("\n\n") if found.picture else ():
        unit, rows, columns, cells = read(drawn)
        kinds = first[unit] * 1 + second[unit] * 2
        assert cells == [["·ab■"[kind] for kind in row] for row in kinds[rows][:, columns].tolist()]
        assert max(q_len, kv_len) > 16 or len(rows) * len(columns) == q_len * kv_len


def read(drawn):
    """A picture's batch row and head, rows, columns and marks."""
    lines = drawn.splitlines()
    title, header, (top, *rest) = (lines[:1], lines[1], lines[2:]) if "head" in lines[0] else ([], lines[0], lines[1:])
    unit = tuple(int(word.split()[-1]) for word in title[0].split(", ")) if title else (0, 0)
    lines = [line.removeprefix("query").split() for line in (top, *rest)]
    start = int(header.split()[1])
    return unit, [int(line[0]) for line in lines], range(start, start + len(lines[0]) - 1), [line[1:] for line in lines]


def test_a_comparison_is_said_in_a_sentence():
    window = mf.sliding_window(2)
    assert str(mf.compare(window, mf.from_arguments("transformers", sliding_window=3), 9, 9)).endswith(
        "9 queries x 9 keys: a and b show the same pairs"
    )
    said = str(mf.compare(window, mf.sliding_window(1, 1), 2000, 2000))
    assert "2,000 queries x 2,000 keys: each shows pairs that the other hides" in said
    assert "only in a: 1,998 pairs, first query 2, key 0" in said
    assert "only in b: 1,999 pairs, first query 0, key 1" in said
    by_head = mf.compare(mf.causal(), lambda b, h, q, kv: q >= kv and h < 2, 1000, 1000, heads=4)
    assert by_head.only_a == (2 * 500_500, (0, 2, 0, 0))
    assert "first batch row 0, head 2, query 0, key 0" in str(by_head)
    assert by_head.picture.startswith("batch row 0, head 2\n")
    assert "not the same" in by_head._repr_html_()


def test_a_comparison_costs_the_boundary():
    n = 1_000_000
    found = mf.compare(mf.sliding_window(4096), mf.from_arguments("vllm", sliding_window=4096), n, n)
    assert found.only_a == (n - 4096, (0, 0, 4096, 0))
    assert found.only_b is None
