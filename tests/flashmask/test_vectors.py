"""The paper's masks written by hand as vectors: each equals the preset of the same arguments, at any length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash import presets
from tests.flashmask import vectors

NUMBER = st.integers(0, 40)
SIZE = st.integers(0, 12)
LENGTHS = st.lists(SIZE, max_size=6)
PREFIXED = st.lists(SIZE.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=5)
QUESTIONS = st.lists(st.tuples(SIZE, st.lists(SIZE, max_size=4)), max_size=4)
GAPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4)
EVICTIONS = st.lists(st.integers(-3, 50), max_size=40)


def segments(gaps):
    found, start = [], 0
    for gap, length in gaps:
        found.append((start + gap, length))
        start += gap + length
    return found


TWICE = {  # by name: arguments, as vectors, as a preset
    "full": (st.tuples(), vectors.full, mf.full),
    "causal": (st.tuples(), vectors.causal, mf.causal),
    "sliding_window": (st.tuples(NUMBER), vectors.sliding_window, mf.sliding_window),
    "causal_document": (st.tuples(LENGTHS), vectors.causal_document, lambda x: mf.causal_document(lengths=x)),
    "document": (st.tuples(LENGTHS), vectors.document, lambda x: mf.document(lengths=x)),
    "share_question": (st.tuples(QUESTIONS), vectors.share_question, presets.share_question),
    "global_sliding_window": (
        st.tuples(NUMBER, NUMBER),
        vectors.global_sliding_window,
        lambda n, window: mf.global_tokens(n) | mf.sliding_window(window, window),
    ),
    "causal_blockwise": (st.tuples(LENGTHS), vectors.causal_blockwise, presets.causal_blockwise),
    "prefix_lm_document": (
        PREFIXED.map(lambda pairs: ([n for n, _ in pairs], [n for _, n in pairs])),
        vectors.prefix_lm_document,
        presets.prefix_lm_document,
    ),
    "prefix_lm_causal": (st.tuples(NUMBER), vectors.prefix_lm_causal, mf.prefix_lm),
    "qk_sparse": (st.tuples(GAPS.map(segments)), vectors.qk_sparse, presets.qk_sparse),
    "random_eviction": (st.tuples(EVICTIONS), vectors.random_eviction, presets.random_eviction),
}


def tokens(name, first=None, *_):
    """What documents add up to."""
    if name == "share_question":
        return sum(question + sum(answers) for question, answers in first)
    return sum(first) if name in ("causal_document", "document", "causal_blockwise", "prefix_lm_document") else 0


@pytest.mark.parametrize("name", presets.PAPER)
@given(rest=NUMBER, data=st.data())
def test_vectors_are_the_preset(name, rest, data):
    arguments, as_vectors, as_preset = TWICE[name]
    given_arguments = data.draw(arguments)
    seq_len = tokens(name, *given_arguments) + rest
    found = as_vectors(*given_arguments, seq_len)
    preset = as_preset(*given_arguments)
    dense = found.dense(seq_len, seq_len)
    assert torch.equal(dense, preset.dense(seq_len, seq_len))
    assert torch.equal(dense, preset.to_flashmask(seq_len, seq_len).dense(seq_len, seq_len))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("causal_document", ([4, 1, 3],)),
        ("document", ([4, 1, 3],)),
        ("share_question", ([(1, [2, 1]), (2, [1, 1])],)),
        ("causal_blockwise", ([4, 1, 3],)),
        ("prefix_lm_document", ([4, 1, 3], [2, 0, 3])),
        ("qk_sparse", ([(1, 3), (4, 4)],)),
        ("random_eviction", ([3, 5, 9, 4, 8, 7, 9, 8],)),
    ],
)
@pytest.mark.parametrize("seq_len", range(11))
def test_any_number_of_tokens_may_be_left_and_none_of_a_document_missing(name, arguments, seq_len):
    _, as_vectors, as_preset = TWICE[name]
    total = tokens(name, *arguments)
    if total > seq_len:
        with pytest.raises(mf.ArgumentError, match=f"add up to {total} tokens, expected at most what the call has"):
            as_preset(*arguments).to_flashmask(seq_len, seq_len)
        return
    found = as_vectors(*arguments, seq_len).dense(seq_len, seq_len)
    assert torch.equal(found, as_preset(*arguments).dense(seq_len, seq_len))


def test_they_are_the_papers():
    """The vectors themselves, where the paper's table leaves no choice."""
    found = vectors.causal_blockwise([2, 1, 3], 6)
    assert (found.lts[0, 0].tolist(), found.lte[0, 0].tolist()) == ([2, 2, 3, 6, 6, 6], [3] * 6)
    assert found.startend_row_indices.shape == (1, 1, 6, 2)
    found = vectors.prefix_lm_document([3, 2], [1, 2], 5)
    assert (found.lts[0, 0].tolist(), found.ute[0, 0].tolist()) == ([3, 3, 3, 5, 5], [0, 1, 2, 3, 3])
    shapes = {name: presets.paper(name, 64).vectors.startend_row_indices.shape[3] for name in presets.PAPER}
    four = {"global_sliding_window"}
    two = {"full", "document", "prefix_lm_document", "prefix_lm_causal", "causal_blockwise", "qk_sparse"}
    assert shapes == {name: 4 if name in four else 2 if name in two else 1 for name in presets.PAPER}


@given(st.integers(0, 20), st.sampled_from([torch.int32, torch.int64]))
def test_evictions_of_each_row_and_head(seq_len, dtype):
    rows = torch.randint(-3, 25, (2, 3, 13), dtype=dtype)
    found = vectors.random_eviction(rows, seq_len).dense(seq_len, seq_len, batch=2, heads=3)
    assert torch.equal(found, presets.random_eviction(rows).dense(seq_len, seq_len, batch=2, heads=3))
