"""Where the values of a trace's slots come from: names of arguments, names of what is captured, views of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Argument(str):
    """The name of a keyword argument that fills a slot at run time."""


class Captured(Argument):
    """The name of a value that the predicate gets at by itself, read again at each call: no argument can have it."""


def is_captured(name: str) -> bool:
    """Whether a name is that of a captured value; as plain text too."""
    return name.startswith("@")


class View(NamedTuple):
    """A slot that is filled by a view of a tensor, made of it again at each call: its sizes, strides and offset."""

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view."""
        if torch.compiler.is_dynamo_compiling():  # which can't ask for an offset, but counts from the tensor's own
            last = sum((size - 1) * step for size, step in zip(self.size, self.stride, strict=True))
            flat = tensor.as_strided((self.offset + last + 1,), (1,))
            return flat[self.offset :].as_strided(self.size, self.stride)
        return tensor.as_strided(self.size, self.stride, int(tensor.storage_offset()) + self.offset)


class Sources(NamedTuple):
    """Where values come from that a trace meets and that are read again at each call.

    Attributes:
        numbers: names by where a number is read: a cell, or a name and the owner of it.
        tensors: names by the tensor's id.
        values: by name.
        labels: what the user calls them.
    """

    numbers: Mapping[object, Captured] = {}
    tensors: Mapping[int, Captured] = {}
    values: Mapping[Captured, Any] = {}
    labels: Mapping[Captured, str] = {}
