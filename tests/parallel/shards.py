"""Shards of any kind, for Hypothesis."""

from itertools import groupby

from hypothesis import strategies as st


@st.composite
def dealt(draw, length, tile, ranks):
    """The rank of each line, dealt at random, and the shards of ranks; some are empty."""
    lines = -(-length // tile)
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=lines, max_size=lines))
    found = [[] for _ in range(ranks)]
    for rank, run in groupby(range(lines), owner.__getitem__):
        held = list(run)
        found[rank].append((held[0] * tile, min((held[-1] + 1) * tile, length)))
    return owner, tuple(map(tuple, found))
