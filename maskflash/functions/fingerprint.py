"""An expression and the values of its slots -> a hash of the mask that they are, the same in every process."""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

from maskflash.expr.nodes import Expr

_FORMAT: Final = "maskflash mask 1"  # changes with whatever is hashed, and in what order
_BYTES: Final = 16


def fingerprint(expr: Expr, params: tuple[object, ...], tables: tuple[Tensor, ...]) -> str:
    """Hash an expression's text, its params (numbers, or names of what a call implies), and its tables by content.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(f"{_FORMAT}\n{expr.text}\n{params}\n".encode(), digest_size=_BYTES)
    for table in tables:
        digest.update(f"{table.dtype} {tuple(table.shape)}\n".encode())
        digest.update(contents(table))
    return digest.hexdigest()


def contents(table: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, whatever its strides and its device."""
    plain = table.detach().cpu().contiguous()
    # One element or none may have any stride, and yet count as contiguous.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data
