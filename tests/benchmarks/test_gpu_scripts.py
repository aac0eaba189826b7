"""The scripts for a lent device run on the CPU, dry, and fill their files; what breaks there stops nothing else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import device, engines

ROOT = Path(__file__).parents[2]


def dry(script, folder):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--dry", "--folder", str(folder)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dry-run"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_tests_script(tmp_path):
    first, *tests, together, checker = lines(dry("gpu_test", tmp_path) / "checks.jsonl")
    assert first["device"] == "dry run"
    assert set(first["versions"]) >= {"maskflash", "torch", "python"}
    assert len(tests) > 4
    assert all(test["outcome"] == "passed" and test["seconds"] >= 0 and "::" in test["test"] for test in tests)
    assert together == {"test": "all", "outcome": "passed"}
    assert checker["outcome"] in ("skipped", "passed")


def test_the_speed_script(tmp_path):
    stored = json.loads((dry("gpu", tmp_path) / "attention.json").read_text())
    assert stored["conditions"]["quick"]
    steps, cases = ["forward"] * 2, ["forward", "backward", "forward + backward"] * 2
    assert [row["measure"] for row in stored["rows"]] == steps + cases
    assert all(row["ours"]["p50"] > 0 and row["theirs"]["p50"] > 0 for row in stored["rows"])


def test_the_tuning_script(tmp_path):
    found = lines(dry("gpu_tune", tmp_path) / "tuning.jsonl")
    assert not [line for line in found if "failed" in line]
    assert [line["start"] for line in found if "start" in line] == ["empty", "full"]
    assert [line["small"] for line in found if "small" in line] == ["forward"]
    assert {(line["compiled"], line["of"]) for line in found if "compiled" in line} == {(4, 4)}
    beside = [(line["backend"], line["mask"]) for line in found if "backend" in line]
    assert beside == [("auto", mask) for mask in engines.MASKS]
    tiles = [line for line in found if "tile" in line]
    assert {line["pass"] for line in tiles} == {"forward", "dkdv", "dq"}
    assert all(line["seconds"] > 0 and set(line["tile"]) >= {"block_m", "block_n", "warps"} for line in tiles)


@pytest.mark.parametrize("dry_run", [False, True])
def test_without_a_device_the_scripts_say_so(monkeypatch, dry_run):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1" if dry_run else "no CUDA device; --dry runs without one"):
        device.name(dry_run)


def work(item):
    if item == "dies":
        os._exit(1)
    if item == "sleeps":
        time.sleep(600)
    if item == "raises":
        raise RuntimeError("out of luck\nmore")
    return item


def test_work_side_by_side_outlives_what_goes_wrong(capfd):
    found = list(device.side_by_side(work, ["dies", "raises", "left undone", 1], seconds=120, processes=2))
    assert found == [1]
    assert "work: RuntimeError: out of luck\n" in capfd.readouterr().err
    assert list(device.side_by_side(work, [], seconds=10)) == []


def test_work_that_takes_too_long_is_ended():
    start = time.monotonic()
    assert list(device.side_by_side(work, ["sleeps"], seconds=0.5)) == []
    assert time.monotonic() - start < 60


SUITE = """
import pytest, time

def test_a(): pass
def test_b(): assert 1 == 2
def test_c(): pytest.skip("not here")
def test_d(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_e(): pass
"""


@pytest.fixture
def checked(tmp_path):
    """A suite's outcomes, as the plugin writes them: test -> (outcome, why)."""

    def run(*words, seconds="inf", of="cpu"):
        (tmp_path / "test_suite.py").write_text(SUITE)
        path = tmp_path / "checks.jsonl"
        path.write_text("")
        told = {"MASKFLASH_CHECKS": str(path), "MASKFLASH_SECONDS": seconds, "MASKFLASH_TEST_DEVICE": of}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_plugin", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, "-c", os.devnull, "--rootdir", str(tmp_path), *words, str(tmp_path / "test_suite.py")],
            cwd=tmp_path,
            env={**os.environ, **told, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=300,
        )
        found = {}
        for line in lines(path):
            found.setdefault(line["test"].rpartition("test_")[2], []).append((line["outcome"], line.get("why", "")))
        return found

    return run


def test_a_line_for_each_test_and_none_after_the_device_broke(checked):
    found = checked()
    assert found["a"] == [("passed", "")]
    ((outcome, why),) = found["b"]
    assert outcome == "failed"
    assert "assert 1 == 2" in why
    assert found["c"] == [("skipped", "Skipped: not here")]
    assert found["d"][0][0] == "failed"
    assert found["e"] == [("skipped", "Skipped: an earlier test broke the device")]


def test_a_worker_whose_device_broke_is_replaced(checked):
    found = checked("-n", "1", "--maxschedchunk=1", "--max-worker-restart=3")
    assert found["d"][0][0] == "failed"
    assert found["e"] == [("passed", "")]


def test_no_test_begins_after_the_time_is_up(checked):
    assert {name: outcomes for name, outcomes in checked(seconds="0").items()} == {
        name: [("skipped", "Skipped: the time is up")] for name in "abcde"
    }
