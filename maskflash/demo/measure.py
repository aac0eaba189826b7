"""Measures a workload's time, maskflash and SDPA by turns in one process, and its peak memory, each in a fresh one."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import maskflash as mf
from maskflash.demo.documents import pack
from maskflash.demo.workload import CONTENDERS, Forward, Workload, build, packed

PAIRS = 3  # timings of each contender: benchmarks/ has the figures, this shows them in a minute
STATUS = Path("/proc/self/status")  # Linux's account of a process's memory


@dataclass(frozen=True, slots=True)
class Times:
    """Medians in seconds; `total` is the median of the sums, not the sum of the medians."""

    forward: float
    backward: float
    total: float


def analysis_seconds(ids: Tensor) -> tuple[float, mf.BlockMap]:
    """Median time to turn the predicate and its documents into a block map, and that map."""
    seconds, length = [], ids.shape[1]
    for _ in range(PAIRS):
        start = time.perf_counter()
        block_map = packed.block_map(length, length, doc=ids)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), block_map


def compare_times(work: Workload, tick: Callable[[], None]) -> dict[str, Times]:
    """Time forward and backward of every contender, alternating, after one call each that isn't counted.

    Args:
        work: the inputs; the gradient arrives at out alone, since SDPA returns no lse.
        tick: called after each round.

    Returns:
        Medians by contender.
    """
    forwards = {name: make(work) for name, make in CONTENDERS.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
    for counted in range(PAIRS + 1):
        for name, forward in forwards.items():
            sample = _timed_step(forward, work)
            if counted:
                samples[name].append(sample)
        tick()
    return {
        name: Times(
            forward=statistics.median(forward for forward, _ in pairs),
            backward=statistics.median(backward for _, backward in pairs),
            total=statistics.median(forward + backward for forward, backward in pairs),
        )
        for name, pairs in samples.items()
    }


def peak_bytes(contender: str, tokens: int, dtype: torch.dtype, seed: int) -> int | None:
    """Resident memory that one forward and backward add at their peak, in a fresh process.

    The mask counts (block map or dense); the inputs, and code loaded by a first small step, don't.

    Args:
        contender: a key of CONTENDERS.
        tokens: length of the sequence.
        dtype: of the inputs.
        seed: of documents and weights.

    Returns:
        Bytes; None where the system doesn't report a process's peak (other than Linux).
    """
    if not STATUS.exists():
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, contender, tokens, dtype, seed, torch.get_num_threads()).result()


def _peak_of_this_process(contender: str, tokens: int, dtype: torch.dtype, seed: int, threads: int) -> int:
    torch.set_num_threads(threads)
    small = build(pack(64, seed), dtype, seed)
    _timed_step(CONTENDERS[contender](small), small)
    work = build(pack(tokens, seed), dtype, seed)
    before = _resident("VmRSS")
    _timed_step(CONTENDERS[contender](work), work)
    return max(0, _resident("VmHWM") - before)


def _timed_step(forward: Forward, work: Workload) -> tuple[float, float]:
    """Seconds of one forward and of its backward."""
    start = time.perf_counter()
    out = forward()
    middle = time.perf_counter()
    torch.autograd.grad(out, (work.q, work.k, work.v), work.dout)
    return middle - start, time.perf_counter() - middle


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
