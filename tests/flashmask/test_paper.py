"""The paper's twelve masks: the same written twice at any length, with the paper's numbers, drawn from a seed."""

import pytest
import torch

import maskflash as mf
from maskflash.presets import PAPER, paper
from maskflash.testing import Shape, assert_matches_dense

COUNTS = {8192: range(3, 8), 32768: range(10, 15), 131072: range(11, 16)}
DOCUMENTS = ("causal_document", "document", "causal_blockwise", "prefix_lm_document")


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("seq_len", [0, 1, 2, 15, 16, 17, 100, 333])
def test_predicate_and_vectors_are_the_same(name, seq_len):
    for seed in range(3):
        mask = paper(name, seq_len, seed, batch=2, heads=3)
        seen = mask.predicate.dense(seq_len, seq_len, batch=2, heads=3)
        assert torch.equal(mask.vectors.dense(seq_len, seq_len, batch=2, heads=3), seen)


@pytest.mark.parametrize("name", PAPER)
def test_tiles_are_the_same_at_the_papers_length(name):
    mask = paper(name, 8192)
    by_predicate, by_vectors = (x.block_map(8192, 8192).kinds() for x in (mask.predicate, mask.vectors))
    assert torch.equal(by_predicate, by_vectors)


@pytest.mark.parametrize("name", PAPER)
def test_attention_is_right_either_way(name):
    mask = paper(name, 150, 5, heads=4)
    shape = Shape(heads=4, kv_heads=2, q_len=150, kv_len=150)
    for written in (mask.predicate, mask.vectors):
        assert_matches_dense(written, shape, block_size=32)


@pytest.mark.parametrize(("seq_len", "counts"), COUNTS.items())
def test_documents_are_as_many_as_the_papers_and_fill_the_sequence(seq_len, counts):
    found = [[paper(name, seq_len, seed).arguments["lengths"] for seed in range(30)] for name in DOCUMENTS]
    assert all(lengths == found[0] for lengths in found)  # the same seed, the same documents
    assert {len(lengths) for lengths in found[0]} == set(counts)
    assert all(sum(lengths) == seq_len and min(lengths) >= 1 for lengths in found[0])


def test_other_lengths_take_the_nearest_counts():
    for seq_len, near in (
        (1024, 8192),
        (16383, 8192),
        (16384, 32768),
        (65535, 32768),
        (65536, 131072),
        (2**20, 131072),
    ):
        assert {len(paper("document", seq_len, seed).arguments["lengths"]) for seed in range(30)} == set(COUNTS[near])
    assert paper("document", 2, 0).arguments["lengths"] == [1, 1]
    assert paper("document", 0, 0).arguments["lengths"] == []


def test_questions_have_two_to_six_answers():
    counts = set()
    for seed in range(30):
        documents = paper("share_question", 8192, seed).arguments["documents"]
        assert sum(question + sum(answers) for question, answers in documents) == 8192
        counts |= {len(answers) for _, answers in documents}
    assert {2, 3, 4, 5, 6} == {count for count in counts if count >= 2}


def test_prefixes_are_within_their_documents():
    given = paper("prefix_lm_document", 8192).arguments
    assert all(1 <= prefix <= length for length, prefix in zip(given["lengths"], given["prefixes"], strict=True))


def test_numbers_are_the_papers():
    assert paper("sliding_window", 8192).arguments == {"left": 511}  # 512 tokens, its own among them
    assert paper("global_sliding_window", 8192).arguments == {"n": 16, "window": 512}
    assert paper("prefix_lm_causal", 8192).arguments == {"n": 4096}
    assert paper("qk_sparse", 8192).arguments == {"segments": [(1024, 538), (2358, 1700)]}
    assert paper("qk_sparse", 16384).arguments == {"segments": [(2048, 1076), (4716, 3400)]}


def test_half_of_the_columns_is_evicted_in_the_second_half_of_the_rows():
    rows = paper("random_eviction", 1000, 7, batch=2, heads=3).arguments["evicted_at"]
    assert (rows.shape, rows.dtype) == ((2, 3, 1000), torch.int32)
    evicted = rows < 1001
    assert evicted.sum(2).tolist() == [[500] * 3] * 2
    assert (rows[evicted] >= 500).all()
    assert (rows > torch.arange(1000)).all()  # a column is seen by its own row
    assert len({tuple(row) for row in rows.flatten(0, 1).tolist()}) == 6


def test_seeds_are_reproducible_and_matter():
    for name in ("causal_document", "share_question", "prefix_lm_document", "random_eviction"):
        first, again, other = (paper(name, 512, seed).vectors.lts for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_facts_are_at_hand():
    mask = paper("causal", 64)
    assert (mask.name, mask.seq_len, mask.arguments) == ("causal", 64, {})
    with pytest.raises(AttributeError):
        mask.name = "full"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: paper("casual", 8),
            mf.ArgumentError,
            "paper: name is 'casual', expected one of full, causal, sliding_",
        ),
        (lambda: paper("full", -1), mf.ArgumentError, "paper: seq_len is -1, expected at least 0"),
        (lambda: paper("full", 8, 1.5), mf.ArgumentTypeError, "paper: seed is 1.5, expected an int"),
        (lambda: paper("full", 8, heads=None), mf.ArgumentTypeError, "paper: heads is None, expected an int"),
    ],
)
def test_wrong_arguments_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
