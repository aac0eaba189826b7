"""What else is worth knowing of this device? Cold starts, small calls, other libraries' engines, and other tiles.

Run: python -m benchmarks.gpu_tune --folder benchmarks/results   (`make gpu-tune` does)

`tuning.jsonl` has a line for each thing measured, as it is:

    start    seconds until the first forward and backward of a new process, with empty caches and with full ones
    small    seconds of a small call, and of its replay in a CUDA graph
    backend  seconds of one pass by another library's engine, or by ours: see engines.py
    tile     seconds of one pass with one tile: the table's and its neighbours

Tiles are first compiled in processes side by side, each taking its share of every pass, then timed by one alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, product
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

import maskflash as mf
from benchmarks import device, engines, runner, workloads
from benchmarks.runner import ROOT
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import modules, tile_choice
from maskflash.backends.triton.tiles import Tile

AHEAD: Final = 0.4  # of the time, at most, for compiling tiles
BESIDE: Final = 0.25  # likewise, for other libraries' engines
SHARES: Final = 4  # processes that compile the tiles of one case
CALLS: Final = 200  # of a small one
START: Final = """
import time
start = time.perf_counter()
import torch, maskflash as mf
imported = time.perf_counter()
torch.zeros((), device="{on}")
ready = time.perf_counter()
q, k, v = (torch.randn(1, 2, {tokens}, {dim}, dtype=torch.{dtype}, device="{on}").requires_grad_() for _ in range(3))
mf.compile(mf.causal(), backend="triton")(q, k, v).sum().backward()
torch.cuda.synchronize() if q.is_cuda else None
print(imported - start, ready - imported, time.perf_counter() - ready)
"""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A call whose tiles are tried: a mask by name, tokens, heads, head dim."""

    mask: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int


CASES: Final = (
    Tuned("causal document", 8192, 16, 16, 128),
    Tuned("full", 8192, 16, 16, 128),
    Tuned("causal document", 8192, 32, 32, 64),
    Tuned("causal", 8192, 16, 16, 128),
    Tuned("full", 8192, 32, 32, 64),
    Tuned("causal document", 8192, 8, 8, 256),
)
DRY: Final = (Tuned("causal", 32, 2, 1, 16),)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device.add_options(parser)
    options = parser.parse_args(argv)
    called, clock = device.name(options.dry), device.Clock(options.seconds)
    lines = device.Lines((options.folder or ROOT / "benchmarks/results") / device.slug(called) / "tuning.jsonl")
    lines.write(**runner.conditions(options.dry) | {"device": called, "seconds": options.seconds})
    with _noted(lines, "start"):
        _starts(lines, clock, options.dry)
    with _noted(lines, "small"):
        _small_calls(lines, options.dry)
    with _noted(lines, "engines"):
        _engines(lines, clock, options)
    cases = DRY if options.dry else CASES
    shares = product(cases, range(SHARES), [options.dry])
    done = sum(1 for _ in device.side_by_side(_compile_share, shares, min(clock.left, AHEAD * options.seconds)))
    lines.write(compiled=done, of=len(cases) * SHARES)
    for case in cases:
        if not clock.left:
            lines.write(left_out=str(case))
            continue
        with _noted(lines, str(case)), _each_tile(partial(_timed, lines, case, clock)):
            _call(case, options.dry)
    return 0


@contextmanager
def _noted(lines: device.Lines, what: str) -> Iterator[None]:
    """Go on after an error, with a line that says it."""
    try:
        yield
    except Exception as error:
        lines.write(what=what, failed=device.first_line(error))


