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
    monkeypatch.setattr(train_transformers, "SAVE", tmp_path / "saved")
    for name, value in {"LONGEST": 100, "BATCH": 4, "WORKERS": 0}.items():
        monkeypatch.setattr(train_transformers, name, value)
    first = train_transformers.train(2)
    assert len(first) == 2 and calls
    again = train_transformers.train(3)
    assert len(again) == 3 and again[:2] == first  # its history begins with the first two
