"""Writes that torch doesn't see are found where somebody looks for them, and forgotten on request."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash.op import checking

N = 32


@pytest.fixture
def tensors():
    return torch.randn(3, 1, 1, N, 8).unbind()


@mf.mask
def packed(b, h, q, kv, *, doc):
    return doc[q] == doc[kv] and q >= kv


def dense(tensors, doc):
    return mf.attention(*tensors, packed, doc=doc.clone())


WRITES = {
    "numpy": lambda table: table.numpy().__setitem__(slice(N // 2, None), 1),
    "numpy, by a view": lambda table: table[3:].numpy().__setitem__(slice(N // 2, None), 1),
    ".data": lambda table: table.data.copy_(torch.arange(N) // 5),
    "detached": lambda table: table.detach().numpy().fill(4),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", [False, True])
def test_a_write_that_torch_does_not_see_is_found(write, view, tensors):
    table = torch.arange(N) // 9
    attn = mf.compile(packed, check=True)
    for _ in range(2):
        attn(*tensors, doc=table[:] if view else table)
    WRITES[write](table)
    with pytest.raises(mf.ArgumentError, match="attention: table doc holds something else than in an earlier call"):
        attn(*tensors, doc=table[:] if view else table)
    mf.invalidate()
    assert torch.equal(attn(*tensors, doc=table), dense(tensors, table))


def test_writes_through_torch_and_other_tensors_are_no_fault(tensors):
    table = torch.arange(N) // 9
    attn = mf.compile(packed, check=True)
    for n in range(1, 6):
        table.copy_(torch.arange(N) // n)
        assert torch.equal(attn(*tensors, doc=table), dense(tensors, table))
        table.data = torch.arange(N) // (n + 1)
        assert torch.equal(attn(*tensors, doc=table), dense(tensors, table))
        other = torch.from_numpy(np.arange(N) // n)
        assert torch.equal(attn(*tensors, doc=other), dense(tensors, other))


def test_captured_tables_and_offsets_are_looked_at(tensors):
    ids, offset = torch.arange(N) // 9, torch.tensor([0])
    attn = mf.compile(lambda b, h, q, kv: ids[q % N] == ids[kv] and q >= kv, check=True)
    attn(*tensors, q_offset=offset)
    ids.numpy()[:] = 0
    with pytest.raises(mf.ArgumentError, match="table ids holds something else"):
        attn(*tensors, q_offset=offset)
    mf.invalidate()
    attn(*tensors, q_offset=offset)
    offset.numpy()[:] = 3
    with pytest.raises(mf.ArgumentError, match="table q_offset holds something else"):
        attn(*tensors, q_offset=offset)


def test_invalidate_is_for_all_masks(tensors):
    table = torch.arange(N) // 9
    calls = [
        lambda: mf.attention(*tensors, packed, doc=table),
        lambda: mf.compile(packed & mf.causal())(*tensors, doc=table),
        lambda: mf.attention(*tensors, mf.mask(lambda b, h, q, kv: table[q] == table[kv] and q >= kv)),
    ]
    for call in calls:
        call()
    table.numpy()[:] = np.arange(N) // 2
    mf.invalidate()
    for call in calls:
        torch.testing.assert_close(call(), dense(tensors, table))


def test_what_was_seen_stays_bounded(monkeypatch, tensors):
    monkeypatch.setattr(checking, "_MOST", 4)
    attn = mf.compile(packed, check=True)
    kept = [torch.arange(N) // n for n in range(1, 20)]
    for table in kept:
        attn(*tensors, doc=table)
    assert len(checking._seen) <= 4


def test_under_torch_compile_it_is_refused_by_name(tensors):
    torch._dynamo.reset()
    attn = mf.compile(packed, check=True)
    run = torch.compile(lambda q, k, v, doc: attn(q, k, v, doc=doc), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="set MASKFLASH_CHECK=1"):
        run(*tensors, torch.arange(N))


PROGRAM = """
import sys, torch, maskflash as mf
q, k, v = torch.randn(3, 1, 1, 32, 8).unbind()
doc = torch.arange(32) // 9
mask = mf.mask(lambda b, h, q, kv: doc[q] == doc[kv])
call = lambda q, k, v: mf.attention(q, k, v, mask)
if sys.argv[1] == "compiled":
    call = torch.compile(call, backend="eager", fullgraph=True)
call(q, k, v)
doc.numpy()[:] = 0
try:
    call(q, k, v)
except mf.ArgumentError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_the_environment_turns_it_on_for_every_call(how):
    command = [sys.executable, "-c", PROGRAM, how]
    for value, found in (("1", True), ("0", False), ("", False)):
        run = subprocess.run(command, env={**os.environ, "MASKFLASH_CHECK": value}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("attention: table ") is found
