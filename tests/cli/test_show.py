"""`maskflash show`: the picture in an 80-column terminal, its colours, its JSON, and the figure it writes."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from maskflash import cli
from maskflash.cli import terminal

EXAMPLE = "causal & document(300, 500, 224)"
BATCH = ["padding(3, 5)", "--batch", "2", "--q-len", "8"]
SMALL = """\
causal() & document(3 documents): 10 queries x 10 keys

key 0               8
  0 ██· · · · · · · · ·
    ████· · · · · · · ·
    ██████· · · · · · ·
    · · · ██· · · · · ·
    · · · ████· · · · ·
    · · · ██████· · · ·
    · · · ████████· · ·
    · · · ██████████· ·
  8 · · · · · · · · ██·
    · · · · · · · · ████
    ██ full  ▒▒ partial  · skip   one cell is 1 x 1 tokens

128 x 128 tiles: 0 full, 1 partial, 0 skip (0.0 %)
"""
TILES = """\
causal() & document(3 documents): 1,024 queries x 1,024 keys

  key 0
    0 ▒▒· · · · · · ·
      ██▒▒· · · · · ·
      ▒▒▒▒▒▒· · · · ·
      · · ▒▒▒▒· · · ·
      · · ▒▒██▒▒· · ·
      · · ▒▒████▒▒· ·
      · · ▒▒▒▒▒▒▒▒▒▒·
      · · · · · · ▒▒▒▒
      ██ full  ▒▒ partial  · skip   one cell is 128 x 128 tokens

128 x 128 tiles: 4 full, 18 partial, 42 skip (65.6 %)
"""


@pytest.fixture(autouse=True)
def eighty(monkeypatch):
    """80 columns, and nothing that asks for colour or forbids it."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def show(capsys, *arguments):
    status = cli.main(["show", *arguments])
    found = capsys.readouterr()
    assert (status, found.err) == (0, "")
    return found.out


def test_the_picture_of_a_small_mask(capsys):
    assert show(capsys, "causal & document(3, 5, 2)") == SMALL


def test_the_picture_of_tiles(capsys):
    assert show(capsys, EXAMPLE, "--block-size", "128") == TILES


def test_the_example_fills_eighty_columns_and_no_more(capsys):
    lines = show(capsys, EXAMPLE).splitlines()
    assert max(map(len, lines)) <= 80
    rows = lines[3:35]
    assert all(set(row[6:]) <= set("█▒· ") for row in rows)
    assert [len(row) for row in rows if row.endswith("▒▒")] == [70]  # the last row alone reaches the last column
    assert [row[:6].strip() for row in rows[::8]] == ["0", "256", "512", "768"]
    assert rows[0].startswith("    0 ▒▒· · ")
    assert rows[31].endswith("██▒▒")
    assert "one cell is 32 x 32 tokens" in lines[35]


@pytest.mark.parametrize(("columns", "cells"), [("20", 6), ("40", 16), ("200", 32)])
def test_the_picture_fits_the_terminal(capsys, monkeypatch, columns, cells):
    monkeypatch.setenv("COLUMNS", columns)
    lines = show(capsys, "full", "--q-len", "1024").splitlines()
    drawn = [line for line in lines if line.endswith("██")]
    assert len(drawn) == {6: 4, 16: 16, 32: 32}[cells]  # a cell has a power of two tokens
    assert max(map(len, drawn)) <= int(columns)


