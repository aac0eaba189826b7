"""MASK on the command line, a preset expression or file.py:function -> a mask and the lengths to look at it with."""

from __future__ import annotations

import importlib.util
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.cli.expression import Written, parse
from maskflash.errors import ArgumentError, ArgumentTypeError, BackendError, MaskflashError
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask

_IN_FILE: Final = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")
TOKENS: Final = 4096  # where neither the mask nor the options say how many


@dataclass(frozen=True, slots=True)
class Subject:
    """A mask, and the sizes of the attention call it is for."""

    mask: Mask
    q_len: int
    kv_len: int
    batch: int
    heads: int

    def block_map(self, block_size: tuple[int, int]) -> BlockMap:
        """The mask's map."""
        return self.mask.block_map(self.q_len, self.kv_len, batch=self.batch, heads=self.heads, block_size=block_size)

    def dense(self, device: torch.device) -> Tensor:
        """(B, H, q_len, kv_len) bool, every pair; B or H is 1 where the mask does not look at it."""
        pairs = self.mask.dense(self.q_len, self.kv_len, batch=self.batch, heads=self.heads, device=device)
        # SDPA copies a mask that is expanded over batch or heads, and takes the longer for it.
        b, h = (slice(1) if stride == 0 else slice(None) for stride in pairs.stride()[:2])
        return pairs[b, h]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"mask": self.mask.name, **{name: getattr(self, name) for name in ("q_len", "kv_len", "batch", "heads")}}


def subject(args: Namespace) -> Subject:
    """The mask of parsed arguments; lengths that aren't given are what its documents add up to, else 4,096.

    Raises:
        ArgumentError: the text is no mask, or the file has no such function.
        MaskTraceError: the function does something that can't become an expression.
    """
    written = load(args.mask)
    q_len = args.q_len or args.kv_len or written.tokens or TOKENS
    return Subject(written.mask, q_len, args.kv_len or q_len, args.batch, args.heads)


def device(args: Namespace) -> torch.device:
    """The device that was asked for.

    Raises:
        BackendError: it isn't here.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device: torch finds no CUDA device here; `maskflash doctor` says what runs")
    return torch.device(args.device)


def load(text: str) -> Written:
    """A mask from its text: file.py:function where it looks like one, else an expression of presets."""
    found = _IN_FILE.fullmatch(text.strip())
    return parse(text) if found is None else Written(_from_file(Path(found["file"]), found["name"]), None)


def _from_file(path: Path, name: str) -> Mask:
    if not path.is_file():
        raise ArgumentError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` does: what it imports may lie beside it
    try:
        spec.loader.exec_module(module)
    except MaskflashError:
        raise
    except Exception as error:
        raise ArgumentError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        masks = [key for key, value in vars(module).items() if isinstance(value, Mask)]
        known = f"; its masks are {', '.join(masks)}" if masks else ""
        raise ArgumentError(f"{path} has no {name!r}{known}")
    value = getattr(module, name)
    if not callable(value):
        raise ArgumentTypeError(
            f"{path}:{name} is a {type(value).__name__}, expected a mask or a function f(b, h, q, kv) -> bool"
        )
    found = mask(value)
    missing = [key for key in found.keywords if key not in found.defaults]
    if missing:
        given = ", ".join(f"{key}={key}" for key in missing)
        raise ArgumentTypeError(
            f"{path}:{name} needs {', '.join(missing)}, which the command line can't pass; define a function that does,"
            f" as def with_arguments(b, h, q, kv): return {name}(b, h, q, kv, {given})"
        )
    return found
