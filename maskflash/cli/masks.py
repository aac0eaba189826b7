"""MASK and SCORE on the command line, presets or file.py:function -> what is meant, and its lengths."""

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
from maskflash.api import compile
from maskflash.cli.expression import Written, parse, parse_score
from maskflash.errors import ArgumentError, ArgumentTypeError, BackendError, MaskflashError
from maskflash.functions.function import Function
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import mask
from maskflash.scores.score import Score, as_score

_IN_FILE: Final = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")
TOKENS: Final = 4096  # where neither the mask nor the options say how many


@dataclass(frozen=True, slots=True)
class Subject:
    """A mask, perhaps with a score function, and the sizes of the attention call they are for."""

    mask: Mask
    score: Score | None
    q_len: int
    kv_len: int
    batch: int
    heads: int

    @property
    def visible(self) -> Mask:
        """The mask, and what the score function leaves of it."""
        return self.mask if self.score is None else compile(self.mask, score=self.score).mask

    def block_map(self, block_size: tuple[int, int]) -> BlockMap:
        """The map of what is visible."""
        sizes = {"batch": self.batch, "heads": self.heads}
        return self.visible.block_map(self.q_len, self.kv_len, **sizes, block_size=block_size)

    def dense(self, device: torch.device) -> Tensor:
        """(B, H, q_len, kv_len) bool, every pair; B or H is 1 where the mask does not look at it."""
        pairs = self.mask.dense(self.q_len, self.kv_len, batch=self.batch, heads=self.heads, device=device)
        # SDPA copies a mask that is expanded over batch or heads, and takes the longer for it.
        b, h = (slice(1) if stride == 0 else slice(None) for stride in pairs.stride()[:2])
        return pairs[b, h]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        score = {} if self.score is None else {"score": self.score.name}
        return {
            "mask": self.mask.name,
            **score,
            **{name: getattr(self, name) for name in ("q_len", "kv_len", "batch", "heads")},
        }


def subject(args: Namespace) -> Subject:
    """The mask of parsed arguments; lengths that aren't given are what its documents add up to, else 4,096.

    Raises:
        ArgumentError: the text is no mask, or the file has no such function.
        MaskTraceError: the function does something that can't become an expression.
    """
    written = load(args.mask)
    q_len = args.q_len or args.kv_len or written.tokens or TOKENS
    score = None if getattr(args, "score", None) is None else load_score(args.score)
    return Subject(written.mask, score, q_len, args.kv_len or q_len, args.batch, args.heads)


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
    return parse(text) if found is None else Written(_mask_from(Path(found["file"]), found["name"]), None)


def load_score(text: str) -> Score:
    """A score function from its text, likewise."""
    found = _IN_FILE.fullmatch(text.strip())
    if found is None:
        return parse_score(text)
    value = as_score("--score", _value(Path(found["file"]), found["name"]))
    _refuse_arguments(text, value, ("score", "b", "h", "q", "kv"))
    return value


def _mask_from(path: Path, name: str) -> Mask:
    value = _value(path, name)
    if not callable(value):
        raise ArgumentTypeError(
            f"{path}:{name} is a {type(value).__name__}, expected a mask or a function f(b, h, q, kv) -> bool"
        )
    found = mask(value)
    _refuse_arguments(f"{path}:{name}", found, ("b", "h", "q", "kv"))
    return found


def _refuse_arguments(text: str, found: Function, takes: tuple[str, ...]) -> None:
    """An error for a function with arguments of its own that have no default."""
    missing = [key for key in found.keywords if key not in found.defaults]
    if missing:
        name, indices = text.rpartition(":")[2], ", ".join(takes)
        given = ", ".join(f"{key}={key}" for key in missing)
        raise ArgumentTypeError(
            f"{text} needs {', '.join(missing)}, which the command line can't pass; define a function that does,"
            f" as def with_arguments({indices}): return {name}({indices}, {given})"
        )


def _value(path: Path, name: str) -> Any:
    """What a file defines by a name."""
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
    return getattr(module, name)
