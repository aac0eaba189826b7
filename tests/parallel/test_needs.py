"""What lines compute and need, and what travels between shards: counted again from all pairs."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.facts import Facts
from maskflash.parallel import needs as module
from maskflash.parallel.needs import find_needs
from maskflash.parallel.routes import find_routes, owners
from maskflash.testing import masks
from tests.parallel.shards import dealt

LENGTH, TILE = st.integers(1, 64), st.integers(1, 70)
WINDOWS = torch.tensor([0, 3, 9])
NOISE = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1
EVICTED = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(0))
MASKS = {
    "causal": mf.causal(),
    "nothing": ~mf.full(),
    "holes": mf.causal() & (mf.global_tokens(2) | mf.sliding_window(5)),
    "dilated": mf.dilated_window(30, 7),
    "dilated documents": mf.dilated_window(30, 7) & mf.mask(lambda b, h, q, kv: q // 21 == kv // 21),
    "distances by head": mf.mask(lambda b, h, q, kv: abs(q - kv) % (h + 4) == 0 and kv - q < 20),
    "windows by head": mf.mask(lambda b, h, q, kv: q - WINDOWS[h] <= kv <= q),
    "by batch row": mf.mask(lambda b, h, q, kv: kv <= q + b * 7),
    "evicted": mf.mask(lambda b, h, q, kv: kv <= q < kv + EVICTED[kv]),
    "noise": mf.mask(lambda b, h, q, kv: NOISE[q, kv] or q == kv),
    "kinds": mf.mask(lambda b, h, q, kv: q % 3 == kv % 5),
}
SIZES = {"batch": 2, "heads": 3}


def counted(mask, length, tile):
    """Area of each line, and bits (lines, keys) of what it needs, from all pairs."""
    dense = mask.dense(length, length, **SIZES)
    lines = dense.split(tile, dim=2)
    area = [int(line.sum()) for line in lines]
    return area, torch.stack([line.any(2).any(0).any(0) for line in lines]).numpy()


def decoded(needs):
    """Bits (lines, keys); also that ranges ascend and don't touch."""
    bits = np.zeros((len(needs.area), needs.seq_len), dtype=bool)
    for line in range(len(bits)):
        start, stop = needs.of(np.array([line]))
        assert (start < stop).all() and (start[1:] > stop[:-1]).all()
        for low, high in zip(start.tolist(), stop.tolist(), strict=True):
            bits[line, low:high] = True
    return bits


def check(mask, length, tile):
    needs = find_needs(mask.at(length, length, **SIZES).problem, tile)
    area, bits = counted(mask, length, tile)
    assert needs.exact and needs.area.tolist() == area
    assert (decoded(needs) == bits).all()
    lines = np.flatnonzero(np.arange(len(area)) % 2 == 0)
    start, stop = needs.of(lines)
    assert (np.diff(np.append(start, stop).reshape(2, -1).T.ravel()) > 0).all()
    assert (stop - start).sum() == bits[lines].any(0).sum()


@settings(max_examples=200)
@given(masks(), LENGTH, TILE)
def test_needs_are_the_masks(mask, length, tile):
    check(mask, length, tile)


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=15)
@given(length=LENGTH, tile=TILE)
def test_needs_of_masks_by_every_way(name, length, tile):
    check(MASKS[name], length, tile)


@pytest.mark.parametrize(
    ("name", "way"),
    [("holes", "_by_rows"), ("dilated", "_by_distances"), ("evicted", "_by_columns"), ("noise", "_by_tiles")],
)
def test_masks_take_the_way_that_is_meant(name, way, monkeypatch):
    taken = []
    real = getattr(module, way)
    monkeypatch.setattr(module, way, lambda x: taken.append(real(x)) or taken[-1])
    check(MASKS[name], 60, 16)
    assert taken[0] is not None


