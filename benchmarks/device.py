"""A device that is lent for minutes -> results as they come: a folder, a line for each, work side by side, a clock.

Its scripts (`gpu_test`, `gpu`, `gpu_tune`) share this. With `--dry` they do all of it small on the CPU, with kernels
interpreted (TRITON_INTERPRET=1) and stand-ins for what only a GPU has, which shows that the scripts themselves work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

import torch

SECONDS: Final = 220.0  # of a script: three of them, the machine's start and the transfers are 15 minutes
PROCESSES: Final = 14  # of 16 cores, as a lent machine has
ALONE: Final = 20.0  # seconds that a process needs to begin with torch, triton and a device


class Clock:
    """The seconds that a script has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the script should be done; 0 where it should be already."""
        return max(0.0, self._end - time.monotonic())


class Lines:
    """A file of results, a line of JSON for each, written at once: what is cut short keeps what it had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        path.write_text("", encoding="utf-8")

    def write(self, **result: Any) -> None:
        """Add one, and print it."""
        append(self.path, result)
        print(" ".join(f"{name}={value}" for name, value in result.items()), flush=True)


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the scripts of a device have in common."""
    parser.add_argument("--seconds", type=float, default=SECONDS, help="to be done after (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="store in a folder of this one, named after the device")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU: does the script work at all?")


def name(dry: bool) -> str:
    """What the device is called; the script ends where there is none."""
    if dry:
        if os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("--dry interprets kernels: set TRITON_INTERPRET=1, as `make gpu-dry` does")
        return "dry run"
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --dry runs without one")
    return torch.cuda.get_device_name()


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def side_by_side(
    function: Callable[[Any], Any], items: Iterable[Any], seconds: float, processes: int = PROCESSES
) -> Iterator[Any]:
    """Call a function with each item in processes of their own, and yield what they return as it comes.

    Each process takes every so many-th item. One that dies leaves its others undone; what a call raises is printed;
    after so many seconds what is not done is ended.
    """
    items, clock, context = list(items), Clock(seconds), multiprocessing.get_context("spawn")
    step = min(processes, len(items), os.cpu_count() or 1)
    working: dict[Any, Any] = {}  # the end of a pipe to hear from -> its process
    for first in range(step):
        hears, says = context.Pipe(duplex=False)
        working[hears] = context.Process(target=_work, args=(function, items[first::step], says), daemon=True)
        working[hears].start()
        says.close()  # so that the pipe ends with its process
    try:
        while working and (ready := wait(list(working), timeout=clock.left)):
            for hears in ready:
                try:
                    result = hears.recv()
                except EOFError:
                    del working[hears]
                    continue
                yield result
    finally:
        for process in working.values():
            process.kill()


def _work(function: Callable[[Any], Any], items: list[Any], says: Any) -> None:
    for item in items:
        try:
            result = function(item)
        except Exception as error:
            print(f"{function.__name__}: {first_line(error)}", file=sys.stderr, flush=True)
        else:
            says.send(result)
