"""Chunks, images and block diffusion: each equals its definition, pair by pair, and is in the forms that hold it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash import presets
from maskflash.testing import Shape, assert_matches_dense

LENGTH = st.integers(0, 30)


def pairs(rows, columns, visible):
    return torch.tensor([[bool(visible(i, j)) for j in range(columns)] for i in range(rows)]).view(rows, columns)


@given(st.integers(1, 40), LENGTH, LENGTH, st.integers(-9, 9))
def test_chunks_are_causal_and_alone(size, q_len, kv_len, offset):
    def visible(i, j):
        at = i + offset
        return at >= j and at // size == j // size

    found = presets.chunked(size).dense(q_len, kv_len, q_offset=offset)[0, 0]
    assert torch.equal(found, pairs(q_len, kv_len, visible))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4), LENGTH, LENGTH, st.randoms())
def test_images_see_all_of_themselves(gaps, q_len, kv_len, random):
    images, ids = [], []
    for gap, length in gaps:
        images.append((len(ids) + gap, length))
        ids += [-1] * gap + [len(images)] * length
    ids = torch.tensor(ids + [-1] * max(q_len, kv_len), dtype=torch.int64)
    random.shuffle(images)
    expected = pairs(q_len, kv_len, lambda i, j: j <= i or (ids[i] >= 0 and ids[i] == ids[j]))
    assert torch.equal(presets.image_blocks(images).dense(q_len, kv_len)[0, 0], expected)
    assert torch.equal(presets.image_blocks(ids=ids).dense(q_len, kv_len)[0, 0], expected)
    found = presets.image_blocks(ids=torch.stack((ids, torch.full_like(ids, -3)))).dense(q_len, kv_len, batch=2)
    assert torch.equal(found[0, 0], expected)
    assert torch.equal(found[1, 0], torch.ones_like(expected).tril())


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(2, 5)), max_size=3), st.integers(1, 9))
def test_a_window_cuts_images_or_it_does_not(gaps, window):
    """As Gemma 3's layers, or as vLLM's ranges."""
    images, after = [], 0
    for gap, length in gaps:
        images.append((after + gap, length))
        after += gap + length
    ranges = torch.tensor([(start, start + length - 1) for start, length in images], dtype=torch.int64).view(-1, 2)
    mask, theirs = presets.image_blocks(images), mf.from_prefix_ranges(ranges, window)
    same_image = mask & (lambda b, h, q, kv: mask(b, h, kv, q))
    assert mf.equivalent(theirs, mf.sliding_window(window - 1) | same_image, 24, 24)
    assert mf.implies(mask & mf.sliding_window(window - 1, None), theirs, 24, 24)


@given(st.integers(0, 15), st.integers(1, 20), st.integers(0, 4))
def test_noisy_blocks_see_themselves_and_the_clean_past(n, block, rest):
    def visible(i, j):
        if max(i, j) >= 2 * n:
            return False
        same, before = i % n // block == j % n // block, i % n // block > j % n // block
        return (same and (i < n) == (j < n)) or (before and j >= n)

    mask = presets.block_diffusion(n, block)
    assert torch.equal(mask.dense(2 * n + rest, 2 * n + rest)[0, 0], pairs(2 * n + rest, 2 * n + rest, visible))


@pytest.mark.parametrize(
    ("mask", "tokens"),
    [
        (presets.chunked(16), 60),
        (presets.image_blocks([(3, 20), (40, 9)]), 60),
        (presets.image_blocks([(3, 20), (40, 9)]) & mf.sliding_window(7, None), 60),
        (presets.block_diffusion(30, 8), 60),
        (presets.sliding_tiles((4, 6, 4), (2, 3, 2), (1, 1, 1)), 96),
    ],
    ids=str,
)
def test_vectors_and_slices_hold_them(mask, tokens):
    dense = mask.dense(tokens, tokens)
    assert torch.equal(mask.to_flashmask(tokens, tokens).dense(tokens, tokens), dense)
    slices = mask.to_slices(tokens, tokens)
    assert torch.equal(mf.from_slices(slices.q_ranges, slices.k_ranges, slices.types).dense(tokens, tokens), dense)
    assert_matches_dense(mask, Shape(1, 2, 1, tokens, tokens, 8, 8), block_size=16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: presets.chunked(0), "size is 0, expected at least 1"),
        (lambda: presets.image_blocks(), "got none, expected exactly one of images and ids"),
        (lambda: presets.image_blocks([(0, 2)], ids=[0]), "got images and ids, expected exactly one"),
        (lambda: presets.image_blocks([(0, 3), (2, 2)]), "image_blocks: images overlap at token 2"),
        (lambda: presets.image_blocks([3, 4]), r"images has shape \(2,\), expected a \(start, length\)"),
        (lambda: presets.block_diffusion(4, 0), "block is 0, expected at least 1"),
        (lambda: presets.block_diffusion(2**31, 4), "n is 2147483648, expected at most"),
    ],
)
def test_wrong_arguments_are_told(make, message):
    with pytest.raises(mf.ArgumentError, match=message):
        make()
