"""`maskflash warm` and `Attention.warm`: kernels are compiled ahead, and found where a call looks for them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import maskflash as mf
from maskflash import cli
from maskflash.backends.triton import launch
from maskflash.backends.triton.tiles import SHARED_LIMITS
from maskflash.cli.masks import load
from maskflash.cli.parser import ARCHS, USUAL


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Caches of this test alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("MASKFLASH_CACHE_DIR", str(tmp_path / "maskflash"))


def test_without_a_gpu_an_architecture_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["warm"]) == 2
    assert "no CUDA device here to compile for; name one, such as --arch sm_90" in capsys.readouterr().err


def test_wrong_usage_is_told_before_anything_is_compiled(capsys, tmp_path):
    assert cli.main(["warm", "causal", "no_such_mask", "--arch", "sm_90"]) == 2
    assert "there is no preset 'no_such_mask'" in capsys.readouterr().err
    assert not (tmp_path / "triton").exists()


def test_what_may_be_named_can_be_compiled_for():
    assert {int(arch.removeprefix("sm_")) for arch in ARCHS} <= set(SHARED_LIMITS)
    assert all(isinstance(load(text).mask, mf.Mask) for text in USUAL)


# A process on a device with Triton's own driver for it, but for loading and launching.
ON_THE_DEVICE = """
    import contextlib, torch, maskflash as mf
    from maskflash.backends.triton import device

    device.compile_only(90)
    q, k, v = torch.zeros(3, 1, 2, 40, 16, dtype=torch.bfloat16).unbind()
    attn = mf.compile(mf.causal(), backend="triton")

    def asked(*tensors):
        with device.asked_for() as kernels:
            attn(*tensors)
        return kernels

    print(asked(q, k, v), asked(q, k, v))

    device.capturing = lambda device: True  # the same stream records a graph from now on
    torch.cuda.device = lambda device: contextlib.nullcontext()
    device.current = lambda of: device._recording(of)
    print(asked(q, k, v))
    try:
        asked(q.float(), k.float(), v.float())
    except mf.BackendError as error:
        print(error)
"""


def in_a_process(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_later_process_finds_what_was_compiled_and_a_capture_compiles_nothing(capsys):
    words = ["warm", "causal", "--head-dim", "16", "--arch", "sm_90", "--forward", "--json"]
    assert cli.main([*words, "--dtype", "bfloat16", "--dtype", "float16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "sm_90"
    assert found["folder"] == os.environ["TRITON_CACHE_DIR"]
    assert [(share["mask"], share["dtype"], share["compiled"], share["found"]) for share in found["shares"]] == [
        ("causal()", dtype, 1, 0) for dtype in ("bfloat16", "float16")
    ]
    later, captured, refused = in_a_process(ON_THE_DEVICE)
    assert later == "[True] []"  # on disk, then in the process
    assert captured == "[]"
    assert "a CUDA graph is being captured, and a kernel of this call has not run yet" in refused


def test_an_op_is_warmed_by_a_call_on_zeros(monkeypatch):
    calls = []
    attn = mf.compile(mf.causal())
    monkeypatch.setattr(type(attn), "__call__", lambda self, q, k, v, **more: calls.append((q, k, v, more)) or q * 1)
    attn.warm(7, 9, head_dim=16, v_head_dim=8, heads=4, kv_heads=2, batch=3, backward=False, q_offset=2)
    ((q, k, v, more),) = calls
    assert [x.shape for x in (q, k, v)] == [(3, 4, 7, 16), (3, 2, 9, 16), (3, 2, 9, 8)]
    assert q.dtype == torch.bfloat16
    assert not q.requires_grad
    assert more["q_offset"] == 2


@pytest.mark.parametrize(("backward", "passes"), [(False, {"forward"}), (True, {"forward", "dkdv", "dq"})])
def test_warming_runs_backward_too_unless_told(device, monkeypatch, backward, passes):
    seen, run = set(), launch.Launcher.run
    monkeypatch.setattr(launch.Launcher, "run", lambda self, name, own: seen.add(name) or run(self, name, own))
    attn = mf.compile(mf.causal() & mf.document([10, 14]), backend="triton", block_size=16)
    attn.warm(24, 24, head_dim=16, dtype=torch.float32, backward=backward, device=device)
    assert seen == passes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head_dim": -1}, "Attention.warm: head_dim is -1, expected at least 0"),
        ({"head_dim": 8, "heads": 3, "kv_heads": 2}, "q has 3 heads and k 2"),
        ({"head_dim": 8, "dtype": torch.int32}, "Attention.warm: dtype is"),
    ],
)
def test_what_a_call_refuses_is_refused(given, message):
    with pytest.raises(mf.MaskflashError, match=message):
        mf.compile(mf.causal()).warm(8, 8, **given)
