"""Neighbourhoods on grids: each query's keys are found by hand, axis by axis, and sliding tiles are strides."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash import presets
from maskflash.testing import Shape, assert_matches_dense


def seen_along(size, kernel, stride, dilation, causal):
    """The coordinates that each coordinate of an axis sees: a list of the points it is left with, cut by hand."""
    seen = []
    for i in range(size):
        line = [j for j in range(size) if j % dilation == i % dilation]
        at = line.index(i)
        group = [k for k in range(len(line)) if k // stride == at // stride]
        if causal:
            led = group[-1]  # the last one, and what would be its keys, up to the query
            seen.append([line[k] for k in range(len(line)) if led - kernel < k <= at])
            continue
        first = group[0] + stride // 2  # the middle one, or the last there is
        led = min(first, len(line) - 1)
        window = range(led - kernel // 2, led - kernel // 2 + kernel)
        while window[0] < 0:
            window = range(window[0] + 1, window[-1] + 2)
        while window[-1] >= len(line):
            window = range(window[0] - 1, window[-1])
        seen.append([line[k] for k in window])
    return seen


@st.composite
def grids(draw):
    """Arguments for one to three axes."""
    axes = []
    for most in draw(st.sampled_from([(30,), (6, 7), (3, 5, 4)])):
        size = draw(st.integers(1, most))
        dilation = draw(st.integers(1, size))
        kernel = draw(st.integers(1, size // dilation))
        axes.append((size, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    return tuple(zip(*axes, strict=True))


@settings(max_examples=60)
@given(grids(), st.integers(0, 3))
def test_a_query_sees_what_each_axis_lets_it(given, rest):
    shape, tokens = given[0], math.prod(given[0])
    along = [seen_along(*each) for each in zip(*given, strict=True)]
    points = list(itertools.product(*map(range, shape)))
    expected = torch.zeros(tokens + rest, tokens + rest, dtype=torch.bool)
    for q, point in enumerate(points):
        for kv, other in enumerate(points):
            expected[q, kv] = all(j in along[axis][i] for axis, (i, j) in enumerate(zip(point, other, strict=True)))
    found = presets.neighborhood(*given).dense(tokens + rest, tokens + rest)
    assert torch.equal(found[0, 0], expected)


def test_one_number_is_for_all_axes():
    mask = presets.neighborhood((4, 6, 5), 3, is_causal=True)
    assert mf.equivalent(mask, presets.neighborhood((4, 6, 5), (3, 3, 3), (1,) * 3, (1,) * 3, (True,) * 3), 120, 120)
    assert mf.equivalent(presets.neighborhood(9, 3), presets.neighborhood((9,), (3,)), 9, 9)
    assert mf.equivalent(presets.neighborhood((5, 6), (3, 4)), mf.natten(5, 6, 3, 4), 30, 30)
    assert str(mask) == "neighborhood((4, 6, 5), kernel_size=(3, 3, 3), is_causal=(True, True, True))"


@st.composite
def tiles(draw):
    axes = []
    for most in draw(st.sampled_from([(6,), (4, 3), (3, 3, 2)])):
        count, side = draw(st.integers(1, most)), draw(st.integers(1, 3))
        axes.append((count * side, side, draw(st.integers(0, (count - 1) // 2)) * 2 + 1))
    return tuple(zip(*axes, strict=True))


@settings(max_examples=60)
@given(tiles(), st.integers(0, 3))
def test_sliding_tiles_are_strides_in_another_order(given, rest):
    shape, cube, kernel = given
    tokens = math.prod(shape)
    order = torch.arange(tokens).view([n for size, side in zip(shape, cube, strict=True) for n in (size // side, side)])
    order = order.permute(*range(0, 2 * len(shape), 2), *range(1, 2 * len(shape), 2)).flatten()
    wide = tuple(k * side for k, side in zip(kernel, cube, strict=True))
    rows = presets.neighborhood(shape, wide, stride=cube).dense(tokens, tokens)[0, 0]
    found = presets.sliding_tiles(*given).dense(tokens + rest, tokens + rest)[0, 0]
    assert torch.equal(found[:tokens, :tokens], rows[order][:, order])
    assert not found[tokens:].any()
    assert not found[:, tokens:].any()


def test_cubes_as_large_as_tiles_make_them_full_or_skip():
    counts = presets.sliding_tiles((12, 16, 16), (2, 8, 8), (3, 1, 1)).block_map(3072, 3072).counts
    assert counts["partial"] == 0
    assert counts["full"] == 24 * 3


@pytest.mark.parametrize(
    "mask",
    [
        presets.neighborhood((3, 5, 4), 3),
        presets.neighborhood((3, 5, 4), (2, 2, 3), dilation=(1, 2, 1), is_causal=(True, False, False)),
        presets.sliding_tiles((4, 6), (2, 3), (1, 1)),
    ],
    ids=str,
)
def test_attention_on_a_grid_is_dense_attention(mask):
    assert_matches_dense(mask, Shape(1, 2, 1, 60, 60, 8, 8), block_size=16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: presets.neighborhood((4, 4, 4, 4), 3), "expected sizes of one to three axes"),
        (lambda: presets.neighborhood((4, 4), (3, 3, 3)), r"kernel_size is \(3, 3, 3\), expected 2 of them, one for"),
        (lambda: presets.neighborhood((4, 4), 3, is_causal=(True,)), r"is_causal is \(True,\), expected 2 of them"),
        (lambda: presets.neighborhood((4, 4), 3, dilation=(1, 2)), "an axis of 4 has kernel_size 3, stride 1 and dil"),
        (lambda: presets.neighborhood(9, 3, stride=4), "stride <= kernel_size"),
        (lambda: presets.neighborhood((2**20, 2**20), 3), "expected at most"),
        (lambda: presets.sliding_tiles((4, 6), (2, 4), 1), r"shape is \(4, 6\), expected multiples of cube, \(2, 4\)"),
        (lambda: presets.sliding_tiles((4, 6), (2, 3), 3), r"kernel_size is \(3, 3\), expected at most the cubes of"),
    ],
)
def test_wrong_arguments_are_told(make, message):
    with pytest.raises(mf.ArgumentError, match=message):
        make()


def test_causal_axes_are_true_or_false():
    with pytest.raises(mf.ArgumentTypeError, match="is_causal is 1, expected True or False"):
        presets.neighborhood(9, 3, is_causal=1)