def _starts(lines: device.Lines, clock: device.Clock, dry: bool) -> None:
    """New processes: the first compiles, the second finds on disk what the first has left."""
    on, tokens, dim, dtype = ("cpu", 32, 16, "float16") if dry else ("cuda", 4096, 128, "bfloat16")
    script = START.format(on=on, tokens=tokens, dim=dim, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": folder, modules.VARIABLE: folder}
        for state in ("empty", "full"):
            done = subprocess.run(
                [sys.executable, "-c", script],
                cwd=ROOT,
                env={**os.environ, **caches, "PYTHONPATH": os.fspath(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
                timeout=max(1.0, clock.left / 2),
                check=True,
            )
            imports, ready, first = map(float, done.stdout.split())
            lines.write(start=state, imports=round(imports, 3), device=round(ready, 3), first_call=round(first, 3))


def _small_calls(lines: device.Lines, dry: bool) -> None:
    """A causal call of 64 tokens: by Python, and replayed."""
    on, calls = ("cpu", 1) if dry else ("cuda", CALLS)
    q, k, v = (torch.randn(1, 4, 64, 32, dtype=torch.float16, device=on) for _ in range(3))
    attn = mf.compile(mf.causal(), backend="triton", block_size=64)
    call = partial(attn, q, k, v)
    lines.write(small="forward", seconds=_mean(call, calls))
    if dry:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    lines.write(small="forward, replayed", seconds=_mean(graph.replay, calls))


def _engines(lines: device.Lines, clock: device.Clock, options: argparse.Namespace) -> None:
    """Other libraries' engines beside ours, those that are installed."""
    tokens, names = (64, ["auto"]) if options.dry else (8192, engines.here())
    for result in engines.measured(tokens, min(clock.left, BESIDE * options.seconds), names):
        lines.write(**result)


def _mean(function: Callable[[], object], calls: int) -> float:
    function()
    wait: Callable[[], object] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - start) / calls


def _call(case: Tuned, dry: bool) -> None:
    """One call whose tiles are chosen by measuring them."""
    on, dtype = ("cpu", torch.float16) if dry else ("cuda", torch.bfloat16)

    def tensor(heads: int) -> Tensor:
        return torch.randn(1, heads, case.tokens, case.dim, dtype=dtype, device=on, requires_grad=True)

    documents = mf.document(workloads.document_lengths(case.tokens, seed=0))
    mask = {"full": mf.full(), "causal": mf.causal(), "causal document": mf.causal() & documents}[case.mask]
    q, k, v = tensor(case.heads), tensor(case.kv_heads), tensor(case.kv_heads)
    with torch.no_grad():
        mf.compile(mask, backend="triton", tune=True, block_size=32 if dry else 128)(q, k, v)


Tried = Callable[[str, Tile, Callable[[], None], torch.device], float]
"""A pass, a tile, what launches it, on which device -> seconds."""


@contextmanager
def _each_tile(tried: Tried) -> Iterator[None]:
    """Ask this for the seconds of each tile, and let nothing that was measured before stand in the way, or be kept."""

    def seconds(function: Any, on: torch.device) -> float:
        pass_name, tile = function.args[:2]
        return tried(pass_name, tile, function, on)

    def forgotten(case: tile_choice.Case, tile: Tile) -> None:
        tile_choice.remember(case, tile)

    with tempfile.TemporaryDirectory() as folder:
        environment = patch.dict(os.environ, {modules.VARIABLE: folder})
        with environment, patch.object(gpu, "seconds", seconds), patch.object(tile_choice, "keep", forgotten):
            yield


def _timed(
    lines: device.Lines,
    case: Tuned,
    clock: device.Clock,
    pass_name: str,
    tile: Tile,
    launch: Callable[[], None],
    on: torch.device,
) -> float:
    if not clock.left:
        return float("inf")
    what = {"pass": pass_name, "tile": asdict(tile), **asdict(case)}
    try:
        found = _SECONDS(launch, on)
    except Exception as error:
        lines.write(**what, failed=device.first_line(error))
        raise
    lines.write(**what, seconds=found)
    return found


_SECONDS: Final = gpu.seconds


def _compile_share(job: tuple[Tuned, int, bool]) -> None:
    """Launch every so many-th tile of each pass once."""
    case, share, dry = job
    numbers = count()

    def compiled(pass_name: str, tile: Tile, launch: Callable[[], None], on: torch.device) -> float:
        if next(numbers) % SHARES == share:
            launch()
        return 1.0  # all alike: the table's own, which comes first, is chosen

    with _each_tile(compiled):
        _call(case, dry)


if __name__ == "__main__":
    sys.exit(main())
