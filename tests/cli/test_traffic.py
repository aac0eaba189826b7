"""Predicted memory traffic: the count of its own loops, with the limits that FlashAttention's theorem has."""

import pytest

import maskflash as mf
from maskflash.cli.traffic import predict
from maskflash.errors import ArgumentError


def counted(block_map, width, elements):
    """Elements moved, block of queries by block of queries; a block has as many rows as fast memory holds."""
    rows = elements // (2 * width)
    moved = 0
    kinds = block_map.kinds()[0, 0]
    for top in range(0, block_map.q_len, rows):
        moved += rows * width  # queries and outputs
        tiles = kinds[top // block_map.block_size[0]]
        moved += int((tiles > 0).sum()) * block_map.block_size[1] * width  # keys and values of the tiles visited
    return moved


@pytest.mark.parametrize("mask", [mf.full(), mf.causal(), mf.sliding_window(100), mf.document([300, 1748])])
def test_the_formula_counts_what_the_loops_move(mask):
    # Tiles as tall as a block of queries, so that both count the same.
    block_map, width, elements = mask.block_map(2048, 2048, block_size=(32, 64)), 128, 32 * 2 * 128
    found = predict(block_map, itemsize=2, fast_bytes=2 * elements)
    assert found.block_sparse == 2 * counted(block_map, width, elements)
    assert found.fused == 2 * counted(mf.full().block_map(2048, 2048, block_size=(32, 64)), width, elements)


def test_a_full_map_moves_what_dense_attention_does():
    found = predict(mf.full().block_map(4096, 4096))
    assert found.block_sparse == found.fused
    assert found.visited == 1


def test_dense_attention_grows_as_the_theorem_says():
    maps = {n: mf.causal().block_map(n, n) for n in (1 << 16, 1 << 17)}
    growth = predict(maps[1 << 17]).fused / predict(maps[1 << 16]).fused
    assert growth == pytest.approx(4, rel=0.01)  # N²
    wider = predict(maps[1 << 17], head_dim=128).fused / predict(maps[1 << 17], head_dim=64).fused
    assert wider == pytest.approx(4, rel=0.01)  # d²
    larger = predict(maps[1 << 17], fast_bytes=1 << 18).fused / predict(maps[1 << 17], fast_bytes=1 << 17).fused
    assert larger == pytest.approx(0.5, rel=0.01)  # 1/M


def test_stored_scores_are_written_and_read_twice():
    found = predict(mf.causal().block_map(100, 300), head_dim=8, v_head_dim=4, itemsize=4)
    assert found.stored == 4 * (100 * 12 + 300 * 12 + 4 * 100 * 300)


def test_what_fits_fast_memory_moves_once():
    found = predict(mf.full().block_map(64, 64), head_dim=16, itemsize=4, fast_bytes=1 << 20)
    assert found.fused == 4 * 4 * 64 * 16


@pytest.mark.parametrize("given", [{"head_dim": 0}, {"itemsize": 0}, {"fast_bytes": 0}, {"v_head_dim": 0}])
def test_sizes_are_at_least_one(given):
    with pytest.raises(ArgumentError, match=f"predict: {next(iter(given))} is 0, expected at least 1"):
        predict(mf.causal().block_map(8, 8), **given)
