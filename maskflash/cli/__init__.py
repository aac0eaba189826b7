"""The command line: arguments in, exit status out (0 all well, 1 a result is wrong, 2 wrong usage)."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from maskflash.cli.parser import parser
from maskflash.errors import MaskflashError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: The arguments; None takes the process's own.

    Returns:
        The exit status.
    """
    args = parser().parse_args(argv)
    try:
        status = _run(args)
        sys.stdout.flush()  # here, so that a pipe that was closed is noticed below
        return status
    except MaskflashError as error:
        print(f"maskflash {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: Namespace) -> int:
    # Each command is imported when it is run: --help and --version answer without rich, and without the demo.
    if args.command == "demo":
        from maskflash.demo.job import run

        return run(tokens=args.tokens, dtype=args.dtype, seed=args.seed, output=args.output, as_json=args.json)
    status: int = import_module(f"maskflash.cli.{args.command}").run(args)
    return status
