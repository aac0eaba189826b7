"""The script trains in packed sequences, resumes to the same bits, and is what the docs show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskflash.examples import train_packed

ROOT = Path(__file__).parents[2]


def test_a_training_that_was_resumed_has_the_same_losses(tmp_path, monkeypatch):
    def losses(steps, save):
        monkeypatch.setattr(train_packed, "SAVE", tmp_path / save)
        return train_packed.train(steps, "eager")

    monkeypatch.setattr(train_packed, "TOKENS", 256)
    monkeypatch.setattr(train_packed, "WORKERS", 0)
    at_once = losses(4, "at_once.pt")
    assert at_once[-1] < at_once[0]
    assert losses(2, "parts.pt") + losses(4, "parts.pt") == at_once


def test_it_runs_as_a_command_with_workers_that_pack(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "maskflash.examples.train_packed", "--steps", "1", "--backend", "aot_eager"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 1: loss ")
    assert torch.load(tmp_path / "train_packed.pt", weights_only=True)["step"] == 1


def test_sequences_are_documents_end_to_end(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.py" for number in range(3)]
    for number, length in enumerate((3, 40, 7)):
        files[number].write_bytes(bytes([number + 1]) * length)
    monkeypatch.setattr(train_packed, "FILES", files)
    monkeypatch.setattr(train_packed, "TOKENS", 64)
    data = train_packed.PackedFiles()
    row, place, doc, target = data[5]
    assert all(torch.equal(*pair) for pair in zip(data[5], (row, place, doc, target), strict=True))
    starts = (place == 0).nonzero().flatten()
    assert torch.equal(doc, torch.bucketize(torch.arange(64), starts, right=True) - 1)
    assert torch.equal(place, torch.arange(64) - starts[doc])
    inside = target != -100
    assert torch.equal(row[inside], target[inside])  # a file is one byte again and again
    assert torch.equal(~inside[:-1], doc[1:] != doc[:-1])  # nobody learns to guess the next document


@pytest.mark.parametrize("name", ["train_packed", "train_transformers"])
def test_the_docs_show_the_script(name):
    script = (ROOT / "maskflash" / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{script}```\n" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