@pytest.mark.parametrize(("q_len", "kv_len", "cell"), [(8, 100, 4), (100, 8, 4), (33, 33, 2), (32, 32, 1)])
def test_the_longer_side_sets_the_cells(capsys, q_len, kv_len, cell):
    lines = show(capsys, "full", "--q-len", str(q_len), "--kv-len", str(kv_len)).splitlines()
    drawn = [line for line in lines if line.endswith("██")]
    assert len(drawn) == -(-q_len // cell)
    assert drawn[0].count("█") == 2 * -(-kv_len // cell)
    assert f"one cell is {cell} x {cell} tokens" in lines[-3]


def test_a_window_of_a_million_tokens(capsys):
    lines = show(capsys, "sliding_window(131072)", "--q-len", "1048576").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[19] == f"  524,288 {'· ' * 12}▒▒██████▒▒{'· ' * 15}".rstrip()
    assert lines[-1] == "128 x 128 tiles: 7,856,640 full, 15,360 partial, 59,236,864 skip (88.3 %)"


def test_json_has_the_counts_and_the_picture(capsys):
    facts = json.loads(show(capsys, EXAMPLE, "--block-size", "256x128", "--json"))
    assert facts["tiles"] == {"full": 1, "partial": 15, "skip": 16}
    assert (facts["q_len"], facts["kv_len"]) == (1024, 1024)
    assert (facts["block_size"], facts["shape"]) == ([256, 128], [1, 1, 4, 8])
    assert facts["picture"]["tokens"] == [256, 128]
    assert facts["picture"]["kinds"][0] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_several_rows_and_heads_say_which_is_drawn(capsys):
    assert "batch row 0, head 0 of 2 x 1" in show(capsys, *BATCH)


def test_colours_are_for_terminals_alone(capsys, monkeypatch):
    assert "\x1b[" not in show(capsys, EXAMPLE)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = show(capsys, EXAMPLE)
    assert "\x1b[" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in show(capsys, EXAMPLE)


def test_a_terminal_without_these_letters_gets_others(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    program = "import sys; from maskflash.cli import main; sys.exit(main(['show', 'causal', '--q-len', '3']))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.decode("ascii").splitlines()[3:6] == ["  0 ##. .", "    ####.", "    ######"]


def test_a_score_says_what_it_adds_for_the_head_that_is_drawn(capsys):
    alibi = ["causal", "--score", "alibi", "--heads", "8", "--q-len"]
    *_, last = show(capsys, *alibi, "16").splitlines()
    assert last == "alibi(): adds -7.5 to 0 to a score of 0 (sampled visible pairs, head 0 of 8)"
    *_, last = show(capsys, *alibi, "16", "--head", "1", "--block-size", "4").splitlines()
    assert last == "alibi(): adds -3.75 to 0 to a score of 0 (visible pairs, head 1 of 8)"
    facts = json.loads(show(capsys, "causal", "--score", "softcap(10)", "--at", "20", "--q-len", "16", "--json"))
    low = facts["added"]
    assert (low["to"], low["sampled"]) == (20, True)
    assert low["least"] == low["largest"] == pytest.approx(10 * math.tanh(2) - 20, rel=1e-5)


def test_the_row_and_head_that_are_drawn_are_chosen(capsys):
    assert "batch row 1, head 0 of 2 x 1" in (out := show(capsys, *BATCH, "--batch-row", "1"))
    assert [out.splitlines()[3].count(mark) for mark in "█·"] == [10, 3]
    assert [show(capsys, *BATCH).splitlines()[3].count(mark) for mark in "█·"] == [6, 5]


def test_a_figure_with_a_score_has_it_as_a_panel(capsys, tmp_path):
    path = tmp_path / "mask.png"
    sizes = []
    for score in ([], ["--score", "alibi"]):
        show(capsys, EXAMPLE, *score, "--png", str(path))
        sizes.append(int.from_bytes(path.read_bytes()[16:20]))
    assert sizes[1] == pytest.approx(1.5 * sizes[0], rel=0.01)


def test_the_figure_is_written(capsys, tmp_path):
    path = tmp_path / "mask.png"
    out = show(capsys, EXAMPLE, "--png", str(path))
    assert out.splitlines()[-1] == f"wrote {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_explorer_is_written_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "mask.html"
    ragged = "causal & document(300, 500, 200)"
    out = show(capsys, ragged, "--html", str(path), "--block-size", "64x128", "--q-len", "1000")
    assert out.splitlines()[-1] == f"wrote {path}"
    counts = out.splitlines()[-2].partition(": ")[2].partition(" (")[0]
    page = path.read_text(encoding="utf-8")
    assert "1,000 queries × 1,000 keys" in page
    assert f'<strong id="counts">{counts}</strong>' in page
    facts = json.loads(show(capsys, EXAMPLE, "--html", str(path), "--json"))
    assert facts["html"] == str(path)
    assert "png" not in facts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["causal & documents(3)"], "column 10: there is no preset 'documents'"),
        (["nowhere.py:mask"], "there is no file nowhere.py"),
        (["random_eviction(1, 2)"], "column 1"),
        (["causal", "--at", "3"], "--at: which score is changed is of no use without --score"),
        (["causal", "--head", "1"], "--head: 1 is not less than --heads, 1"),
        (["causal", "--heads", "8", "--batch-row", "1"], "--batch-row: 1 is not less than --batch, 1"),
        (["causal", "--png", "/nowhere/at/all.png"], "--png: there is no folder /nowhere/at"),
        (["causal", "--html", "/nowhere/at/all.html"], "--html: there is no folder /nowhere/at"),
    ],
)
def test_what_cannot_be_shown_is_status_2(capsys, arguments, said):
    assert cli.main(["show", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("maskflash show: ")
    assert said in found.err


def test_without_matplotlib_the_figure_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["show", "causal", "--png", str(tmp_path / "x.png")]) == 2
    assert "pip install 'maskflash[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--q-len", "0"], ["--block-size", "8x8x8"], ["--block-size", "0"], ["--head", "-1"], ["--at", "nan"]]
)
def test_wrong_options_are_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["show", "causal", *arguments])
    assert stop.value.code == 2
    assert "usage: maskflash show" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "explain", "bench", "demo", "doctor"])
def test_help_has_examples_and_exit_statuses(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    if command in ("show", "explain", "bench"):
        assert f"maskflash {command} " in text.split("Examples:")[1]
        assert "Exit status: 0 all well, 1 a result is wrong or masks differ, 2 wrong usage." in text


@pytest.mark.parametrize("arguments", [["causal"], ["causal", "--json"]])
def test_a_reader_that_has_read_enough_is_no_error(arguments):
    # A pipe whose reading end is closed, as `| head -0` leaves it.
    reading, writing = os.pipe()
    os.close(reading)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "maskflash", "show", *arguments], stdout=writing, stderr=-1, text=True
        )
    finally:
        os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


def test_help_loads_neither_rich_nor_matplotlib():
    program = (
        "import sys\nfrom maskflash.cli import main\ntry:\n    main(['show', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('rich', 'matplotlib', 'sympy', 'triton') if name in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"


def test_progress_is_for_terminals_alone(capsys, monkeypatch):
    said = []
    monkeypatch.setattr(terminal.Console, "status", lambda self, what: said.append(what) or torch.no_grad())
    show(capsys, "causal", "--q-len", "8")
    assert said == []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show(capsys, "causal", "--q-len", "8")
    assert said == ["analysing causal()"]
