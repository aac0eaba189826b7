"""One figure that only a fresh process shows -> a number on standard output.

    python -m benchmarks.fresh import CACHE                    seconds of `import maskflash` after `import torch`
    python -m benchmarks.fresh first CACHE TOKENS SEED         seconds of compile and first call, imports aside
    python -m benchmarks.fresh memory maskflash TOKENS SEED    bytes that the block map adds to the process's peak
    python -m benchmarks.fresh memory flex TOKENS SEED         the same for FlexAttention
    python -m benchmarks.fresh memory CASE TOKENS SEED         the same for a mask of benchmarks/million.py
    python -m benchmarks.fresh memory soft-cap TOKENS SEED     the same for a step of attention with that score

CACHE is a folder for maskflash's byte code: an installed package has it, a checkout whose environment forbids writing
it would compile its sources at every import.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STATUS = Path("/proc/self/status")  # Linux's account of a process's memory
RESOLUTION = 2**20  # bytes; the system's account of resident memory is no finer
SMALL = 1024  # tokens of the step that loads code before memory is measured


def main(measure: str, *words: str) -> float:
    if measure == "import":
        return _import(*words)
    if measure == "first":
        return _first(words[0], int(words[1]), int(words[2]))
    return _memory(words[0], int(words[1]), int(words[2]))


def _import(cache: str) -> float:
    import torch  # noqa: F401

    _keep_byte_code_in(cache)
    start = time.perf_counter()
    import maskflash  # noqa: F401

    return time.perf_counter() - start


def _first(cache: str, tokens: int, seed: int) -> float:
    import torch

    _keep_byte_code_in(cache)
    import maskflash as mf
    from benchmarks import workloads

    work = workloads.inputs(tokens, torch.float32, seed)
    predicate = workloads.document_predicate(workloads.document_ids(tokens, seed))
    start = time.perf_counter()
    mf.compile(predicate)(work.q, work.k, work.v)
    return time.perf_counter() - start


def run(*words: str) -> float:
    """One measurement in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.fresh", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout))


def _memory(side: str, tokens: int, seed: int) -> float:
    from torch.nn.attention.flex_attention import create_block_mask

    import maskflash as mf
    from benchmarks import million, scores, workloads

    known = ("maskflash", "flex", "soft-cap")
    makers = {} if side in known else {n: million.maker(side, n, seed) for n in (SMALL, tokens)}
    steps = {n: scores.capped_step(n, seed) for n in (SMALL, tokens)} if side == "soft-cap" else {}

    def analyse(length: int) -> object:
        if steps:
            return steps[length]()
        if makers:
            return makers[length]().block_map(length, length)
        predicate = workloads.document_predicate(workloads.document_ids(length, seed))
        if side == "maskflash":
            return mf.mask(predicate).block_map(length, length, block_size=workloads.TILE)
        return create_block_mask(predicate, None, None, length, length, device="cpu", BLOCK_SIZE=workloads.TILE)

    analyse(SMALL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that imports have freed would be taken again uncounted
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):  # where it is forbidden, the peak of imports counts too
        STATUS.with_name("clear_refs").write_text("5")  # the peak so far starts anew
    result = analyse(tokens)
    peak = _resident("VmHWM")
    del result
    return float(max(peak - before, RESOLUTION))


def _keep_byte_code_in(cache: str) -> None:
    sys.pycache_prefix, sys.dont_write_bytecode = cache, False


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
