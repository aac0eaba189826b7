"""Tiles that a device or a compiler refuses are replaced by smaller ones; measured ones are kept."""

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

import maskflash as mf
from maskflash.backends.triton import device as triton_device
from maskflash.backends.triton import launch as triton_launch
from maskflash.backends.triton import modules, tile_choice
from maskflash.op import attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of NaN and infinities


REFUSALS = [
    lambda: OutOfResources(300_000, 200_000, "shared memory"),
    lambda: PTXASError("ptxas fatal: (C7600) Register allocation failed"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["memory", "ptxas"])
def test_a_tile_that_does_not_fit_is_shrunk_until_it_does(results, small, monkeypatch, refusal):
    monkeypatch.setattr(tile_choice, "_known", {})
    q, k, v = small()
    expected = results(mf.causal(), q, k, v, block_size=64)
    launch, tried = triton_launch.Launcher.launch, []

    def limited(self, pass_name, tile, *rest):
        tried.append((pass_name, tile))
        if tile.block_m * tile.block_n > 512 or tile.stages > 1:
            raise refusal()
        return launch(self, pass_name, tile, *rest)

    monkeypatch.setattr(triton_launch.Launcher, "launch", limited)
    found = results(mf.causal(), q, k, v, block_size=(64, 128))  # another block size: a plan that knows no tile yet
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in tried} == {"forward", "dkdv", "dq"}
    count = len(tried)
    assert count > 6
    results(mf.causal(), q, k, v, block_size=(64, 128))
    assert len(tried) == count + 3  # it knows now


@pytest.mark.parametrize("refusal", REFUSALS, ids=["memory", "ptxas"])
def test_a_device_that_nothing_fits_is_told(results, small, monkeypatch, refusal):
    def never(*args):
        raise refusal()

    monkeypatch.setattr(triton_launch.Launcher, "launch", never)
    with pytest.raises(mf.BackendError, match=r"no tile of forward fits this device: ") as told:
        results(mf.causal(), *small())
    assert str(refusal()) in str(told.value)


def test_an_error_that_is_not_the_tiles_is_not_tried_again(results, small, monkeypatch):
    tried = []

    def broken(self, pass_name, tile, *rest):
        tried.append(tile)
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(triton_launch.Launcher, "launch", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        results(mf.causal(), *small())
    assert len(tried) == 1


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Tiles with two stages are fastest: (tiles that were timed, tiles that were launched) by pass."""
    monkeypatch.setenv(modules.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tile_choice, "_known", {})
    timed, launched = [], []
    launch = triton_launch.Launcher.launch

    def seconds(function, device):
        tile = function.args[1]
        timed.append(tile)
        return abs(tile.stages - 2) + tile.block_m / 1e3

    def counted(self, pass_name, tile, *rest):
        launched.append((pass_name, tile))
        return launch(self, pass_name, tile, *rest)

    monkeypatch.setattr(triton_device, "seconds", seconds)
    monkeypatch.setattr(triton_launch.Launcher, "launch", counted)
    return timed, launched


def test_tuning_measures_once_and_keeps_the_fastest(small, measured, monkeypatch):
    timed, launched = measured
    q, k, v = small(length=33)

    def run(window, **more):
        attn = mf.compile(mf.sliding_window(window), backend="triton", block_size=64, **more)
        out = attn(q, k, v)
        return out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))

    expected = run(7)
    assert timed == []
    launched.clear()
    found = run(7, tune=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    count = len(timed)
    assert count > 9
    assert all(64 % side == 0 for tile in timed for side in (tile.block_m, tile.block_n))
    assert {name for name, _ in launched} == {"forward", "dkdv", "dq"}
    chosen = dict(launched)
    assert all(tile.stages == 2 or tile.block_m == 16 for tile in chosen.values())
    launched.clear()
    run(7, tune=True)
    assert len(timed) == count
    assert dict(launched) == chosen
    monkeypatch.setattr(tile_choice, "_known", {})  # a later process, and another window
    launched.clear()
    run(5, tune=True)
    assert len(timed) == count
    assert dict(launched) == chosen


def test_nothing_is_measured_while_a_cuda_graph_is_captured(small, measured, monkeypatch):
    monkeypatch.setattr(attention, "capturing", lambda device: True)
    with torch.no_grad():
        mf.compile(mf.causal(), backend="triton", block_size=64, tune=True)(*small())
    assert measured[0] == []
    assert [name for name, _ in measured[1]] == ["forward"]


def test_tiles_that_do_not_compile_are_passed_over(small, measured, monkeypatch):
    seconds, failed = triton_device.seconds, []

    def failing(function, device):
        error = (OutOfResources(300_000, 1, "shared memory"), PTXASError("too many registers"))[len(failed) % 2]
        if function.args[1].stages > 1:
            failed.append(error)
            raise error
        return seconds(function, device)

    monkeypatch.setattr(triton_device, "seconds", failing)
    attn = mf.compile(mf.causal(), backend="triton", block_size=64, tune=True)
    attn(*small()).sum().backward()
    assert len(failed) > 1
    assert all(tile.stages == 1 for _, tile in measured[1][-2:])


def test_calls_that_others_have_made_are_measured_too(small, measured):
    """Their analysis is found by the call's name, which skips what first calls do."""
    timed, counts = measured[0], []
    mask, (q, k, v) = mf.causal(), small()
    for more in ({}, {"tune": True}, {"tune": True}, {"tune": True, "precision": "tf32x3"}):
        with torch.no_grad():
            mf.compile(mask, backend="triton", block_size=64, **more)(q.detach(), k.detach(), v.detach())
        counts.append(len(timed))
    assert counts[0] == 0
    assert 0 < counts[1] == counts[2] < counts[3]
