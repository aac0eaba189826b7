"""The command line: exit statuses, JSON, and a demo that notices when a result is wrong."""

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import maskflash as mf
from maskflash import cli, doctor
from maskflash.cli.parser import DTYPES
from maskflash.demo import documents, drawings, job, measure
from maskflash.demo.checks import RESULTS

SMALL = ["demo", "--tokens", "700", "--json", "--no-output"]


@pytest.fixture
def quick(monkeypatch):
    """Leave out the repetitions and the fresh processes: the checks don't depend on them."""
    monkeypatch.setattr(measure, "PAIRS", 1)
    monkeypatch.setattr(job, "peak_bytes", lambda *arguments: 2**20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_demo_passes_and_prints_its_figures(quick, capsys, dtype):
    assert cli.main([*SMALL, "--dtype", dtype]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["passed"]
    assert (figures["tokens"], figures["dtype"]) == (700, dtype)
    assert {check["name"] for check in figures["checks"]} == {*RESULTS, "tiles"}
    assert sum(figures["tiles"].values()) == 36
    assert 0 < figures["density"] < 1
    assert all(figures[f"{label}_seconds"]["ratio"] > 0 for label in ("forward", "backward", "total"))


def test_the_demo_prints_a_table(quick, capsys):
    assert cli.main(["demo", "--tokens", "300", "--no-output"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("tiles", "analysis", "forward", "backward", "peak memory", "budget", "dv"))


def test_the_demo_ends_by_naming_its_picture_and_its_explorer(quick, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--tokens", "300"]) == 0
    picture, explorer = capsys.readouterr().out.splitlines()[-2:]
    assert picture.split() == ["picture", "maskflash-demo/mask.png"]
    assert explorer.split()[:2] == ["explorer", "maskflash-demo/explorer.html"]
    assert (tmp_path / "maskflash-demo/mask.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "maskflash-demo/explorer.html").read_text(encoding="utf-8")
    assert "300 queries × 300 keys" in page


def test_without_matplotlib_the_demo_says_how_to_get_a_picture(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "find_spec", lambda name: None)
    assert cli.main(["demo", "--tokens", "300", "--output", str(tmp_path / "a/b")]) == 0
    text = capsys.readouterr().out
    assert "pip install 'maskflash[plot]'" in text
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["explorer.html"]


def test_the_demo_writes_nothing_where_it_should_not(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--tokens", "300", "--json", "--no-output"]) == 0
    assert "explorer" not in json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["demo", "--tokens", "300", "--json", "--output", "here"]) == 0
    assert json.loads(capsys.readouterr().out)["explorer"] == "here/explorer.html"


def test_a_folder_that_cannot_be_is_known_before_the_work(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskflash demo: ")
    assert "choose another with --output, or --no-output" in error


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("amount", [1e-3, float("nan")])
def test_a_wrong_result_fails_its_check_and_the_command(quick, monkeypatch, capsys, name, amount):
    honest = job.check_results

    def tampered(results, *rest):
        wrong = [result.clone() for result in results]
        wrong[RESULTS.index(name)].view(-1)[-1] += amount
        return honest(tuple(wrong), *rest)

    monkeypatch.setattr(job, "check_results", tampered)
    assert cli.main(SMALL) == 1
    captured = capsys.readouterr()
    assert [check["name"] for check in json.loads(captured.out)["checks"] if not check["passed"]] == [name]
    assert f"check failed: {name}" in captured.err


def test_a_wrong_mask_fails_every_check_it_reaches(quick, monkeypatch, capsys):
    @mf.mask
    def leaky(b, h, q, kv, *, doc):
        return q >= kv  # forgets the documents

    monkeypatch.setattr(job, "packed", leaky)
    monkeypatch.setattr(measure, "packed", leaky)
    assert cli.main([*SMALL, "--tokens", "3000"]) == 1
    failed = {c["name"] for c in json.loads(capsys.readouterr().out)["checks"] if not c["passed"]}
    assert failed == {*RESULTS, "tiles"}


def test_an_error_of_ours_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path))
    assert cli.main(["demo", "--no-output"]) == 2
    told, error = capsys.readouterr().err.split("\n", 1)
    assert told == "packing documents"  # at once, before any work
    assert error.startswith("maskflash demo: ")
    assert str(tmp_path) in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["demo", "--tokens", "0"], ["demo", "--tokens", "many"], ["demo", "--dtype", "int8"], []]
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: maskflash" in capsys.readouterr().err


@pytest.mark.parametrize("program", [["-m", "maskflash"], ["-c", "from maskflash.cli import main; main()"]])
def test_the_version_is_the_distribution_s(program):
    run = subprocess.run([sys.executable, *program, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["maskflash", importlib.metadata.version("maskflash")]


def test_the_doctor_says_what_runs_here_and_why_not(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MASKFLASH_CACHE_DIR", str(tmp_path / "cache"))
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("yes cpu")
    assert any(line.startswith("yes kernel cache") and str(tmp_path) in line for line in lines)


def test_the_doctor_says_that_an_amd_gpu_is_one(capsys, monkeypatch):
    facts = {"name": "AMD Instinct MI300X", "major": 9, "minor": 4, "multi_processor_count": 304}
    facts |= {"total_memory": 192 << 30, "gcnArchName": "gfx942:sramecc+:xnack-"}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**facts))
    monkeypatch.setattr(doctor, "assert_matches_dense", lambda *arguments, **options: None)
    assert cli.main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "triton on cuda:0" in line)
    assert "MI300X, gfx942:sramecc+:xnack- (ROCm 6.4; its kernels have been compiled, and never run)" in line
    assert "compute capability" not in line


def test_the_doctor_finds_what_is_broken(capsys, monkeypatch):
    def wrong(*arguments, **options):
        raise AssertionError("out: error 1 exceeds its budget of 0")

    monkeypatch.setattr(doctor, "assert_matches_dense", wrong)
    assert cli.main(["doctor"]) == 1
    assert "no  cpu               attention fails: out: error 1" in capsys.readouterr().out
