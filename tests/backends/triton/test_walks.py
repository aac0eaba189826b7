"""Walks hold exactly the tiles of a block map, full and partial apart, and an order takes the longest lines first."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.backends.triton.walks import split_runs


@st.composite
def maps(draw):
    """Block maps with ragged and whole last tiles."""
    n_q, n_kv = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), n_q, n_kv)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    kinds = torch.randint(0, 3, shape, generator=generator).to(torch.int8)
    if draw(st.booleans()):  # long runs
        kinds = kinds[..., torch.arange(n_kv) // 3]
    lengths = (n * 16 - draw(st.sampled_from([0, 0, 1, 15])) for n in (n_q, n_kv))
    return BlockMap.from_kinds(kinds, *lengths, (16, 16))


def both(block_map):
    """(walks, kinds by line, tiles of a line, whether its last is ragged) by rows and by columns."""
    _, _, n_q, n_kv = block_map.shape
    kinds, (q_ragged, kv_ragged) = block_map.kinds(), (block_map.q_len % 16 != 0, block_map.kv_len % 16 != 0)
    yield split_runs(block_map.rows, n_q, n_kv, kv_ragged), kinds, n_kv, kv_ragged
    yield split_runs(block_map.columns, n_kv, n_q, q_ragged), kinds.mT, n_q, q_ragged


def walked(walk, line):
    """The tiles of a line as a kernel's cursor meets them, one look ahead past the last run included."""
    run, found = int(walk.offsets[line]), []
    at, end = int(walk.start[run]), int(walk.stop[run])
    for _ in range(int(walk.tiles[line])):
        found.append(at)
        at += 1
        if at == end:
            run += 1
            at = int(walk.start[run])
        end = int(walk.stop[run])
    return found


@given(maps())
def test_a_cursor_meets_every_tile_once_in_order(block_map):
    for made, kinds, across, ragged in both(block_map):
        for number, line in enumerate(kinds.flatten(0, 2).tolist()):
            edge = [across - 1] if ragged and line[-1] == FULL else []  # a ragged last tile needs the bounds check
            full = [j for j, kind in enumerate(line) if kind == FULL and [j] != edge]
            partial = [j for j, kind in enumerate(line) if kind == PARTIAL or [j] == edge]
            assert walked(made.full, number) == full
            assert walked(made.partial, number) == partial


@given(maps(), st.integers(1, 4), st.integers(0, 3))
def test_an_order_is_a_permutation_with_the_longest_first(block_map, per_line, missing):
    for made, kinds, _, _ in both(block_map):
        lines = kinds.shape[2]
        tiles = max(1, lines * per_line - min(missing, per_line - 1))  # the last line need not be whole
        order = made.order(tiles, per_line)
        weight = (kinds != SKIP).sum(3).flatten(0, 1)
        assert order.shape == (weight.shape[0], tiles)
        assert order.dtype == torch.int32
        for own, line_weight in zip(order.tolist(), weight.tolist(), strict=True):
            assert sorted(own) == list(range(tiles))
            weights = [line_weight[tile // per_line] for tile in own]
            assert weights == sorted(weights, reverse=True)


@given(maps())
def test_equal_work_keeps_its_place(block_map):
    """Neighbours stay neighbours, so that they share what they read."""
    for made, kinds, _, _ in both(block_map):
        weight = (kinds != SKIP).sum(3).flatten(0, 1)
        for own, line_weight in zip(made.order(kinds.shape[2], 1).tolist(), weight.tolist(), strict=True):
            assert own == sorted(own, key=lambda tile, weights=line_weight: (-weights[tile], tile))


def test_a_map_without_tiles():
    nothing = BlockMap.from_kinds(torch.zeros(1, 1, 3, 2, dtype=torch.int8), 40, 32, (16, 16))
    for made, *_ in both(nothing):
        assert not made.full.tiles.any()
        assert not made.partial.tiles.any()
        assert (len(made.full.start), len(made.partial.stop)) == (1, 1)  # a cursor may look at one
