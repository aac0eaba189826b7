"""`maskflash shard`: what it prints and writes is the plan that Python makes; wrong usage says what is wrong."""

import json

import pytest
import torch

import maskflash as mf
from maskflash import cli
from maskflash.parallel import Links, ShardPlan

MASK = "causal & document(300, 500, 224)"
PACKED = mf.causal() & mf.document([300, 500, 224])


def sharded(capsys, *arguments):
    status = cli.main(["shard", *arguments])
    return status, capsys.readouterr()


def test_the_report_is_the_plans(capsys):
    status, said = sharded(capsys, MASK, "--world", "4", "--heads", "8", "--kv-heads", "2", "--links", "infiniband")
    assert status == 0, said.err
    plan = mf.parallel.plan([PACKED], 1024, 4, heads=8, kv_heads=2, links="infiniband")
    assert said.out == f"{plan.report()}\n"


def test_every_option_reaches_the_plan(capsys):
    options = ["--tokens", "1024", "--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    options += ["--dtype", "float32", "--chunk", "64", "--links", "1e12,3e9,2e-5", "--layers", "5", "--layers", "1"]
    status, said = sharded(capsys, "sliding_window(100)", "causal", "--world", "3", *options, "--json")
    assert status == 0, said.err
    plan = mf.parallel.plan(
        [(mf.sliding_window(100), 5), (mf.causal(), 1)],
        *(1024, 3),
        **{"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32, "chunk": 64},
        links=Links(1e12, 3e9, 2e-5),
    )
    found = json.loads(said.out)
    assert found == json.loads(json.dumps(plan.to_dict()))
    assert ShardPlan.from_dict(found) == plan


def test_a_sequence_is_as_long_as_the_longest_masks_documents(capsys):
    _, said = sharded(capsys, MASK, "document(100, 200)", "--world", "2", "--json")
    assert json.loads(said.out)["seq_len"] == 1024
    _, said = sharded(capsys, "causal", "--world", "2", "--json")
    assert json.loads(said.out)["seq_len"] == 4096


def test_a_picture_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")
    path = tmp_path / "plan.png"
    status, said = sharded(capsys, MASK, "--world", "4", "--png", str(path))
    assert status == 0, said.err
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert said.out.endswith(f"wrote {path}\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([MASK, "causal", "--world", "2", "--layers", "3"], "--layers: got 1, expected one for each of 2 masks"),
        ([MASK, "--world", "2", "--png", "nowhere/plan.png"], "there is no folder nowhere"),
        ([MASK, "--world", "2", "--heads", "4", "--kv-heads", "3"], "kv_heads is 3"),
        ([MASK, "--world", "2", "--tokens", "1000"], "1024"),
        (["causel", "--world", "2"], "did you mean causal"),
    ],
)
def test_wrong_usage_says_what_is_wrong(arguments, says, capsys):
    status, said = sharded(capsys, *arguments)
    assert status == 2
    assert says in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["causal"], "--world"),
        (["causal", "--world", "0"], "expected an integer from 1"),
        (["causal", "--world", "2", "--links", "ethernet"], "expected nvlink, infiniband, cpu or FLOPS,BANDWIDTH"),
        (["causal", "--world", "2", "--links", "1e14"], "expected nvlink, infiniband, cpu or FLOPS,BANDWIDTH"),
        (["causal", "--world", "2", "--links", "1e14,-1"], "bandwidth is -1.0"),
    ],
)
def test_options_are_checked(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["shard", *arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
