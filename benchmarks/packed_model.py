"""Python's standard library -> documents of bytes, packed into sequences; and a small GPT that reads them."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SHORTEST: Final = 64  # bytes of a document
BYTES: Final = 256

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v, (B, H, S, D), under a mask that it knows."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A sequence of whole documents and the start of one more.

    Attributes:
        tokens: (1, S) int64 bytes.
        targets: (1, S) int64, the byte after each; -100 at the end of a document.
        positions: (1, S) int64, from the start of each document.
        lengths: bytes of each document.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    lengths: list[int]

    def document(self) -> Tensor:
        """(S,) the document of each token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))


@cache
def documents() -> tuple[bytes, ...]:
    """The source of the functions and classes of the standard library, those of each file in their order."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_bytes()
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(b"".join(lines[node.lineno - 1 : node.end_lineno]))
    return tuple(text for text in found if len(text) >= SHORTEST)


def batches(tokens: int, seed: int) -> Iterator[Batch]:
    """Sequences without end, the documents shuffled anew for each pass through them."""
    every, draw = documents(), Random(seed)
    kept: list[bytes] = []
    while True:
        for text in draw.sample(every, len(every)):
            room = tokens - sum(map(len, kept))
            kept.append(text[:room])
            if len(text) >= room:
                yield _batch(kept)
                kept = []


def _batch(texts: list[bytes]) -> Batch:
    tokens = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long()
    lengths = [len(text) for text in texts]
    targets = tokens.roll(-1)
    targets[torch.tensor(lengths).cumsum(0) - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(tokens[None], targets[None], positions[None], lengths)


class Gpt(nn.Module):
    """A decoder of bytes, with the positions of tokens in their documents; its attention comes with each call."""

    def __init__(self, tokens: int, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(BYTES, width), nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)

    def forward(self, batch: Batch, attend: Attend) -> Tensor:
        """Logits (1, S, 256) of the byte after each."""
        x = self.byte(batch.tokens) + self.position(batch.positions)
        for layer in self.layers:
            x = layer(x, attend)
        return self.head(self.norm(x))

    def loss(self, batch: Batch, attend: Attend) -> Tensor:
        """Mean cross entropy in nats."""
        return cross_entropy(self(batch, attend).flatten(0, 1), batch.targets.flatten())


class Layer(nn.Module):
    """Attention and a perceptron, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, S, width) to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))
