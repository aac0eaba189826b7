"""Measured tiles are kept from process to process; a file that is broken, or of another kernel, says nothing."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from maskflash.backends.triton import modules, tile_choice
from maskflash.backends.triton.tile_choice import Case, Choice
from maskflash.backends.triton.tiles import ROWS, Tile, candidates

CASE = Case(torch.device("cpu"), "forward", torch.float16, (64, 64), (128, 128), "kv=kv")
TILE = Tile(64, 32, 8, 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own, in a process that knows nothing."""
    monkeypatch.setenv(modules.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tile_choice, "_known", {})
    return tmp_path / "cache" / "tiles"


def again(monkeypatch):
    """As a new process would find it."""
    monkeypatch.setattr(tile_choice, "_known", {})
    return tile_choice.find(CASE)


@pytest.mark.parametrize("tile", [TILE, replace(TILE, registers=128)])
def test_a_choice_is_found_again_by_later_processes(folder, monkeypatch, tile):
    assert not tile_choice.find(CASE).measured
    tile_choice.keep(CASE, tile)
    assert tile_choice.find(CASE) == again(monkeypatch) == Choice(tile, measured=True)
    assert not tile_choice.find(replace(CASE, mask="another mask")).measured
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
        lambda held: json.dumps({**held, "tile": {**held["tile"], "stages": None}}),
        lambda held: json.dumps({**held, "tile": {**held["tile"], "registers": 8}}),
    ],
)
def test_a_broken_file_says_nothing_and_is_replaced(folder, monkeypatch, change):
    tile_choice.keep(CASE, TILE)
    (path,) = folder.iterdir()
    path.write_text(change(json.loads(path.read_text())))
    assert not again(monkeypatch).measured
    tile_choice.keep(CASE, TILE)
    assert again(monkeypatch) == Choice(TILE, measured=True)


@pytest.mark.parametrize("row", [row for row in ROWS if isinstance(row.arch, int)], ids=str)
def test_the_candidates_of_every_row_can_be_kept(folder, monkeypatch, row):
    monkeypatch.setattr(tile_choice.gpu, "arch", lambda device: row.arch)
    dtype = {8: torch.float8_e4m3fn, 16: torch.bfloat16, 32: torch.float32}[row.bits]
    case = replace(CASE, pass_name=row.pass_name, dtype=dtype, dims=(row.head_dim, row.head_dim), block_size=(128, 128))
    for tile in candidates(row.tile, dtype):
        tile_choice.keep(case, tile)
        monkeypatch.setattr(tile_choice, "_known", {})
        assert tile_choice.find(case) == Choice(tile, measured=True)


def test_without_a_folder_a_choice_holds_in_this_process(folder, monkeypatch):
    folder.parent.write_text("in the way")
    tile_choice.keep(CASE, TILE)
    assert tile_choice.find(CASE).tile == TILE
    assert not again(monkeypatch).measured


def test_without_a_home_too(monkeypatch):
    def refused():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tile_choice, "_known", {})
    monkeypatch.delenv(modules.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(modules.Path, "home", refused)
    assert not tile_choice.find(CASE).measured
    tile_choice.keep(CASE, TILE)
    assert tile_choice.find(CASE).tile == TILE


def test_a_full_disk_leaves_nothing_half_written(folder, monkeypatch):
    def refused(draft, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refused)
    tile_choice.keep(CASE, TILE)
    assert tile_choice.find(CASE).tile == TILE
    assert not again(monkeypatch).measured


def test_what_was_not_measured_is_the_tables_and_is_not_kept(folder, monkeypatch):
    assert tile_choice.find(CASE) == Choice(tile_choice.listed(CASE), measured=False)
    tile_choice.remember(CASE, TILE)  # what fitted
    assert tile_choice.find(CASE) == Choice(TILE, measured=False)
    assert again(monkeypatch).tile == tile_choice.listed(CASE)
    assert not folder.exists()


def test_no_more_choices_are_held_than_a_thousand(folder):
    for n in range(tile_choice._MOST + 5):
        tile_choice.find(replace(CASE, mask=f"mask {n}"))
    assert len(tile_choice._known) == tile_choice._MOST


def test_a_case_is_another_on_another_device_and_version(monkeypatch):
    first = CASE.key
    monkeypatch.setattr(tile_choice.gpu, "name", lambda device: "another")
    second = CASE.key
    monkeypatch.setattr(tile_choice.gpu, "library", lambda: SimpleNamespace(__version__="another"))
    assert len({*map(tuple, (first, second, CASE.key))}) == 3
