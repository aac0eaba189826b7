"""Needs by tiles: what lines need together, and which tiles they touch, key by key."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maskflash.parallel.ranges import runs_of
from maskflash.parallel.tiled import by_tiles


@st.composite
def needs(draw):
    """Which keys lines of a tile's rows need: (lines, keys) bool; some lines have whole tiles, some have none."""
    tile = draw(st.sampled_from([1, 3, 63, 64, 65, 128, 200]))
    lines = draw(st.integers(1, 6))
    length = lines * tile - draw(st.integers(0, tile - 1))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    dense = random.random((lines, length)) < random.choice([0.02, 0.5, 0.98], (lines, 1))
    kind = np.repeat(random.integers(0, 3, (lines, lines)), tile, axis=1)[:, :length]
    return tile, length, np.where(kind == 0, dense, kind == 1)


@given(needs(), st.integers(1, 4), st.data())
def test_keys_of_lines_together_are_counted(given, groups, data):
    tile, length, dense = given
    owner = np.array(data.draw(st.lists(st.integers(0, groups - 1), min_size=len(dense), max_size=len(dense))))
    found = by_tiles(tile, length, runs_of(dense)).counted(owner, groups)
    for group in range(groups):
        together = dense[owner == group].any(0)
        assert found[group].tolist() == [together[at : at + tile].sum() for at in range(0, length, tile)]


@given(needs(), st.integers(1, 3), st.integers(1, 3))
def test_tiles_that_chunks_touch_are_seen(given, rows, columns):
    tile, length, dense = given
    seen = by_tiles(tile, length, runs_of(dense)).seen(rows, columns)
    wide = tile * columns
    expected = [
        [dense[row : row + rows, at : at + wide].any() for at in range(0, length, wide)]
        for row in range(0, len(dense), rows)
    ]
    assert seen.tolist() == expected
