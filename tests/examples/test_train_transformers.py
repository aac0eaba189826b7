"""The script trains a model of Transformers with its own Trainer, with maskflash for attention, and resumes."""

import pytest

from maskflash.op.attention import Attention

pytest.importorskip("accelerate", reason="in the extra test: pip install 'maskflash[test]'")


def test_it_trains_and_resumes(tmp_path, monkeypatch):
    from maskflash.examples import train_transformers

    calls = []

    def counted(attn, *tensors, **options):
        calls.append(attn)
        return real(attn, *tensors, **options)

    real = Attention.__call__
    monkeypatch.setattr(Attention, "__call__", counted)
    command = ["--longest", "100", "--batch", "4", "--workers", "0", "--save", str(tmp_path / "saved")]
    first = train_transformers.main([*command, "--steps", "2"])
    assert len(first) == 2 and calls
    assert len(train_transformers.main([*command, "--steps", "3"])) == 3  # its history begins with the first two
