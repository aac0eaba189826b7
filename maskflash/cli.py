"""The command line: arguments in, exit status out (0 all well, 1 a check failed, 2 wrong usage)."""

import argparse
import sys
from collections.abc import Sequence

import maskflash
from maskflash.errors import MaskflashError

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: The arguments; None takes the process's own.

    Returns:
        The exit status.
    """
    args = _parser().parse_args(argv)
    if args.command == "doctor":
        return _doctor()
    # Imported here so that --help and --version answer without loading rich.
    from maskflash.demo.job import run

    try:
        return run(tokens=args.tokens, dtype=args.dtype, seed=args.seed, as_json=args.json)
    except MaskflashError as error:
        print(f"maskflash {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="maskflash", description="Flexible-mask attention, compiled.")
    parser.add_argument("--version", action="version", version=f"maskflash {maskflash.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="run packed documents through forward, backward and every check",
        description="Pack the Python standard library's source files into one sequence, compile a causal-document "
        "mask, run attention forward and backward on the CPU, check every result against a dense float64 "
        "reference, and compare time and memory with torch's SDPA under the dense mask.",
    )
    demo.add_argument("--tokens", type=_length, default=8192, help="sequence length (default: %(default)s)")
    demo.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of documents and weights (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print the figures as JSON")
    commands.add_parser(
        "doctor",
        help="say what this machine can run, and why not the rest",
        description="Look at versions, backends, devices and the kernel cache, and run a small attention on each "
        "device. Exits with 1 if something is broken; a machine without a GPU is not.",
    )
    return parser


def _doctor() -> int:
    from maskflash.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'yes' if finding.works else 'no ':<4}{finding.name:<18}{finding.text}")
    return 1 if any(not finding.works and finding.name != "triton" for finding in findings) else 0


def _length(text: str) -> int:
    try:
        tokens = int(text)
    except ValueError:
        tokens = 0
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"a sequence has at least one token, got {text!r}")
    return tokens
