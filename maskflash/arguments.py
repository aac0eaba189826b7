"""What callers pass -> checked values, or an error that says operation, argument, got, expected and fix."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError

BlockSize = int | tuple[int, int]


def integer(operation: str, name: str, value: Any, *, low: int | None = 0) -> int:
    """An int (also numpy's) that is at least `low`; a bool is not one."""
    try:
        number = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, Tensor)):
        fix = "; use `.item()` on a tensor" if isinstance(value, Tensor) else ""
        raise ArgumentTypeError(f"{operation}: {name} is {_kind(value)}, expected an int{fix}")
    if low is not None and number < low:
        raise ArgumentError(f"{operation}: {name} is {number}, expected at least {low}")
    return number


def scale(operation: str, value: Any) -> float:
    """A finite positive float, from any Python or numpy number."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise ArgumentTypeError(f"{operation}: scale is {_kind(value)}, expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{operation}: scale is {value}, expected a finite positive number; negate q instead")
    return float(value)


def block_size(operation: str, value: Any) -> tuple[int, int]:
    """(bq, bkv) in tokens, from an int or a pair."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ArgumentError(f"{operation}: block_size is {value!r}, expected an int or (q_tokens, kv_tokens)")
    rows, columns = (integer(operation, "block_size", side, low=1) for side in pair)
    return rows, columns


def q_offset(operation: str, value: Any, batch: int) -> int | Tensor:
    """An int, or an integer tensor (batch,)."""
    if not isinstance(value, Tensor):
        return integer(operation, "q_offset", value, low=None)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise ArgumentTypeError(f"{operation}: q_offset has dtype {value.dtype}, expected an integer dtype")
    if tuple(value.shape) != (batch,):
        raise ArgumentError(
            f"{operation}: q_offset has shape {tuple(value.shape)}, expected ({batch},), one for each batch row; "
            "pass an int where all rows share it"
        )
    return value


def int_table(operation: str, name: str, value: Any, dims: Sequence[int]) -> Tensor:
    """An integer tensor with a number of dimensions out of `dims`, from a tensor or (nested) sequences of ints."""
    table = value
    if not isinstance(table, Tensor):
        try:
            table = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentTypeError(
                f"{operation}: {name} is {_kind(value)}, expected integers in a tensor or in lists of equal length"
            ) from None
        table = table.long() if table.numel() == 0 else table
    if table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool:
        raise ArgumentTypeError(f"{operation}: {name} has dtype {table.dtype}, expected an integer dtype")
    if table.ndim not in dims:
        expected = " or ".join(f"{n}-d" for n in dims)
        raise ArgumentError(f"{operation}: {name} has shape {tuple(table.shape)}, expected a {expected} tensor")
    return table


def mask_args(
    operation: str, given: dict[str, Any], keywords: tuple[str, ...], defaults: dict[str, Any]
) -> dict[str, Any]:
    """A mask's keyword arguments in its own order, defaults filled in."""
    for name in given:
        if name not in keywords:
            known = ", ".join(keywords) or "none"
            raise ArgumentTypeError(f"{operation}: unexpected argument {name!r}; the mask's own arguments are: {known}")
    values = {**defaults, **given}
    missing = [name for name in keywords if name not in values]
    if missing:
        example = f"{missing[0]}=..."
        raise ArgumentTypeError(f"{operation}: the mask needs {', '.join(missing)}; pass it by name: {example}")
    for name, value in values.items():
        if not (isinstance(value, (Tensor, bool, int, float)) or value is None or hasattr(value, "__index__")):
            raise ArgumentTypeError(
                f"{operation}: {name} is {_kind(value)}, expected a tensor or a number; "
                f"convert it once, before the call: torch.as_tensor({name})"
            )
    return {name: values[name] for name in keywords}


def _kind(value: Any) -> str:
    """A value in an error: numbers and short texts as they are, else the type."""
    text = repr(value)
    return text if len(text) <= 30 and not isinstance(value, Tensor) else f"a {type(value).__name__}"
