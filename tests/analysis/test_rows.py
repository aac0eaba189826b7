"""row_spans finds exactly what every row sees: an interval, or a strip's bits where some row has holes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from maskflash.analysis import rows as spans
from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.intervals import Rows
from maskflash.analysis.rows import row_spans


def map_of(mask, block_size):
    """BlockMap of a mask (B, H, Sq, Skv), tile by tile."""
    (q_len, kv_len), (bq, bkv) = mask.shape[2:], block_size
    kinds = torch.zeros(*mask.shape[:2], -(-q_len // bq), -(-kv_len // bkv), dtype=torch.int8)
    for i in range(kinds.shape[2]):
        for j in range(kinds.shape[3]):
            tile = mask[:, :, i * bq : (i + 1) * bq, j * bkv : (j + 1) * bkv].flatten(2)
            kinds[:, :, i, j] = tile.any(2).to(torch.int8) + tile.all(2).to(torch.int8)
    return BlockMap.from_kinds(kinds, q_len, kv_len, block_size)


def hulls_of(mask):
    count = mask.sum(-1)
    first = mask.int().argmax(-1) if mask.shape[-1] else count
    stop = mask.shape[-1] - mask.flip(-1).int().argmax(-1) if mask.shape[-1] else count
    return Rows(first[None], torch.where(count > 0, stop, first)[None], count)


def rebuilt(mask, block_size, b, h, hulls=None):
    """One plane of the mask from its spans and strips; also which pairs were evaluated."""
    block_map = map_of(mask, block_size)
    asked = torch.zeros(mask.shape, dtype=torch.bool)

    def evaluate(b, h, q, kv):
        asked[b, h, q, kv] = True
        return mask[b, h, q, kv]

    strips = []
    found = row_spans(block_map, evaluate, b, h, strips.append, rows=hulls)
    columns = torch.arange(mask.shape[3])
    start, stop = torch.from_numpy(found.start)[:, None], torch.from_numpy(found.stop)[:, None]
    plane = (columns >= start) & (columns < stop)
    for strip in strips:
        rows = len(strip.bits)
        assert not plane[strip.top : strip.top + rows].any(), "a row of a strip has a span too"
        plane[strip.top : strip.top + rows, torch.from_numpy(strip.columns)] = torch.from_numpy(strip.bits)
    return plane, asked, strips


@st.composite
def planes(draw):
    batch, heads, q_len, kv_len = draw(st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(0, 90)] * 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    family = draw(st.sampled_from(["bits", "window", "cells", "holes"]))
    shape = (batch, heads, q_len, kv_len)
    if family == "bits":
        mask = torch.rand(shape, generator=generator) < 0.3
    elif family == "cells":
        mask = (torch.rand((batch, heads, 10, 10), generator=generator) < 0.5)[..., q // 10, kv // 10]
    else:
        reach = torch.randint(0, 60, (batch, heads, 1, 1), generator=generator)
        mask = (q - kv).abs() <= reach
        if family == "holes":
            mask = mask & (torch.rand(shape, generator=generator) < 0.995)
    return mask, draw(st.sampled_from([(16, 16), (32, 8), (16, 64)]))


@given(planes(), st.integers(0, 1))
def test_spans_and_strips_are_the_mask(problem, chunk):
    mask, block_size = problem
    full_chunk = spans._CHUNK_PAIRS
    spans._CHUNK_PAIRS = 600 if chunk else full_chunk  # also a few tiles at a time
    try:
        for b in range(mask.shape[0]):
            for h in range(mask.shape[1]):
                for hulls in (None, hulls_of(mask)):
                    assert torch.equal(rebuilt(mask, block_size, b, h, hulls)[0], mask[b, h])
    finally:
        spans._CHUNK_PAIRS = full_chunk


def test_only_partial_tiles_are_evaluated():
    q, kv = torch.arange(70)[:, None], torch.arange(90)
    mask = ((q >= kv) | (kv >= 80))[None, None]
    _, asked, _ = rebuilt(mask, (16, 16), 0, 0)
    tile = asked[0, 0, 32:48].split(16, dim=1)
    assert [bool(t.any()) for t in tile] == [False, False, True, False, False, False]


def test_strips_come_from_the_top_down_and_only_where_a_row_has_holes():
    mask = torch.ones(1, 1, 80, 60, dtype=torch.bool).tril()
    mask[0, 0, 20, 3] = mask[0, 0, 70, 30] = False
    _, _, strips = rebuilt(mask, (16, 16), 0, 0)
    assert [strip.top for strip in strips] == [16, 64]


def test_where_hulls_tell_only_rows_with_holes_are_evaluated():
    mask = torch.ones(1, 1, 80, 60, dtype=torch.bool).tril()
    mask[0, 0, 20, 3] = False
    _, asked, strips = rebuilt(mask, (16, 16), 0, 0, hulls_of(mask))
    assert [strip.top for strip in strips] == [16]
    assert asked[0, 0].any(1).nonzero()[:, 0].tolist() == list(range(16, 32))
