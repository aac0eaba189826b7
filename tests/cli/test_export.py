"""`maskflash export`: every form is there, says what the mask's own method says, and what has none exits with 2."""

import json

import pytest
import torch

import maskflash as mf
from maskflash import cli
from maskflash.cli.export import _MADE
from maskflash.cli.parser import FORMS
from maskflash.forms.arguments import LIBRARIES

MASK = "causal & document(12, 20, 16)"
PACKED = mf.causal() & mf.document([12, 20, 16])
NONE = {"vllm", *(name for name in LIBRARIES if "varlen" not in name and name != "xformers")}


def exported(capsys, *arguments):
    status = cli.main(["export", *arguments])
    return status, capsys.readouterr()


def test_each_form_is_made():
    assert _MADE.keys() == FORMS.keys()


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_printed_and_written(name, capsys):
    mask, tokens = ("causal", ["--q-len", "48"]) if name in NONE else (MASK, [])
    status, said = exported(capsys, mask, *tokens, "--to", name, "--block-size", "16")
    assert status == 0, said.err
    assert FORMS[name] in said.out
    status, written = exported(capsys, mask, *tokens, "--to", name, "--block-size", "16", "--json")
    found = json.loads(written.out)
    assert (found["to"], found["q_len"], found["kv_len"]) == (name, 48, 48)
    assert found["form"]
    for part in found["form"]:
        assert part in said.out


def test_json_has_every_number(capsys):
    _, said = exported(capsys, MASK, "--to", "magi", "--json")
    slices = PACKED.to_slices(48, 48)
    expected = {"q_ranges": slices.q_ranges, "k_ranges": slices.k_ranges, "attn_type_map": slices.types}
    assert json.loads(said.out)["form"] == {name: x.tolist() for name, x in expected.items()}
    _, said = exported(capsys, MASK, "--to", "cudnn", "--json", "--batch", "2")
    endpoints = torch.tensor(json.loads(said.out)["form"]["mask_func"], dtype=torch.int32)
    assert torch.equal(endpoints, PACKED.to_row_intervals(48, 48, batch=2).to_cudnn())
    _, said = exported(capsys, MASK, "--to", "fa4", "--json", "--block-size", "16")
    blocks = PACKED.to_block_sparse(48, 48, block_size=16)
    form, function = json.loads(said.out)["form"], PACKED.to_cute(48, 48)
    assert form["blocks.backward.mask_block_idx"] == blocks.backward.mask_block_idx.tolist()
    assert form["mask_mod"] == function.text
    assert form["aux_tensors"] == [x.tolist() for x in function.aux_tensors]


@pytest.mark.parametrize("name", sorted(NONE - {"vllm"}))
def test_what_has_no_form_says_why(name, capsys):
    status, said = exported(capsys, MASK, "--to", name)
    assert status == 2
    assert "which the mask hides" in said.err


def test_a_form_has_to_be_named(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", MASK, "--to", "cublas"])
    assert stop.value.code == 2
    assert "magi" in capsys.readouterr().err
