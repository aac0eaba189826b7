"""Who decided a tile is told tile by tile, and adds up to what the analysis counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.classify import classify
from maskflash.testing import masks
from maskflash.visualize.deciders import decide

MAX = 40
HOLES = mf.mask(lambda b, h, q, kv: (q * 37 + kv * 11) % 1009 != 5)  # samples miss most of them


def problem(mask, q_len, kv_len, block):
    return mask.at(q_len, kv_len, batch=2, heads=2).tiled((block, block))


def evaluated(decided):
    """(B, H, nQ, nKV) bool, the tiles that were evaluated."""
    shape = decided.seen.block_map.shape
    if decided.evaluated is None:
        return torch.zeros(shape, dtype=torch.bool)
    found = torch.zeros(len(decided.evaluated.offsets) - 1, shape[3], dtype=torch.bool)
    found[decided.evaluated.tiles(full=True)] = True
    return found.view(shape)


@settings(max_examples=60)
@given(masks(MAX), st.integers(0, MAX), st.integers(0, MAX), st.integers(1, 12))
def test_deciders_add_up_to_what_the_analysis_counted(mask, q_len, kv_len, block):
    decided = decide(problem(mask, q_len, kv_len, block))
    assert sum(decided.seen.decided.values()) == sum(decided.seen.block_map.counts.values())
    if any(decided.seen.decided[means] for means in ("pairs", "formula", "intervals", "groups", "columns", "parts")):
        assert decided.evaluated is None
        return
    kinds, looked_at = decided.seen.block_map.kinds(), evaluated(decided)
    assert decided.seen.decided["elements"] == looked_at.sum()
    assert decided.seen.decided["samples"] == ((kinds == 1) & ~looked_at).sum()
    assert decided.seen.decided["bounds"] == ((kinds != 1) & ~looked_at).sum()


def test_the_tiles_evaluated_are_those_that_samples_left_open():
    decided = decide(problem(HOLES, 256, 320, 32))
    looked_at = evaluated(decided)[0, 0]
    assert 0 < looked_at.sum() < looked_at.numel()
    pairs = HOLES.dense(256, 320)[0, 0]
    for i, j in looked_at.nonzero().tolist():
        tile = pairs[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
        assert len({bool(tile[r, c]) for r in (0, -1) for c in (0, -1)}) == 1  # corners are among the samples
    assert (decided.seen.block_map.kinds()[0, 0][~looked_at] == 1).all()  # a modulus has no bounds here


@pytest.mark.parametrize("mask", [mf.causal(), HOLES])
def test_the_analysis_is_the_one_that_runs(mask):
    asked = problem(mask, 256, 256, 32)
    found, expected = decide(asked).seen, classify(asked)
    assert torch.equal(found.block_map.kinds(), expected.block_map.kinds())
    assert found.decided == expected.decided
