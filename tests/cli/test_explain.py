"""`maskflash explain`: what `Attention.explain` says, and the predicted memory traffic."""

import json

import pytest
import torch

import maskflash as mf
from maskflash import cli
from maskflash.cli.traffic import predict

EXAMPLE = "causal & document(300, 500, 224)"
MASK = mf.causal() & mf.document([300, 500, 224])


def test_it_says_what_explain_says_and_the_traffic(capsys):
    assert cli.main(["explain", EXAMPLE]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{mf.compile(MASK).explain(1024, 1024)}\n  memory traffic     ")
    assert f"  memory traffic     {predict(MASK.block_map(1024, 1024), itemsize=4)}\n" in text
    assert "q (d + dv) + s kv (d + dv) max(1, 2 q (d + dv) / M) elements" in text
    assert "d = dv = 64, float32, s = 0.344 (tiles visited),\n" in text
    assert "M = 192 KiB of fast memory (--fast-memory; 192 is an A100's)" in text


def test_json_is_the_same_as_data(capsys):
    options = ["--block-size", "64", "--head-dim", "128", "--dtype", "bfloat16", "--fast-memory", "228", "--heads", "4"]
    assert cli.main(["explain", EXAMPLE, *options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    truth = mf.compile(MASK, block_size=64).explain(1024, 1024, heads=4).to_dict()
    assert {name: facts[name] for name in truth} == json.loads(json.dumps(truth))
    moved = predict(MASK.block_map(1024, 1024, block_size=64), head_dim=128, itemsize=2, fast_bytes=228 * 1024)
    assert facts["traffic"] == {"head_dim": 128, "dtype": "bfloat16", **moved.to_dict()}
    assert (facts["batch"], facts["heads"]) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["causal & 3"], "column 10: expected a mask"),
        (["causal", "--device", "cuda"], "torch finds no CUDA device here"),
    ],
)
def test_what_cannot_be_explained_is_status_2(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["explain", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert said in found.err


def test_a_score_is_explained_and_what_it_hides_is_hidden(capsys, tmp_path):
    path = tmp_path / "functions.py"
    path.write_text("def near(score, b, h, q, kv):\n    return score if q - kv < 100 else float('-inf')\n", "utf-8")
    assert cli.main(["explain", "causal", "--score", f"{path}:near", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["score"]["lifted"] == "(q - kv) < 100"
    assert facts["tiles"] == mf.sliding_window(99).block_map(4096, 4096).counts
    assert cli.main(["show", "causal", "--score", f"{path}:near", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == facts["tiles"]
    assert cli.main(["explain", "causal", "--score", "softcap(20), alibi", "--heads", "8"]) == 0
    assert "class              general, since tanh(score / 20.0) is not linear in the score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bias(3)", "column 1: 'bias' looks a tensor up: write file.py:function; there are softcap"),
        ("softcap", "column 1: softcap() missing"),
        ("causal", "column 1: 'causal' is no preset of scores"),
        ("softcap(20) & alibi", "column 1: expected a score, such as softcap(20)"),
        ("softcap(-1)", "column 1: softcap: cap is -1.0, expected a finite positive number"),
    ],
)
def test_what_is_no_score_is_status_2(capsys, text, said):
    assert cli.main(["explain", "causal", "--score", text]) == 2
    assert said in capsys.readouterr().err
