"""A BlockMap holds exactly the kinds it was made from, as runs by rows and by columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, PARTIAL, SKIP
from maskflash.errors import ArgumentError


@st.composite
def lattices(draw):
    """Kinds (B, H, nQ, nKV) with lengths and tiles that fit, runs of equal kinds among them."""
    n_q, n_kv = draw(st.integers(0, 9)), draw(st.integers(0, 12))
    bq, bkv = draw(st.sampled_from([16, 128])), draw(st.sampled_from([1, 64]))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), n_q, n_kv)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    kinds = torch.randint(0, 3, shape, generator=generator).to(torch.int8)
    if draw(st.booleans()):  # long runs
        kinds = kinds[..., torch.arange(n_kv) // 4]
    q_len = n_q * bq - draw(st.integers(0, bq - 1)) if n_q else 0
    return kinds, q_len, n_kv * bkv, (bq, bkv)


def expected_runs(line):
    """(start, stop, full) of each run of equal visited tiles, one tile at a time."""
    runs = []
    for j, kind in enumerate(line.tolist()):
        if kind != SKIP and runs and runs[-1][1] == j and runs[-1][2] == (kind == FULL):
            runs[-1] = (runs[-1][0], j + 1, kind == FULL)
        elif kind != SKIP:
            runs.append((j, j + 1, kind == FULL))
    return runs


@given(lattices())
def test_kinds_come_back(lattice):
    block_map = BlockMap.from_kinds(*lattice)
    assert torch.equal(block_map.kinds(), lattice[0])
    assert block_map.kinds().dtype == torch.int8
    assert block_map.shape == tuple(lattice[0].shape)
    assert (block_map.q_len, block_map.kv_len, block_map.block_size) == lattice[1:]


@given(lattices())
def test_runs_are_those_of_each_row_and_column(lattice):
    kinds = lattice[0]
    block_map = BlockMap.from_kinds(*lattice)
    for runs, lines in ((block_map.rows, kinds.flatten(0, 2)), (block_map.columns, kinds.mT.flatten(0, 2))):
        assert len(runs.offsets) == len(lines) + 1
        for number, line in enumerate(lines):
            own = slice(int(runs.offsets[number]), int(runs.offsets[number + 1]))
            found = [x[own].tolist() for x in (runs.start, runs.stop, runs.full)]
            assert list(zip(*found, strict=True)) == expected_runs(line)
        assert runs.lines().tolist() == [n for n, line in enumerate(lines) for _ in expected_runs(line)]


@given(lattices())
def test_tiles_and_counts_are_those_of_the_kinds(lattice):
    kinds = lattice[0]
    block_map = BlockMap.from_kinds(*lattice)
    assert torch.equal(block_map.partial_tiles(), (kinds == PARTIAL).nonzero())
    line, position = block_map.rows.tiles(full=True)
    assert torch.equal(torch.stack((line, position), 1), (kinds.flatten(0, 2) == FULL).nonzero())
    counts = {"full": kinds == FULL, "partial": kinds == PARTIAL, "skip": kinds == SKIP}
    assert block_map.counts == {name: int(where.sum()) for name, where in counts.items()}
    assert block_map.sparsity == block_map.counts["skip"] / max(kinds.numel(), 1)


def test_memory_follows_the_runs_not_the_tiles():
    def causal(n):
        kinds = torch.ones(n, n).tril().to(torch.int8) * FULL
        kinds.fill_diagonal_(PARTIAL)
        return BlockMap.from_kinds(kinds[None, None], n * 16, n * 16, (16, 16)).nbytes

    assert causal(400) < 2.1 * causal(200)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (1, 1, 3, 2), (1, 2, 2), (2, 2)])
def test_a_lattice_that_does_not_fit_is_refused(shape):
    with pytest.raises(ArgumentError, match=r"BlockMap.from_kinds: .*expected \(B, H, 2, 2\) for 20 x 32 tokens"):
        BlockMap.from_kinds(torch.zeros(shape, dtype=torch.int8), 20, 32, (16, 16))
