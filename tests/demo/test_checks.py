"""The demo's checks measure what they say: errors in units of the result, tiles against all their pairs."""

import pytest
import torch

from maskflash.demo.checks import Check, check_block_map
from maskflash.demo.documents import pack
from maskflash.demo.measure import peak_bytes
from maskflash.demo.workload import dense_mask, packed


def test_the_dense_mask_is_the_predicate_of_every_pair():
    ids = torch.tensor([[0, 0, 1, 1, 1, 2]])
    mask = dense_mask(ids)
    for q in range(6):
        for kv in range(6):
            assert mask[0, 0, q, kv] == (q >= kv and ids[0, q] == ids[0, kv])


def test_a_nan_never_passes():
    assert not Check("out", float("nan"), 1.0).passed
    assert Check("out", 1.0, 1.0).passed


@pytest.mark.parametrize("tokens", [1, 128, 129, 1000])
def test_tiles_are_compared_with_all_their_pairs(tokens):
    ids = pack(tokens, seed=1).ids
    block_map = packed.block_map(tokens, tokens, doc=ids)
    assert check_block_map(block_map, dense_mask(ids)).passed
    assert check_block_map(block_map, torch.zeros_like(dense_mask(ids))).error > 0


def test_peak_memory_sees_the_dense_mask():
    peak = peak_bytes("sdpa", 3000, torch.float32, 0)
    assert peak is None or peak >= 3000 * 3000
