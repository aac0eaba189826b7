"""What the kernels' tests share: small calls and their results, and how masks are computed in kernels."""

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import launch as triton_launch
from maskflash.backends.triton import modules
from maskflash.backends.triton import plan as triton_plan
from maskflash.backends.triton import run as triton
from maskflash.testing import Shape


@contextmanager
def expressions():
    """Kernels compute masks from their expressions, also where each row sees one interval."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_plan, triton):
            patch.setattr(module, "intervals", lambda found: None)
        mf.invalidate()
        yield
    mf.invalidate()


def in_a_process(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def by_expression():
    with expressions():
        yield


@pytest.fixture(scope="module")
def small(device):
    """q, k and v of a small call."""

    def build(batch=1, heads=2, kv_heads=2, length=40, dim=16, dtype=torch.float32):
        return Shape(batch, heads, kv_heads, length, length, dim, dim).tensors(dtype, device=device)

    return build


@pytest.fixture(scope="module")
def results(device):
    """out, lse, dq, dk and dv of a call, with fixed gradients arriving at out and lse."""

    def run(mask, q, k, v, **kwargs):
        draw = torch.Generator().manual_seed(5)
        dout = torch.randn(*q.shape[:3], v.shape[3], generator=draw).to(q)
        return run_with(mask, q, k, v, dout, torch.randn(q.shape[:3], generator=draw).to(device), **kwargs)

    def run_with(mask, q, k, v, dout, dlse, **kwargs):
        out, lse = mf.attention(q, k, v, mask, backend="triton", return_lse=True, **{"block_size": 16, **kwargs})
        return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))

    run.with_gradients = run_with
    return run


@pytest.fixture
def compiled(monkeypatch):
    """What has been rendered and imported, and all that triton compiles for: constants, types, alignments."""
    triton_launch.kernel.cache_clear()
    rendered, loaded, keys = [], [], set()
    render, load, kernel = triton_launch.render, modules.load, triton_launch.kernel

    def recorded(special, pass_name):
        found = kernel(special, pass_name)

        def launch(programs, tile, **arguments):
            kinds = {
                name: (x.dtype, x.data_ptr() % 16 == 0)
                if isinstance(x, torch.Tensor)
                else x
                if name.isupper()
                else type(x)
                for name, x in arguments.items()
            }
            keys.add((special, pass_name, tile, *kinds.items()))
            return found.launch(programs, tile, **arguments)

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(triton_launch, "render", lambda *args: rendered.append(args) or render(*args))
    monkeypatch.setattr(modules, "load", lambda text: loaded.append(text) or load(text))
    monkeypatch.setattr(triton_launch, "kernel", recorded)
    monkeypatch.setattr(triton, "kernel", recorded)
    return rendered, loaded, keys
