"""How fast are other libraries' engines with the same mask? Ours beside each that is installed.

Run: python -m benchmarks.engines   (the third command of `make gpu` does so too, on a GPU)

A line for each engine, mask and pass: seconds of a call, or why there are none. On a GPU calls are bfloat16, forward
and forward with backward; on the CPU they are float32 and forward alone, which is all that FlexAttention has there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Final, NamedTuple

import torch

import maskflash as mf
from benchmarks import device, runner, workloads
from benchmarks.runner import ROOT
from maskflash.backends.triton import device as gpu
from maskflash.engines.named import ENGINES

MASKS: Final = ("causal", "causal documents", "causal window S/16")
CALLS: Final = 3  # on the CPU, of which the fastest counts


class Job(NamedTuple):
    """A call to be measured: a backend and a mask by name, tokens, heads, head dim."""

    backend: str
    mask: str
    tokens: int
    heads: int
    dim: int
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device.add_options(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="of a call (default: %(default)s)")
    options = parser.parse_args(argv)
    called = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    lines = device.Lines((options.folder or ROOT / "build") / device.slug(called) / "engines.jsonl")
    lines.write(**runner.conditions(options.dry) | {"device": called})
    for result in measured(256 if options.dry else options.tokens, options.seconds, here()):
        lines.write(**result)


def here() -> list[str]:
    """The engines that run here, after the device's own backend."""
    return ["auto", *(name for name, engine in ENGINES.items() if engine.unavailable(_device()) is None)]


def measured(tokens: int, seconds: float, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each call took, one after the other in a process that is ended after so many seconds."""
    heads, dim = (16, 128) if _device().type == "cuda" else (8, 64)
    jobs = [Job(name, mask, tokens, heads, dim) for mask, name in product(MASKS, names)]
    for results in device.side_by_side(results_of, jobs, seconds, processes=1):
        yield from results


def results_of(job: Job) -> list[dict[str, Any]]:
    """The seconds of each pass of one call."""
    on_gpu = _device().type == "cuda"
    mask = workloads.masks(job.tokens, job.seed)[job.mask]
    attn = mf.compile(mask, backend=job.backend, deterministic=job.backend != "fa4")
    shape, dtype = (1, job.heads, job.tokens, job.dim), torch.bfloat16 if on_gpu else torch.float32
    q, k, v = (torch.randn(shape, dtype=dtype, device=_device()) for _ in range(3))
    passes: dict[str, Callable[[], object]] = {"forward": lambda: attn(q, k, v)}
    if on_gpu:
        trained = [x.clone().requires_grad_() for x in (q, k, v)]
        passes["forward and backward"] = lambda: torch.autograd.grad(attn(*trained).sum(), trained)
    found = []
    for name, call in passes.items():
        result: dict[str, Any] = {**job._asdict(), "pass": name}
        try:
            result["seconds"] = _seconds(call)
        except Exception as error:
            result["failed"] = device.first_line(error)
        found.append(result)
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of a call that has been made before."""
    call()
    if _device().type == "cuda":
        return gpu.seconds(call, _device())
    samples = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)


if __name__ == "__main__":
    main()
