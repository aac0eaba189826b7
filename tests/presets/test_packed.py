"""Presets of packed texts: each equals a mask painted in rectangles, at lengths beyond its own and short of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash import presets
from maskflash.testing import Shape, assert_matches_dense

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


PAIRS = st.lists(st.tuples(SIZE, SIZE), max_size=5)
SIDE = st.one_of(st.none(), st.integers(0, 6))


def varlen(pairs, align, left, right, q_len, kv_len):
    """Each document's window, aligned with its own keys, as flash-attention's reference paints it."""
    painted, row, column = torch.zeros(q_len, kv_len, dtype=torch.bool), 0, 0
    for queries, keys in pairs:
        at = torch.arange(queries)[:, None] + (keys - queries if align == "bottom_right" else 0)
        key = torch.arange(keys)
        seen = torch.ones(queries, keys, dtype=torch.bool)
        seen &= True if left is None else key >= at - left
        seen &= True if right is None else key <= at + right
        painted[row : row + queries, column : column + keys] = seen
        row, column = row + queries, column + keys
    return painted


@given(PAIRS, st.sampled_from(["bottom_right", "top_left"]), SIDE, SIDE, LENGTH, LENGTH)
def test_each_document_is_causal_or_windowed_along_its_own_diagonal(pairs, align, left, right, rest, kv_rest):
    rows, columns = ([pair[side] for pair in pairs] for side in (0, 1))
    q_len, kv_len = sum(rows) + rest, sum(columns) + kv_rest
    expected = varlen(pairs, align, left, right, q_len, kv_len)
    starts, kv_starts = ([0, *torch.tensor(row).cumsum(0).tolist()] for row in (rows, columns))
    window = {"align": align, "left": left, "right": right}
    by_lengths = mf.causal_document(lengths=rows, kv_lengths=columns, **window)
    by_starts = mf.causal_document(cu_seqlens=torch.tensor(starts).int(), kv_cu_seqlens=kv_starts, **window)
    assert torch.equal(by_lengths.dense(q_len, kv_len)[0, 0], expected)
    assert torch.equal(by_starts.dense(q_len, kv_len)[0, 0], expected)
    other = [*reversed(pairs)]
    both = mf.causal_document(
        lengths=[rows, [pair[0] for pair in other]], kv_lengths=[columns, [pair[1] for pair in other]], **window
    ).dense(q_len, kv_len, batch=2)
    assert torch.equal(both[0, 0], expected)
    assert torch.equal(both[1, 0], varlen(other, align, left, right, q_len, kv_len))
    part = by_lengths.dense(q_len, kv_len, q_offset=3)[0, 0]
    assert torch.equal(part[: max(q_len - 3, 0)], expected[3:]) and not part[max(q_len - 3, 0) :].any()


@given(st.lists(SIZE, max_size=5), LENGTH)
def test_documents_of_one_length_are_causal_as_ever(lengths, rest):
    size = sum(lengths) + rest
    assert mf.equivalent(mf.causal_document(lengths=lengths), mf.causal() & mf.document(lengths=lengths), size, size)


def test_rows_see_what_flash_attention_shows_them():
    mask = mf.causal_document([2, 3], kv_lengths=[5, 4])
    assert [mask.row(q, 9) for q in range(5)] == [[(0, 4)], [(0, 5)], [(5, 7)], [(5, 8)], [(5, 9)]]


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_they_are_analysed_by_the_ends_of_what_rows_see_and_attend_as_dense_attention(align):
    mask = mf.causal_document([30, 50, 7, 0], kv_lengths=[40, 20, 0, 9], align=align)
    decided = mf.compile(mask, block_size=8).explain(87, 69).to_dict()["decided"]
    if align == "bottom_right":  # else keys are left out between documents, and rows of a tile see them apart
        assert [how for how, tiles in decided.items() if tiles] == ["intervals"]
    assert_matches_dense(mask, Shape(q_len=87, kv_len=69), block_size=8)
    long = mf.causal_document([600] * 60, kv_lengths=[700, 500] * 30, align=align)
    decided = mf.compile(long).explain(36_000, 36_000).to_dict()["decided"]
    assert not decided["elements"] and not decided["samples"]


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
        (lambda: mf.causal_document(), mf.ArgumentError, "got none, expected exactly one of lengths and cu_seqlens"),
        (lambda: mf.causal_document([3], align="left"), mf.ArgumentError, "align is 'left', expected \"bottom_right\""),
        (lambda: mf.causal_document([3], left=-1), mf.ArgumentError, "left is -1, expected at least 0; pass None for"),
        (lambda: mf.causal_document([3, 4], kv_lengths=[3]), mf.ArgumentError, "they must pair up"),
        (
            lambda: mf.causal_document([3], kv_lengths=[3], kv_cu_seqlens=[0, 3]),
            mf.ArgumentError,
            "got kv_lengths and kv_cu_seqlens, expected exactly one of kv_lengths and kv_cu_seqlens",
        ),
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
