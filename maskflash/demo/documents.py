"""Packs real documents, pieces of the Python standard library's source, into one sequence of byte tokens."""

import itertools
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskflash.errors import ArgumentError

SHORTEST, LONGEST = 100, 2000  # tokens of a document; shorter files stay whole


@dataclass(frozen=True, slots=True)
class Packed:
    """One sequence of documents laid end to end.

    Attributes:
        tokens: (S,) int64, each a byte.
        ids: (1, S) int32, the number of the document that a token belongs to.
        lengths: tokens in each document; they add up to S.
        files: the file that each document comes from.
    """

    tokens: Tensor
    ids: Tensor
    lengths: tuple[int, ...]
    files: tuple[str, ...]


def pack(tokens: int, seed: int) -> Packed:
    """Fill a sequence with documents of 100 to 2,000 bytes, each a piece of another source file.

    Args:
        tokens: length of the sequence; the last document is cut to fit.
        seed: chooses the files' order, and each piece's place and length.

    Returns:
        The same sequence for the same arguments and the same Python installation.

    Raises:
        ArgumentError: the machine's Python has no source files.

    Example:
        >>> packed = pack(3000, seed=0)
        >>> sum(packed.lengths), packed.tokens.shape, packed.ids.shape
        (3000, torch.Size([3000]), torch.Size([1, 3000]))
    """
    draw = random.Random(seed)
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    if not files:
        raise ArgumentError(f"demo: found no Python source files in {folder}, which it packs as documents")
    draw.shuffle(files)

    text, lengths, names = bytearray(), [], []
    for path in itertools.cycle(files):
        if len(text) == tokens:
            break
        piece = _piece(path.read_bytes(), draw)[: tokens - len(text)]
        text += piece
        lengths.append(len(piece))
        names.append(path.name)
    return Packed(
        tokens=torch.frombuffer(text, dtype=torch.uint8).long(),
        ids=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None],
        lengths=tuple(lengths),
        files=tuple(names),
    )


def _piece(content: bytes, draw: random.Random) -> bytes:
    """A run of bytes of a random length, from a line's beginning where the file is long enough."""
    length = draw.randint(SHORTEST, LONGEST)
    place = draw.randint(0, max(0, len(content) - length))
    start = content.rfind(b"\n", 0, place) + 1
    return content[start : start + length]
