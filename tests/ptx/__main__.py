"""Run the Triton tests on compiled kernels, without a GPU: what Triton makes of them for an architecture, emulated.

    python -m tests.ptx                          everything, for sm_80 and sm_90
    python -m tests.ptx --arch sm_86 -k strides  one architecture, some tests
    python -m tests.ptx --quick                  the part that `make test` runs

Other arguments go to pytest: `-x`, `-n 8`, `--durations 10`. With `-rP` the tests of sabotage list what is redundant.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
ARCHS: Final = ("sm_80", "sm_86", "sm_89", "sm_90")
KERNELS: Final = (  # tests that launch them
    *("run", "interval_kernel", "compiled_once", "launch", "sinks", "scores", "few", "fp8", "paged_in_8_bits"),
    "three_products",
)
FILES: Final = (
    *(f"tests/backends/triton/test_{name}.py" for name in KERNELS),
    "tests/ptx/test_sabotage.py",
    "tests/ptx/test_roles.py",
    "tests/ptx/test_hopper.py",
    "tests/ptx/test_hopper_backward.py",
)
QUICK: Final = {  # bfloat16, which no other test of `make test` can run, one kernel's sabotage, a score that learns
    "sm_80": "dtype2 and (three or query) or sabotage and not dkdv and not dq or scores_match and alibi and not paper",
    "sm_90": (
        "dtype2 and (three or runs) or dropped and (dq or delta) or scores_match and pairs and not factor"
        " or of_two_roles or before_its_product or hopper and not backward and (intervals or order or bytes)"
        " or hopper_backward and (ragged or without or order and keys)"
        " or fp8 and different_size or such_products and ragged"
    ),
}


def main(words: list[str] | None = None) -> int:
    """Run pytest once for each architecture; return the worst status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["sm_80", "sm_90"], help="architectures")
    parser.add_argument("--quick", action="store_true", help="the part that `make test` runs")
    parser.add_argument("-k", metavar="EXPRESSION", help="which tests, as pytest takes it")
    options, rest = parser.parse_known_args(words)
    return max(_run(arch, options.k or (QUICK.get(arch) if options.quick else None), rest) for arch in options.arch)


def _run(arch: str, chosen: str | None, rest: list[str]) -> int:
    print(f"{arch}:", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", *FILES, *(["-k", chosen] if chosen else []), *rest]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"MASKFLASH_TEST_DEVICE": arch, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
