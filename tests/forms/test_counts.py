"""FlashMask's twelve masks and prefix trees by every form of rows: the same pairs, and as few parts as counted here."""

import pytest
import torch

import maskflash as mf
from tests.forms import counts

NAMES = counts.named(320)


@pytest.mark.parametrize("name", NAMES)
def test_each_form_is_the_mask(name):
    mask, tokens = NAMES[name]
    dense = mask.dense(tokens, tokens)
    rows, slices = mask.to_row_intervals(tokens, tokens), mask.to_slices(tokens, tokens)
    for back in (
        mf.from_row_intervals(rows.to_cudnn(), tokens),
        mf.from_slices(slices.q_ranges, slices.k_ranges, slices.types),
    ):
        assert torch.equal(back.dense(tokens, tokens), dense)


def test_the_table_counts_them():
    found = counts.counts(1280)
    slices = {name: row["slices"] for name, row in found.items()}
    documents = slices["causal_document"]
    assert slices == {
        **dict.fromkeys(("full", "causal"), 1),
        **{"sliding_window": 2, "global_sliding_window": 5, "prefix_lm_causal": 2, "qk_sparse": 5},
        **dict.fromkeys(("causal_document", "document", "causal_blockwise"), documents),
        "prefix_lm_document": 2 * documents,
        "prefix tree, 1 + 4 nodes": 5,
        "prefix tree, 1 + 3 + 9 + 27 nodes": 40,
        **{name: slices[name] for name in ("share_question", "random_eviction")},
    }
    assert slices["share_question"] < 8 * documents
    assert found["causal"] == {
        **{"slices": 1, "intervals": 1280, "endpoints of a row": 1, "full tiles": 45, "partial tiles": 10}
    }


def test_it_is_a_table():
    lines = counts.table(256).splitlines()
    assert lines[0] == "| mask | slices | intervals | endpoints of a row | full tiles | partial tiles |"
    assert lines[2] == "| full | 1 | 256 | 1 | 4 | 0 |"
    assert len(lines) == 16 and {line.count("|") for line in lines} == {7}
