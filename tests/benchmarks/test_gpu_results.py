"""What the GPU scripts do without one: cases are chosen and stored, masks agree, results become tables."""

import json
import os
import stat
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, memory_check, report, runner
from benchmarks.runner import Row, Spread

DOCUMENT = "<!-- figures: gpu attention -->\nstale\n<!-- end figures -->"
ROW = Row(
    "flex", "causal, D128", 8192, "forward", "bfloat16", "s", 9, *[Spread(1.0, 2.0, 3.0)] * 2, Spread(1.1, 1.2, 1.3)
)


@pytest.fixture
def machine(monkeypatch):
    """A GPU in name alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA Made-up 100 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: SimpleNamespace(multi_processor_count=7))
    monkeypatch.setattr(gpu, "_compile_ahead", lambda options, cases, seconds: None)
    masks = gpu._masks
    monkeypatch.setattr(gpu, "_masks", lambda tokens, seed, on: masks(tokens, seed, "cpu"))


def test_without_a_gpu_the_docs_say_so(tmp_path):
    assert report.NO_GPU in report.filled_in(DOCUMENT, report.load_gpus(tmp_path))
    assert "stale" not in report.filled_in(DOCUMENT, {})


def test_stored_results_of_each_device_become_tables(tmp_path):
    for folder, device in (("one", "Made-up 1"), ("two", "Made-up 2")):
        where = runner.conditions(False) | {"device": device}
        runner.store(tmp_path / folder / "attention.json", gpu.QUESTION, where, [ROW])
    runner.store(tmp_path / "cpu" / "attention.json", "attention", runner.conditions(False), [])
    text = report.filled_in(DOCUMENT, report.load_gpus(tmp_path))
    assert text.index("Made-up 1, ") < text.index("Made-up 2, ")
    assert text.count("| causal, D128 | 8,192 | bfloat16 | forward | 2.00 s (1.00-3.00) |") == 2
    assert text.count(gpu.TITLES["flex"]) == 2
    assert gpu.TITLES["cudnn"] not in text  # no rows
    assert report.NO_GPU not in text


def test_a_quick_run_on_a_gpu_is_no_result(tmp_path):
    runner.store(tmp_path / "one" / "attention.json", gpu.QUESTION, runner.conditions(True), [ROW])
    with pytest.raises(SystemExit, match="quick"):
        report.load_gpus(tmp_path)


def test_what_is_cut_short_keeps_what_it_had(machine, monkeypatch, tmp_path, capsys):
    done = []

    def measured(case, pairs, dry):
        stored = list(tmp_path.rglob("*.json"))
        assert [len(json.loads(path.read_text())["rows"]) for path in stored] == [len(done)] * bool(stored)
        if case.name == "causal":
            raise RuntimeError("out of luck\nmore")
        if case.name == "document":
            raise KeyboardInterrupt
        done.append(case)
        return [ROW]

    monkeypatch.setattr(gpu, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--folder", str(tmp_path), "--tokens", "2048"])
    (path,) = tmp_path.rglob("*.json")
    assert path.relative_to(tmp_path).as_posix() == "nvidia-made-up-100-80gb/attention-2048.json"
    stored = json.loads(path.read_text())
    assert len(stored["rows"]) == len(done) == 3
    assert stored["conditions"]["device"] == "NVIDIA Made-up 100 80GB, 7 multiprocessors"
    assert set(stored["conditions"]["versions"]) >= {"torch", "triton", "CUDA"}
    assert "causal, 2048 tokens, D128, heads 16:16: RuntimeError: out of luck\n" in capsys.readouterr().err


def test_no_case_begins_after_the_time_is_up(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "_measured", lambda *args: pytest.fail("began"))
    assert gpu.main(["--seconds", "0", "--quick"]) == []
    assert "out of time before full, 1024 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([], {(n, 128) for n in (2048, 4096, 8192, 16384, 32768)} | {(n, 64) for n in (4096, 8192, 16384)}),
        (["--dim", "64", "--tokens", "4096", "--tokens", "2048"], {(4096, 64)}),
        (["--quick"], {(1024, 64)}),
    ],
)
def test_cases_can_be_chosen(machine, monkeypatch, words, sizes):
    monkeypatch.setattr(gpu, "_masks", lambda *args: [("full", None, None, False)])
    cases = list(gpu._cases(gpu._options(words)))
    assert {(case.tokens, case.dim) for case in cases} == sizes
    assert {case.heads // case.kv_heads for case in cases} == ({1, 8} if not words else {1})


def test_every_contender_has_the_same_mask(machine):
    tokens = 512
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)
    found = list(gpu._masks(tokens, 0, "cpu"))
    assert {name for name, *_ in found} == set(gpu.FLOORS)
    for name, mask, mask_mod, causal in found:
        dense = mask.dense(tokens, tokens)[0, 0]
        assert torch.equal(dense, mask_mod(0, 0, rows, columns).expand(tokens, tokens)), name
        if causal is not None:
            assert torch.equal(dense, rows >= columns if causal else torch.ones_like(dense))
        case = gpu.Case(name, tokens, 1, 1, 64, mask, mask_mod, causal)
        assert gpu._visible_pairs(case, torch.device("cpu")) == int(dense.sum())


def test_different_results_are_told_apart():
    x = torch.randn(1, 1, 8, 8)
    assert gpu._difference(x, x) == 0
    assert gpu._difference(x, x.bfloat16()) < gpu.MOST_DIFFERENT
    assert gpu._difference(x, x.roll(1, 2)) > gpu.MOST_DIFFERENT
    assert not gpu._difference(x, torch.full_like(x, torch.nan)) < gpu.MOST_DIFFERENT


def test_a_models_predictions_stand_beside(tmp_path):
    stored = tmp_path / "sass_model.json"
    assert gpu.predictions(90, 128, stored) == {}
    speeds = {"forward": (400, 300), "dkdv": (500, 400), "dq": (600, 300)}
    rows = [
        {"arch": 90, "bits": 16, "head_dim": 128, "pass_name": name, "loops": [{"tflops": x} for x in both]}
        for name, both in speeds.items()
    ]
    stored.write_text(json.dumps({"rows": [*rows, rows[0] | {"head_dim": 64}]}))
    assert gpu.predictions(90, 64, stored) == {}
    assert gpu.predictions(90, 128, stored) == {
        "forward": "400 / 300 TFLOP/s",
        "backward": "385 / 250 TFLOP/s",  # 10 / (8 / 500 + 6 / 600)
        "forward + backward": "389 / 262 TFLOP/s",
    }
    cells = runner.cells(runner.replace(ROW, predicted="400 / 300 TFLOP/s"))
    assert cells["predicted"] == "400 / 300 TFLOP/s"


def checker(folder, monkeypatch, script):
    """A memory checker on the path; it is given its options, then a program."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ('test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1', 0, "memory check: passed"),
        ("exit 9", 0, "skipped, compute-sanitizer can't work here: a program of one line ends with 9"),
        (
            'case "$*" in *pytest*) echo "Invalid __global__ read"; exit 86;; esac',
            1,
            "memory check: failed, Invalid __global__ read",
        ),
        ('case "$*" in *pytest*) exit 1;; esac', 1, "memory check: failed"),  # a test failed
        ('case "$*" in *pytest*) sleep 60;; esac', 0, "skipped, not done after 1 s"),
    ],
)
def test_the_memory_check_fails_on_errors_alone(tmp_path, monkeypatch, capsys, script, code, message):
    checker(tmp_path, monkeypatch, script)
    assert memory_check.main(["--seconds", "1"]) == code
    assert message in capsys.readouterr().out


def test_without_a_checker_the_memory_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(memory_check.shutil, "which", lambda name, path=None: None)
    assert memory_check.main([]) == 0
    assert capsys.readouterr().out == "memory check: skipped, compute-sanitizer is not installed\n"
