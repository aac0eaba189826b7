"""Measured tiles are kept from process to process; a file that is broken, or of another kernel, says nothing."""

import json
import os

import pytest

from maskflash.backends.triton import modules, tiles_measured
from maskflash.backends.triton.tiles import ROWS, Tile

KEY = ("device", "3.7.1", "forward", "torch.float16", "(64, 64)", "(128, 128)", "kv=kv")
TILE = Tile(64, 32, 8, 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own, in a process that knows nothing."""
    monkeypatch.setenv(modules.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tiles_measured, "_known", {})
    return tmp_path / "cache" / "tiles"


def again(monkeypatch):
    """As a new process would find it."""
    monkeypatch.setattr(tiles_measured, "_known", {})
    return tiles_measured.find(KEY)


def test_a_choice_is_found_again_by_later_processes(folder, monkeypatch):
    assert tiles_measured.find(KEY) is None
    tiles_measured.keep(KEY, TILE)
    assert tiles_measured.find(KEY) == again(monkeypatch) == TILE
    assert tiles_measured.find((*KEY[:-1], "another mask")) is None
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda held: "",
        lambda held: json.dumps(held)[:-9],
        lambda held: "[]",
        lambda held: json.dumps({**held, "key": ["another"]}),
        lambda held: json.dumps({**held, "tile": {"block_m": 64}}),
        lambda held: json.dumps({**held, "tile": {**held["tile"], "block_m": 0}}),
        lambda held: json.dumps({**held, "tile": {**held["tile"], "block_n": 4096}}),
        lambda held: json.dumps({**held, "tile": {**held["tile"], "warps": 5}}),
        lambda held: json.dumps({**held, "tile": {**held["tile"], "stages": -1}}),
        lambda held: json.dumps({**held, "tile": {**held["tile"], "stages": "many"}}),
    ],
)
def test_a_broken_file_says_nothing_and_is_replaced(folder, monkeypatch, change):
    tiles_measured.keep(KEY, TILE)
    (path,) = folder.iterdir()
    path.write_text(change(json.loads(path.read_text())))
    assert again(monkeypatch) is None
    tiles_measured.keep(KEY, TILE)
    assert again(monkeypatch) == TILE


def test_without_a_folder_a_choice_holds_in_this_process(folder, monkeypatch):
    folder.parent.write_text("in the way")
    tiles_measured.keep(KEY, TILE)
    assert tiles_measured.find(KEY) == TILE
    assert again(monkeypatch) is None


def test_without_a_home_too(monkeypatch):
    def refused():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tiles_measured, "_known", {})
    monkeypatch.delenv(modules.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(modules.Path, "home", refused)
    assert tiles_measured.find(KEY) is None
    tiles_measured.keep(KEY, TILE)
    assert tiles_measured.find(KEY) == TILE


def test_a_full_disk_leaves_nothing_half_written(folder, monkeypatch):
    def refused(draft, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refused)
    tiles_measured.keep(KEY, TILE)
    assert tiles_measured.find(KEY) == TILE
    assert again(monkeypatch) is None


@pytest.mark.parametrize("tile", dict.fromkeys(row.tile for row in ROWS), ids=str)
def test_candidates_are_the_tile_and_what_differs_in_one_thing(tile):
    found = list(tiles_measured.candidates(tile))
    assert found[0] == tile
    assert len(set(found)) == len(found) > 3
    for other in found[1:]:
        assert sum(getattr(other, name) != getattr(tile, name) for name in Tile.__slots__) == 1
        assert {other.block_m, other.block_n} <= {16, 32, 64, 128}
        assert other.warps in (4, 8)
        assert other.stages >= 1
