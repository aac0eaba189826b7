"""Are the kernels right on this device? Their tests side by side, then a memory checker, in so many seconds.

Run: python -m benchmarks.gpu_test --folder benchmarks/results   (`make gpu-test` does)

`checks.jsonl` has a line for each test as it ends: what came of it, how long it took, and what went wrong. Kernels are
compiled where a test first needs them, so as many at once as there are processes. Tests with drawn examples are left
out: each example would compile its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import device, memory_check, runner
from benchmarks.runner import ROOT

KERNELS: Final = (  # tests that launch them
    *("run", "interval_kernel", "compiled_once", "launch", "sinks", "few", "paged", "fp8", "paged_in_8_bits"),
    "three_products",
)
TESTS: Final = (
    "tests/test_gpu.py",
    *(f"tests/backends/triton/test_{name}.py" for name in KERNELS),
)
DRY: Final = ("tests/backends/triton/test_run.py", "-k", "test_empty_lengths or test_what_it_cannot_do_is_told")
CHECKER: Final = 60.0  # seconds that the memory checker may have, out of all


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device.add_options(parser)
    options = parser.parse_args(argv)
    called, clock = device.name(options.dry), device.Clock(options.seconds)
    lines = device.Lines((options.folder or ROOT / "benchmarks/results") / device.slug(called) / "checks.jsonl")
    lines.write(**runner.conditions(options.dry) | {"device": called, "seconds": options.seconds})
    checker = 0 if options.dry else min(CHECKER, options.seconds / 3)
    status = _tests(DRY if options.dry else TESTS, lines.path, clock.left - checker, options.dry)
    lines.write(test="all", outcome={0: "passed", None: "cut short"}.get(status, "failed"))
    outcome, why = memory_check.check(clock.left)
    lines.write(test="memory checker", outcome=outcome, why=why)
    return 0 if status in (0, None) and outcome != "failed" else 1


def _tests(tests: Sequence[str], path: Path, seconds: float, dry: bool) -> int | None:
    """Exit status of pytest; None where it had to be ended."""
    words = ["-q", "-W", "default", "-p", "benchmarks.gpu_plugin", "-p", "no:cacheprovider", "--tb=short"]
    if not dry and importlib.util.find_spec("xdist"):
        words += ["-n", str(device.PROCESSES), "--maxschedchunk=1", "--max-worker-restart=20"]
    environment = {
        **os.environ,
        "MASKFLASH_TEST_DEVICE": "cpu" if dry else "cuda",
        "MASKFLASH_CHECKS": os.fspath(path.resolve()),
        "MASKFLASH_SECONDS": str(seconds - device.ALONE if seconds > 2 * device.ALONE else seconds / 2),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *words, *tests], cwd=ROOT, env=environment, start_new_session=True
    ) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            return None


if __name__ == "__main__":
    sys.exit(main())