@pytest.mark.parametrize("way", ["_by_rows", "_by_distances", "_by_columns", "_by_tiles"])
@pytest.mark.parametrize("name", MASKS)
def test_every_way_that_applies_finds_the_same(name, way):
    problem = replace(MASKS[name].at(61, 61, **SIZES).problem, block_size=(16, 128))
    found = getattr(module, way)(problem if way == "_by_distances" else Facts(problem))
    if found is not None:
        line, start, stop = found.needed
        bits = np.zeros((4, 61), dtype=bool)
        for i, low, high in zip(line, start, stop, strict=True):
            bits[i, low:high] = True
        assert (bits == counted(MASKS[name], 61, 16)[1]).all()


@pytest.mark.parametrize("name", ["dilated", "evicted", "noise", "holes"])
def test_keys_are_taken_together_where_ranges_would_be_too_many(name, monkeypatch):
    mask = MASKS[name]
    whole = find_needs(mask.at(64, 64, **SIZES).problem, 3)
    monkeypatch.setattr(module, "_MOST_RANGES", 1)  # each line may have one, all the same
    assert (decoded(find_needs(mask.at(64, 64, **SIZES).problem, 1)).sum(1) >= 1).all()
    monkeypatch.setattr(module, "_MOST_RANGES", 30)
    found = find_needs(mask.at(64, 64, **SIZES).problem, 3)
    assert not found.exact and len(found.start) <= 30 < len(whole.start)
    assert (found.area == whole.area).all()
    assert (decoded(found) >= decoded(whole)).all()


def test_a_fault_of_the_mask_comes_through():
    table = torch.zeros(10, dtype=torch.int64)
    for predicate in (lambda b, h, q, kv: table[q - kv] == 0, lambda b, h, q, kv: (q - kv) // (h - h) == 0):
        with pytest.raises(mf.MaskIndexError):
            find_needs(mf.mask(predicate).at(40, 40).problem, 8)


@settings(max_examples=200)
@given(masks(), LENGTH, TILE, st.integers(1, 7), st.data())
def test_routes_are_what_all_pairs_say(mask, length, tile, ranks, data):
    owner, parts = data.draw(dealt(length, tile, ranks))
    assert owners(parts, length, tile).tolist() == owner
    needs = find_needs(mask.at(length, length, **SIZES).problem, tile)
    routes = find_routes(needs, parts)
    dense = mask.dense(length, length, **SIZES).sum((0, 1))
    of = torch.tensor(owner).repeat_interleave(tile)[:length]
    expected = torch.zeros(ranks, ranks, length, dtype=torch.bool)
    for target in range(ranks):
        assert routes.work[target] == int(dense[of == target].sum())
        needed = (dense[of == target] > 0).any(0)
        for source in range(ranks):
            expected[source, target] = needed & (of == source)
    found = torch.zeros_like(expected)
    keys = list(zip(routes.target.tolist(), routes.source.tolist(), routes.start.tolist(), strict=True))
    assert keys == sorted(keys)
    for source, target, start, stop in zip(
        *(x.tolist() for x in (routes.source, routes.target, routes.start, routes.stop)), strict=True
    ):
        assert start < stop and not found[source, target, start:stop].any()
        found[source, target, start:stop] = True
    assert torch.equal(found, expected)
    assert routes.tokens().tolist() == expected.sum(2).tolist()
    for source in range(ranks):
        for target in range(ranks):
            between = routes.between(source, target)
            assert sum(stop - start for start, stop in between) == expected[source, target].sum()
            assert all(a[1] < b[0] for a, b in pairwise(between)), "apart"


def test_zigzag_needs_three_quarters_of_a_gather_under_causal():
    """The ring's volume, less a quarter: what is published of causal attention at 8 ranks."""
    length, ranks = 65_536, 8
    chunk = length // (2 * ranks)
    parts = tuple(
        ((r * chunk, (r + 1) * chunk), (length - (r + 1) * chunk, length - r * chunk))
        if r < ranks - 1
        else ((r * chunk, (r + 2) * chunk),)
        for r in range(ranks)
    )
    routes = find_routes(find_needs(mf.causal().at(length, length).problem, 128), parts)
    tokens = routes.tokens()
    np.fill_diagonal(tokens, 0)
    gathered = (ranks - 1) * length
    assert tokens.sum() / gathered == pytest.approx(0.75, abs=1e-12)
    assert routes.work.max() == routes.work.min() or routes.work.max() / routes.work.mean() < 1.0001
