"""Do the kernels touch only memory of their own? A few small calls on a GPU, under NVIDIA's compute-sanitizer.

Run: python -m benchmarks.memory_check   (`make gpu-test` does, after the tests)

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

from benchmarks.device import Clock
from benchmarks.runner import ROOT

FOUND: Final = 86  # what the checker exits with where it finds an error
_TOOL: Final = "compute-sanitizer"
_OPTIONS: Final = ("--tool", "memcheck", "--error-exitcode", str(FOUND), "--report-api-errors", "no")
_PROBE: Final = "import torch; torch.zeros(8, device='cuda').add_(1).sum().item()"
_TESTS: Final = ("tests/test_gpu.py", "-k", "beyond_the_memory")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="to stop after (default: %(default)s)")
    outcome, why = check(parser.parse_args(argv).seconds)
    print(f"memory check: {outcome}{why and f', {why}'}")
    return 1 if outcome == "failed" else 0


def check(seconds: float) -> tuple[str, str]:
    """Whether it "passed", "failed" or was "skipped", and why: where it failed, the end of what was said."""
    tool = shutil.which(_TOOL) or shutil.which(_TOOL, path="/usr/local/cuda/bin")
    if tool is None:
        return "skipped", f"{_TOOL} is not installed"
    clock = Clock(seconds)
    try:
        code, said = _checked(tool, ["-c", _PROBE], clock.left)
        if code:
            return "skipped", f"{_TOOL} can't work here: a program of one line ends with {code} under it"
        code, said = _checked(tool, ["-m", "pytest", "-q", "-x", "-W", "default", *_TESTS], clock.left)
    except subprocess.TimeoutExpired:
        return "skipped", f"not done after {seconds:.0f} s"
    return ("failed", said[-4000:]) if code else ("passed", "")


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


if __name__ == "__main__":
    sys.exit(main())
