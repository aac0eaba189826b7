"""MASK: a function or mask in a file, else an expression; and the lengths it is looked at with."""

import argparse
import sys

import pytest
import torch

import maskflash as mf
from maskflash.cli.masks import TOKENS, load, subject
from maskflash.errors import ArgumentError, ArgumentTypeError, MaskTraceError

SOURCE = """
import torch
import maskflash as mf
from beside import WINDOW

ids = torch.tensor([0] * 3 + [1] * 5)
number = 3

def near(b, h, q, kv):
    return ids[q] == ids[kv] and q - WINDOW <= kv <= q

packed = mf.causal() & mf.document([3, 5])

def given(b, h, q, kv, *, doc, n=3):
    return doc[q] == doc[kv] and q < n

def late(b, h, q, kv):
    return int(q) > 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("WINDOW = 2\n")
    path = tmp_path / "my masks.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop("beside", None)


def test_a_function_in_a_file_is_a_predicate(file):
    truth = mf.document([3, 5]) & mf.sliding_window(2)
    assert torch.equal(load(f"{file}:near").mask.dense(8, 8), truth.dense(8, 8))


def test_a_mask_in_a_file_is_itself(file):
    assert load(f"{file}:packed").mask.name == "causal() & document(2 documents)"


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("nobody", ArgumentError, "has no 'nobody'; its masks are packed"),
        ("number", ArgumentTypeError, "is a int, expected a mask or a function"),
        ("given", ArgumentTypeError, "given needs doc, which the command line can't pass"),
        ("late", MaskTraceError, "int(q)"),
    ],
)
def test_what_is_no_mask_is_an_error(file, name, kind, said):
    with pytest.raises(kind) as caught:
        load(f"{file}:{name}")
    assert said in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="there is no file"):
        load(f"{tmp_path}/nowhere.py:mask")


def test_a_file_that_fails_says_why(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ArgumentError, match=r"importing .*broken.py failed: ZeroDivisionError: division by zero"):
        load(f"{path}:mask")


@pytest.mark.parametrize(
    ("text", "given", "lengths"),
    [
        ("causal", {}, (TOKENS, TOKENS)),
        ("causal", {"q_len": 10}, (10, 10)),
        ("causal", {"kv_len": 10}, (10, 10)),
        ("causal", {"q_len": 7, "kv_len": 10}, (7, 10)),
        ("document(3, 4)", {}, (7, 7)),
        ("document(3, 4)", {"q_len": 5}, (5, 5)),
    ],
)
def test_lengths_are_given_or_the_documents(text, given, lengths):
    args = argparse.Namespace(mask=text, batch=1, heads=1, **{"q_len": None, "kv_len": None, **given})
    found = subject(args)
    assert (found.q_len, found.kv_len) == lengths
