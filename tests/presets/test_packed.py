"""Presets of packed texts: each equals a mask painted in rectangles, at lengths beyond its own and short of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash import presets

LENGTH = st.integers(0, 30)
SIZE = st.integers(0, 9)


def canvas(total):
    """Where packed texts are painted: nothing visible yet, and room for tokens after the total."""
    return torch.zeros(total + 30, total + 30, dtype=torch.bool)


def same(mask, painted, rest, kv_rest):
    """Whether a mask is what was painted, at lengths so much longer than its own; one of them may be shorter too."""
    total = len(painted) - 30
    sizes = [(total + rest, total + kv_rest), (total + rest, min(kv_rest, total)), (min(rest, total), total + kv_rest)]
    return all(torch.equal(mask.dense(*size)[0, 0], painted[: size[0], : size[1]]) for size in sizes)


@given(st.lists(st.tuples(SIZE, st.lists(SIZE, max_size=4)), max_size=4), LENGTH, LENGTH)
def test_answers_share_their_question(documents, rest, kv_rest):
    painted, start = canvas(sum(question + sum(answers) for question, answers in documents)), 0
    for question, answers in documents:
        stop = start + question + sum(answers)
        painted[start:stop, start : start + question] = True
        start += question
        for answer in answers:
            painted[start : start + answer, start : start + answer] = True
            start += answer
    assert same(presets.share_question(documents), painted.tril(), rest, kv_rest)


@given(st.lists(SIZE, max_size=5), LENGTH, LENGTH)
def test_the_last_block_sees_all(lengths, rest, kv_rest):
    painted, start = canvas(sum(lengths)), 0
    for length in lengths:
        painted[start : start + length, start : start + length] = True
        start += length
    last = lengths[-1] if lengths else 0
    painted[start - last : start, :start] = True
    for given_lengths in (lengths, torch.tensor(lengths, dtype=torch.int32)):
        assert same(presets.causal_blockwise(given_lengths), painted.tril(), rest, kv_rest)


@given(
    st.lists(st.integers(0, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=5), LENGTH, LENGTH
)
def test_documents_see_their_prefixes(documents, rest, kv_rest):
    lengths, prefixes = ([pair[side] for pair in documents] for side in (0, 1))
    painted, start = canvas(sum(lengths)), 0
    for length, prefix in documents:
        stop = start + length
        painted[start:stop, start:stop] = torch.ones(length, length, dtype=torch.bool).tril()
        painted[start:stop, start : start + prefix] = True
        start = stop
    assert same(presets.prefix_lm_document(lengths, prefixes), painted, rest, kv_rest)


MASKS = [
    presets.share_question([(3, [2, 4]), (1, [1])]),
    presets.causal_blockwise([4, 3, 5]),
    presets.prefix_lm_document([7, 5], [3, 5]),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("offset", [-20, -5, 3, 20])
def test_rows_may_be_shifted(mask, offset):
    whole = torch.zeros(60, 20, dtype=torch.bool)  # row 20 is row 0 of the mask
    whole[20:] = mask.dense(40, 20)[0, 0]
    assert torch.equal(mask.dense(20, 20, q_offset=offset)[0, 0], whole[20 + offset : 40 + offset])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: presets.share_question(5),
            mf.ArgumentTypeError,
            "share_question: documents is a int, expected a list",
        ),
        (
            lambda: presets.share_question([(1, [2]), 5]),
            mf.ArgumentTypeError,
            r"share_question: documents\[1\] is 5, expected \(question length, \[answer lengths\]\)",
        ),
        (
            lambda: presets.share_question([(1, [2], 3)]),
            mf.ArgumentTypeError,
            r"documents\[0\] is \(1, \[2\], 3\), expected \(question",
        ),
        (
            lambda: presets.share_question([(-1, [2])]),
            mf.ArgumentError,
            r"share_question: the question of documents\[0\] is -1, expected at least 0",
        ),
        (
            lambda: presets.share_question([(1, [2, -3])]),
            mf.ArgumentError,
            r"share_question: the answers of documents\[0\] holds -3, expected lengths of at least 0",
        ),
        (lambda: presets.share_question([(1, 2)]), mf.ArgumentError, r"answers of documents\[0\] has shape \(\)"),
        (lambda: presets.causal_blockwise([1, -1]), mf.ArgumentError, "causal_blockwise: lengths holds -1, expected"),
        (lambda: presets.causal_blockwise([[1], [2]]), mf.ArgumentError, r"lengths has shape \(2, 1\), expected a 1-d"),
        (lambda: presets.causal_blockwise([1.5]), mf.ArgumentTypeError, "lengths has dtype torch.float32, expected an"),
        (
            lambda: presets.prefix_lm_document([1, 2], [1]),
            mf.ArgumentError,
            "prefix_lm_document: 2 lengths and 1 prefixes; they must pair up",
        ),
        (
            lambda: presets.prefix_lm_document([1, 2], [1, 3]),
            mf.ArgumentError,
            r"prefix_lm_document: prefixes\[1\] is 3, expected at most its document's 2 tokens",
        ),
        (lambda: presets.prefix_lm_document([1], [-1]), mf.ArgumentError, "prefixes holds -1, expected lengths of at"),
    ],
)
def test_wrong_arguments_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
