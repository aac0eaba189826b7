"""Pieces of a line together walk each of its tiles once, in order, and are as even as numbers allow."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL
from maskflash.backends.triton.pieces import are_few, cut
from maskflash.backends.triton.walks import split_runs
from tests.backends.triton.test_walks import maps


def walked(walk, run, at, steps, per_tile):
    """The steps of a piece as a kernel's cursor meets them."""
    found, end = [], int(walk.stop[run]) * per_tile
    for _ in range(steps):
        found.append(at)
        at += 1
        if at == end:
            run += 1
            at = int(walk.start[run]) * per_tile
        end = int(walk.stop[run]) * per_tile
    return found


@given(
    maps(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 1, 2, 5, 100]), st.integers(1, 40), st.data()
)
def test_pieces_walk_each_tile_once(block_map, per_line, per_tile, splits, programs, data):
    batch, heads, n_q, n_kv = block_map.shape
    tiles = data.draw(st.integers((n_q - 1) * per_line + 1, n_q * per_line))  # of the kernel: a last line may lack some
    copies = data.draw(st.integers(1, 4))
    made = split_runs(block_map.rows, n_q, n_kv, block_map.kv_len % 16 != 0)
    pieces = cut(made, (batch, heads), tiles, per_line, 128, per_tile, splits, programs, copies)
    edge = n_kv - 1 if block_map.kv_len % 16 else -1  # a ragged last tile needs the bounds check
    kinds, table = block_map.kinds().flatten(0, 1).tolist(), pieces.table.tolist()
    for unit in range(batch * heads):
        for tile in range(tiles):
            own = [row for row in table if row[:3] == [unit // heads, unit % heads, tile]]
            assert [row[3] for row in own] == list(range(int(pieces.counts[unit, tile // per_line])))
            line = kinds[unit][tile // per_line]
            expected = [[], []]
            for j, kind in enumerate(line):
                if kind in (FULL, PARTIAL):
                    expected[kind == PARTIAL or j == edge] += range(j * per_tile, (j + 1) * per_tile)
            for walk, first, wanted in ((made.full, 4, expected[0]), (made.partial, 7, expected[1])):
                found = [step for row in own for step in walked(walk, *row[first : first + 3], per_tile)]
                assert found == wanted
            lengths = [row[6] + row[9] for row in own]
            assert max(lengths) - min(lengths) <= 1
            if splits is not None:
                assert len(own) == max(1, min(splits, sum(lengths)))
    assert pieces.most == int(pieces.counts.max())
    sizes = (batch * 2 if batch == 1 else batch, heads, n_q * 16 - data.draw(st.sampled_from([0, 3])))
    starts = pieces.starts((batch, heads), sizes, 16).tolist()
    counts = pieces.counts.view(batch, heads, n_q).tolist()
    rows = [(b % batch, h, q // 16) for b in range(sizes[0]) for h in range(sizes[1]) for q in range(sizes[2])]
    assert [later - start for start, later in itertools.pairwise(starts)] == [counts[b][h][i] for b, h, i in rows]
    assert len(table) == int(pieces.counts[:, torch.arange(tiles) // per_line].sum())


def test_pieces_are_for_the_processors_and_of_equal_length():
    causal = torch.tensor([[[[FULL] * 6 + [PARTIAL] + [0] * 57]], [[[FULL] * 63 + [PARTIAL]]]], dtype=torch.int8)
    block_map = BlockMap.from_kinds(causal, 1, 64 * 128, (128, 128))
    made = split_runs(block_map.rows, 1, 64, False)
    call = made, (2, 1), 1, 1, 64, 2
    assert cut(*call, None, 71, 1).counts.tolist() == [[4], [32]]  # 142 steps: 2 each, but 256 tokens are 4
    assert cut(*call, None, 8, 1).counts.tolist() == [[1], [8]]  # 18 each
    assert cut(*call, None, 8, 8).counts.tolist() == [[1], [1]]  # eight key heads are programs enough
    assert cut(*call, 4, 8, 8).counts.tolist() == [[4], [4]]


def test_few_rows():
    assert are_few(1, 16)
    assert are_few(64, 1024)
    assert not are_few(0, 100)
    assert not are_few(65, 100_000)
    assert not are_few(8, 100)
