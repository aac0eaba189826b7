"""This machine -> what maskflash can run on it, and why not the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass

import torch

import maskflash as mf
from maskflash.backends.triton import modules
from maskflash.backends.triton import run as triton
from maskflash.backends.triton.render import template_folder
from maskflash.engines.named import ENGINES
from maskflash.errors import MaskflashError
from maskflash.testing import Shape, assert_matches_dense


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: whether it works, and what was found."""

    name: str
    works: bool
    text: str


def examine() -> list[Finding]:
    """Look at versions, backends, devices and the kernel cache. Runs a small attention on each device that can."""
    findings = [
        Finding(
            "versions",
            True,
            f"maskflash {mf.__version__}, torch {torch.__version__}, {_triton_version()}, "
            f"Python {platform.python_version()}",
        ),
        _attention("cpu", torch.device("cpu")),
        _templates(),
        _cache(),
    ]
    engines = _engines()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch finds no CUDA device" if built else "this torch is built without CUDA"
        return [
            *findings,
            Finding("triton", False, f"{reason}; {triton.unavailable(torch.device('cpu')) or 'interpreter'}"),
            *engines,
        ]
    gpus = (_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return [*findings, *gpus, *engines]


def _engines() -> list[Finding]:
    """Other libraries' engines on each kind of device that is there; none of them is run."""
    kinds = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    found = []
    for name, engine in ENGINES.items():
        reasons = {kind: engine.unavailable(torch.device(kind)) for kind in kinds}
        served = [kind for kind, reason in reasons.items() if reason is None]
        text = f"takes a mask as {engine.form}, on {' and '.join(served)}" if served else str(reasons[kinds[0]])
        found.append(Finding(f"engine {name}", bool(served), text))
    return found


def _gpu(device: torch.device) -> Finding:
    facts = torch.cuda.get_device_properties(device)
    name = f"triton on {device}"
    shared = getattr(facts, "shared_memory_per_block_optin", "unknown")
    kind = f"compute capability {facts.major}.{facts.minor}"
    if torch.version.hip is not None:
        kind = f"{facts.gcnArchName} (ROCm {torch.version.hip}; its kernels have been compiled, and never run)"
    about = (
        f"{facts.name}, {kind}, {facts.multi_processor_count} multiprocessors, "
        f"{facts.total_memory / 2**30:.0f} GiB, {shared} bytes of shared memory for a program"
    )
    reason = triton.unavailable(device)
    if reason is not None:
        return Finding(name, False, f"{about}: {reason}")
    found = _attention(name, device)
    return Finding(name, found.works, f"{about}: {found.text}")


def _attention(name: str, device: torch.device) -> Finding:
    """Forward and backward of a small causal attention against dense float64."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    shape = Shape(batch=1, heads=2, kv_heads=1, q_len=200, kv_len=200, head_dim=64, v_head_dim=64)
    try:
        assert_matches_dense(mf.causal(), shape, dtype=dtype, device=str(device))
    except (AssertionError, MaskflashError, RuntimeError) as error:
        return Finding(name, False, f"attention fails: {error}")
    amx = ", AMX" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else ""
    threads = f", {torch.get_num_threads()} threads{amx}" if device.type == "cpu" else ""
    return Finding(name, True, f"forward and backward agree with dense float64{threads}")


def _templates() -> Finding:
    try:
        return Finding("templates", True, str(template_folder()))
    except MaskflashError as error:
        return Finding("templates", False, str(error))


def _cache() -> Finding:
    kept = modules.load("# written by maskflash doctor to see that kernels can be kept\n").__file__
    if str(kept).startswith("<"):
        return Finding("kernel cache", True, f"in memory: no folder can be written; set ${modules.VARIABLE} to one")
    source = f"from ${modules.VARIABLE}" if os.environ.get(modules.VARIABLE) else "the default"
    return Finding("kernel cache", True, f"{modules.folder()} ({source})")


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "triton of unknown version"
