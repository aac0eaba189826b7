"""Ways to give units to ranks: none has more than its even share, and each is what its name says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.masks.predicate import mask as as_mask
from maskflash.parallel import candidates
from maskflash.parallel.needs import find_needs
from maskflash.testing import masks


def needs_of(mask, length, tile):
    return find_needs(as_mask(mask).at(length, length, batch=2, heads=2).problem, tile)


@settings(max_examples=60)
@given(masks(), st.integers(1, 64), st.integers(1, 9), st.integers(1, 12), st.integers(1, 4))
def test_each_unit_has_a_rank_and_no_rank_has_too_many(mask, length, tile, ranks, unit):
    needs = needs_of(mask, length, tile)
    area = candidates.find_area([(needs, 1)], unit)
    assert area.sum() == int(mask.dense(length, length, batch=2, heads=2).expand(2, 2, -1, -1).sum())
    names = set()
    for name, owner in candidates.ways([needs], area, unit, ranks):
        counts = np.bincount(owner, minlength=ranks)
        assert len(owner) == len(area) and len(counts) == ranks and counts.max() <= -(-len(area) // ranks), name
        names.add(name)
        shards = candidates.as_shards(owner, ranks, unit * tile, length)
        held = [place for ranges in shards for start, stop in ranges for place in range(start, stop)]
        assert sorted(held) == list(range(length))
        most = -(-length // (ranks * unit * tile)) * unit * tile
        assert max(sum(stop - start for start, stop in ranges) for ranges in shards) <= most
    assert {"contiguous", "zigzag", "level", "documents"} < names


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.booleans())
def test_documents_are_found_in_what_lines_need(lengths, is_causal):
    mask = mf.document(lengths=lengths)
    needs = needs_of(mask & mf.causal() if is_causal else mask, sum(lengths), 1)
    assert candidates.find_cuts([needs], 1).tolist() == np.cumsum(lengths)[:-1].tolist()


@settings(max_examples=40)
@given(st.lists(st.integers(9, 30), min_size=1, max_size=12), st.integers(2, 4))
def test_a_unit_of_two_documents_begins_the_second(lengths, tile):
    needs = needs_of(mf.causal() & mf.document(lengths=lengths), sum(lengths), tile)
    ends = np.cumsum(lengths)[:-1]
    assert candidates.find_cuts([needs], 1).tolist() == (ends // tile).tolist()


def test_zigzag_pairs_front_and_back():
    assert candidates.zigzag(8, 4).tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert candidates.zigzag(7, 2).tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_runs_are_level_where_the_lightest_units_fill_them():
    """A window of four units: the first rank's rows see less, and each other rank takes one of them."""
    area = np.minimum(np.arange(1, 65), 32)
    owner = candidates.level(area, 8)
    work = np.bincount(owner, area)
    assert np.bincount(owner).tolist() == [8] * 8 and work.max() <= 1.05 * work.mean()
    assert work.max() < np.bincount(candidates.contiguous(64, 8), area).max()
    assert (np.diff(owner[32:]) >= 0).all(), "what sees a whole window stays in runs"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_level_is_never_less_even_than_contiguous_runs(area, ranks):
    area = np.array(area)
    owner = candidates.level(area, ranks)
    assert np.bincount(owner, minlength=ranks).max() <= -(-len(area) // ranks)
    runs = np.bincount(candidates.contiguous(len(area), ranks), area)
    assert np.bincount(owner, area).max() <= runs.max()


def test_the_heap_gives_the_largest_to_the_least():
    area = np.array([5, 9, 1, 7, 3, 3, 8, 4])
    assert candidates.heap(area, 2, 1).tolist() == greedy(area, 2)


def greedy(area, ranks):
    """Graham's rule, written once more, with as many units for each rank."""
    work, left, owner = [0] * ranks, [len(area) // ranks] * ranks, [0] * len(area)
    for unit in sorted(range(len(area)), key=lambda unit: (-area[unit], unit)):
        rank = min((rank for rank in range(ranks) if left[rank]), key=lambda rank: (work[rank], rank))
        owner[unit] = rank
        work[rank] += area[unit]
        left[rank] -= 1
    return owner


@given(st.lists(st.integers(0, 50), min_size=4, max_size=24).filter(lambda area: len(area) % 4 == 0))
def test_the_heap_is_grahams(area):
    assert candidates.heap(np.array(area), 4, 1).tolist() == greedy(area, 4)


def test_affinity_prefers_what_is_there():
    needs = needs_of(mf.document(lengths=[16, 16, 16, 16]), 64, 8)
    area = candidates.find_area([(needs, 1)], 1)
    owner = candidates.affinity(area, candidates.find_sees([needs], 1, 1), 4, 1)
    assert owner[::2].tolist() == owner[1::2].tolist(), "both chunks of a document go to one rank"


def test_groups_are_divided_in_order():
    assert candidates.divide(np.array([1, 0, 0, 1, 1, 0]), 3).tolist() == [3, 0, 1, 4, 5, 2]


@pytest.mark.parametrize(("tile", "wide"), [(1, 1), (4, 1), (4, 3)])
def test_what_chunks_see_is_what_their_rows_see(tile, wide):
    mask = mf.causal() & mf.sliding_window(9)
    needs = needs_of(mask, 50, tile)
    sees = candidates.find_sees([needs], 2, wide)
    dense = mask.dense(50, 50)[0, 0].numpy()
    for chunk in range(len(sees)):
        for column in range(sees.shape[2]):
            at = dense[chunk * 2 * tile : (chunk + 1) * 2 * tile, column * wide * tile : (column + 1) * wide * tile]
            assert sees[chunk, 0, column] == at.any()
