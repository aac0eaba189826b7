"""Do the kernels touch only memory of their own? A few small calls on a GPU, under NVIDIA's compute-sanitizer.

Run: python -m benchmarks.memory_check   (`make gpu` does, after the tests)

Fails where the checker or a test finds an error. Where there is no checker, or it can't work here, or time runs out, it
says so and passes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from benchmarks.runner import ROOT

FOUND: Final = 86  # what the checker exits with where it finds an error
_TOOL: Final = "compute-sanitizer"
_OPTIONS: Final = ("--tool", "memcheck", "--error-exitcode", str(FOUND), "--report-api-errors", "no")
_PROBE: Final = "import torch; torch.zeros(8, device='cuda').add_(1).sum().item()"
_TESTS: Final = ("tests/test_gpu.py", "-k", "beyond_the_memory")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="to stop after (default: %(default)s)")
    seconds = parser.parse_args(argv).seconds
    tool = shutil.which(_TOOL) or shutil.which(_TOOL, path="/usr/local/cuda/bin")
    if tool is None:
        return _skipped(f"{_TOOL} is not installed")
    try:
        code, said = _checked(tool, ["-c", _PROBE], seconds)
        if code:
            return _skipped(f"{_TOOL} can't work here: a program of one line ends with {code} under it")
        code, said = _checked(tool, ["-m", "pytest", "-q", "-x", "-W", "default", *_TESTS], seconds)
    except subprocess.TimeoutExpired:
        return _skipped(f"not done after {seconds:.0f} s")
    print(said[-4000:])
    print("memory check: " + ("FAILED" if code else "no errors"))
    return 1 if code else 0


def _checked(tool: str, words: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit status and output of Python under the checker.

    Without torch's cache of memory: in one large block, neighbours would hide errors.
    """
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MASKFLASH_TEST_DEVICE": "cuda"}
    with subprocess.Popen(
        [tool, *_OPTIONS, sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the checker's own child too
            raise
    return process.returncode, said


def _skipped(reason: str) -> int:
    print(f"memory check: skipped, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
