"""Tiles of one number have the same pairs, whatever the mask; where a mask repeats, its numbers are few."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.problem import Problem
from maskflash.parallel.alike import find_alike
from maskflash.testing import masks
from tests.parallel.test_needs import MASKS, SIZES

FAR = torch.tensor([-(2**63), -(2**62), 0, 2**62, 2**63 - 1])
REAL = torch.tensor([0.5, 1.5, float("nan"), -0.0, 0.0, float("inf")])
HARD = {
    "differences that wrap": mf.mask(lambda b, h, q, kv: FAR[q % 5] - FAR[kv % 5] < 3),
    "far apart": mf.mask(lambda b, h, q, kv: FAR[q // 9] <= FAR[kv // 9]),
    "real": mf.mask(lambda b, h, q, kv: REAL[q % 6] <= REAL[kv // 8]),
    "real differences": mf.mask(lambda b, h, q, kv: REAL[q // 8] - REAL[kv % 6] > 0.2),
    "sums": mf.mask(lambda b, h, q, kv: (q + kv) % 7 < 3),
    "rows alone": mf.mask(lambda b, h, q, kv: q % 3 == 1),
    "columns alone": mf.mask(lambda b, h, q, kv: kv % 3 + h == 1),
    "heads alone": mf.mask(lambda b, h, q, kv: h == 1),
    "bits": mf.mask(lambda b, h, q, kv: (q & 4) == (kv & 4)),
    "part of a difference": mf.mask(lambda b, h, q, kv: (q // 4 - kv // 4) % 3 == 0 or q % 4 == kv % 4),
    "shorter integers": mf.mask(lambda b, h, q, kv: q.to(torch.int8) * 5 > kv.to(torch.int8) * 3),
}


def bits(problem: Problem):
    """Of every tile its place, and its pairs: False beyond the end, as one row."""
    batch, heads, lines, columns = problem.shape
    rows, wide = problem.block_size
    sizes = {"b": batch, "h": heads, "q": problem.q_len, "kv": problem.kv_len}
    at = torch.meshgrid(*map(torch.arange, sizes.values()), indexing="ij")
    dense = torch.zeros(batch, heads, lines * rows, columns * wide, dtype=torch.bool)
    dense[:, :, : problem.q_len, : problem.kv_len] = problem.visible(*at)
    tiles = dense.unflatten(3, (columns, wide)).unflatten(2, (lines, rows)).transpose(3, 4)
    places = torch.cartesian_prod(*map(torch.arange, (batch, heads, lines, columns)))
    return places, tiles.reshape(len(places), -1).numpy()


def check(mask, length, tile, width):
    problem = replace(mask.at(length, length, **SIZES).problem, block_size=(tile, width))
    places, pairs = bits(problem)
    kind = find_alike(problem, places)
    assert kind.shape == (len(places),)
    first = np.unique(kind, return_index=True)[1]
    assert np.unique(kind).tolist() == list(range(len(first)))
    assert (pairs == pairs[first][kind]).all()


@settings(max_examples=200)
@given(masks(), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_tiles_of_a_number_have_the_same_pairs(mask, length, tile, width):
    check(mask, length, tile, width)


@pytest.mark.parametrize("name", [*MASKS, *HARD])
@settings(max_examples=10)
@given(length=st.integers(1, 45), tile=st.integers(1, 16), width=st.integers(1, 16))
def test_tiles_of_many_kinds_of_masks(name, length, tile, width):
    check({**MASKS, **HARD}[name], length, tile, width)


def kinds(mask, length, tile=16):
    problem = replace(mask.at(length, length).problem, block_size=(tile, tile))
    places, pairs = bits(problem)
    found = find_alike(problem, places)
    return len(np.unique(found)), len(np.unique(pairs, axis=0)), len(places)


def test_what_repeats_is_found():
    """As many kinds as there are distances, and documents meet others in one."""
    doc = torch.arange(1024) // 256
    assert kinds(mf.dilated_window(63, 4), 1024)[0] <= 2 * 64 + 4
    assert kinds(mf.dilated_window(63, 4) & mf.mask(lambda b, h, q, kv: doc[q] == doc[kv]), 1024)[0] <= 2 * 130
    assert kinds(mf.mask(lambda b, h, q, kv: doc[q] == doc[kv]), 1024)[0] <= 6  # the ends are kinds of their own
    found, _, tiles = kinds(mf.presets.natten(32, 32, 5, 5), 1024)
    assert found < tiles / 10
    noise = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.1
    assert kinds(mf.mask(lambda b, h, q, kv: noise[q, kv]), 256)[0] == 256, "nothing repeats"


@pytest.mark.parametrize("start", [0, 3])
def test_tiles_that_reach_a_part_without_a_value_are_kinds_of_their_own(start):
    """`&` guards nothing: what lies behind 48 is read."""
    table = torch.arange(48) // 7
    problem = mf.mask(lambda b, h, q, kv: (q >= kv) & (table[q + start] == table[kv])).at(48, 48).problem
    tiles = torch.cartesian_prod(*map(torch.arange, (1, 1, 6, 6)))
    kind = find_alike(replace(problem, block_size=(8, 8)), tiles)
    assert bool(np.isin(kind[:30], kind[30:]).any()) == (start == 0)
