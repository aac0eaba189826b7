"""Block maps as text and as HTML: pictures of tiles, made from runs alone, at any size."""

import pytest
import torch

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.runs import FULL, Runs


def test_it_prints_as_a_picture():
    kinds = torch.tensor([[1, 0, 0], [2, 1, 0]], dtype=torch.int8)[None, None]
    text = str(BlockMap.from_kinds(kinds, 20, 40, (16, 16)))
    assert "20 x 40 tokens, tiles of 16 x 16, shape (1, 1, 2, 3), 1 full, 2 partial, 3 skip, 50.0 % skipped" in text
    assert text.splitlines()[-2:] == ["▒··", "█▒·"]


def test_a_large_picture_shrinks():
    kinds = torch.zeros(1, 1, 200, 100, dtype=torch.int8)
    kinds[0, 0, :100, :50] = FULL
    kinds[0, 0, 101, 0] = FULL
    lines = str(BlockMap.from_kinds(kinds, 200, 100, (1, 1))).splitlines()
    assert "one cell is 7 x 7 tiles" in lines[1]
    assert lines[2:17] == ["█" * 7 + "▒" + "·" * 7] * 14 + ["▒" * 8 + "·" * 7]
    assert len(lines) == 2 + 29


def test_a_picture_of_several_maps_says_which_it_shows():
    kinds = torch.tensor([[[[0]], [[2]]]], dtype=torch.int8)
    assert "(batch row 0, head 0 of 1 x 2)\n·" in str(BlockMap.from_kinds(kinds, 5, 5, (8, 8)))


def test_a_picture_is_drawn_from_runs_alone(monkeypatch):
    n = 1 << 23  # tokens; a lattice of its tiles would take 4 GB
    line = torch.arange(n // 128, dtype=torch.int32)
    offsets = torch.arange(n // 128 + 1, dtype=torch.int32)
    runs = Runs(offsets, line, line + 1, torch.zeros(n // 128, dtype=torch.bool))
    block_map = BlockMap(n, n, (128, 128), (1, 1, n // 128, n // 128), runs, runs)
    picture = str(block_map).splitlines()[2:]
    assert picture == ["·" * i + "▒" + "·" * (31 - i) for i in range(32)]
    assert block_map._repr_html_().count("<path") == 2


@pytest.mark.parametrize("lengths", [(0, 0), (0, 9), (9, 0), (1, 1)])
def test_maps_of_hardly_any_tokens_print(lengths):
    kinds = torch.full((1, 1, *(min(n, 1) for n in lengths)), FULL, dtype=torch.int8)
    block_map = BlockMap.from_kinds(kinds, *lengths, (16, 16))
    assert str(block_map).splitlines()[2:] == ["█"] * (0 not in lengths)
    assert "skip" in block_map._repr_html_()
