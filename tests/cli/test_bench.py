"""`maskflash bench`: what it times, what it says of the spread, and that a wrong result is noticed."""

import json

import pytest
import torch

import maskflash as mf
from maskflash import cli
from maskflash.cli import bench
from maskflash.demo.checks import Check

SMALL = ["bench", "causal & document(60, 100, 40)", "--rounds", "3", "--heads", "2", "--head-dim", "16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_times_both_and_holds_the_output_against_float64(capsys, dtype):
    assert cli.main([*SMALL, "--dtype", dtype, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["check"]["passed"]
    assert 0 < facts["check"]["error"] <= facts["check"]["budget"]
    assert (facts["q_len"], facts["heads"], facts["head_dim"], facts["dtype"]) == (200, 2, 16, dtype)
    assert set(facts["seconds"]) == {"maskflash", "SDPA, dense mask"}
    assert set(facts["ratios"]) == {"SDPA, dense mask"}
    for spread in (facts["seconds"]["maskflash"]["forward"], facts["ratios"]["SDPA, dense mask"]["forward"]):
        assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]


def test_backward_has_three_lines_for_each(capsys):
    assert cli.main([*SMALL, "--backward"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines[3:])) <= 80
    assert [line[18:28].strip() for line in lines[5:11]] == ["forward", "backward", "both"] * 2
    assert [line[:18].strip() for line in lines[5:11]] == ["maskflash", "", "", "SDPA, dense mask", "", ""]
    assert [line.endswith("x)") or "x (" in line for line in lines[5:11]] == [False] * 3 + [True] * 3
    assert "within its budget of" in text


def test_contenders_run_by_turns_and_ratios_are_those_of_a_round(monkeypatch):
    ran = []
    clock = iter(range(10_000))
    monkeypatch.setattr(bench, "_now", lambda x: next(clock) ** 2)
    contenders = {name: lambda name=name: ran.append(name) or torch.zeros(1) for name in ("maskflash", "other")}
    q = torch.zeros(1)
    samples = bench._by_turns(contenders, (q, q, q), 3, False, lambda: None)
    assert ran == ["maskflash", "other", *["maskflash", "other"], *["other", "maskflash"], *["maskflash", "other"]]
    # Calls 2 to 7 of the clock's squares, the first two not counted: 4n + 1 for call n.
    assert samples["maskflash"]["forward"] == [9, 21, 25]
    assert samples["other"]["forward"] == [13, 17, 29]


def test_a_ratio_above_one_is_in_our_favour():
    args = cli.parser().parse_args(SMALL)
    samples = {"maskflash": {"forward": [1.0, 2.0, 4.0]}, "other": {"forward": [10.0, 10.0, 10.0]}}
    facts = bench._facts(bench.subject(args), args, samples, Check("out", 0.0, 0.0))
    assert facts["ratios"] == {"other": {"forward": pytest.approx({"p20": 3.5, "p50": 5.0, "p80": 8.0})}}


def test_a_spread_is_of_the_pairs():
    assert bench.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == bench.Spread(2.0, 3.5, 5.0)


def test_a_wrong_result_is_status_1(capsys, monkeypatch):
    honest = mf.Attention.__call__

    def tampered(self, *tensors, **options):
        out = honest(self, *tensors, **options).clone()
        out[0, 0, -1, -1] += 1e-3
        return out

    monkeypatch.setattr(mf.Attention, "__call__", tampered)
    assert cli.main(SMALL) == 1
    assert "NOT within its budget" in capsys.readouterr().out


def test_rows_that_see_nothing_are_no_error(capsys):
    assert cli.main(["bench", "document(60, 40)", "--q-len", "128", "--rounds", "1", "--head-dim", "8"]) == 0
    assert "within its budget of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["causal", "--flex", "--backward"], "--flex: FlexAttention has no backward on the CPU"),
        (["causal", "--q-len", "1048576"], "the dense mask that SDPA takes would have 1,048,576 x 1,048,576 pairs"),
        (["causal", "--device", "cuda"], "torch finds no CUDA device here"),
        (["causal or full"], "column 1: masks are joined by & | ^ ~"),
    ],
)
def test_what_cannot_be_timed_is_status_2(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert said in found.err


def test_sdpa_gets_the_mask_as_small_as_it_is():
    # SDPA takes longer for a mask that is expanded over heads, which would flatter us.
    args = cli.parser().parse_args([*SMALL, "--batch", "2"])
    seen = bench.subject(args)
    q, k, v = bench.Shape(2, 2, 2, 200, 200, 8, 8).tensors(torch.float32)
    made = bench._contenders(mf.compile(seen.mask), seen, (q, k, v), False)
    mask = made["SDPA, dense mask"].args[3]
    assert mask.shape == (1, 1, 200, 200)
    assert torch.equal(mask, seen.mask.dense(200, 200))
    assert torch.allclose(made["SDPA, dense mask"](), made["maskflash"](), atol=1e-5)


def test_a_mask_of_its_own_for_each_row_keeps_them():
    args = cli.parser().parse_args(["bench", "padding(5, 9)", "--q-len", "12", "--batch", "2", "--heads", "3"])
    seen = bench.subject(args)
    assert seen.dense(torch.device("cpu")).shape == (2, 1, 12, 12)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, when dynamo is loaded
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_a_contender_that_agrees():
    args = cli.parser().parse_args(["bench", "causal & document(60, 100, 40)", "--heads", "2", "--q-len", "256"])
    seen = bench.subject(args)
    shape = bench.Shape(1, 2, 2, 256, 256, 16, 16)
    q, k, v = (x.detach() for x in shape.tensors(torch.float32))
    flex = bench._flex(seen, (q, k, v))
    block_mask = flex.keywords["block_mask"]
    # Without torch.compile, which takes a minute, FlexAttention computes densely: the mask_mod is what is looked at.
    out = torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=block_mask)
    ours = mf.attention(q, k, v, seen.mask)
    rows = seen.dense(q.device)[0, 0].any(1)
    assert torch.allclose(out[:, :, rows], ours[:, :, rows], atol=1e-5)
