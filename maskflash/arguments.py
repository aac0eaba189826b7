"""What callers pass -> checked values, or an error that says operation, argument, got, expected and fix."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor

from maskflash import modes
from maskflash.errors import ArgumentError, ArgumentTypeError

BlockSize = int | tuple[int, int]

MOST_TOKENS: Final = 2**31 - 1  # of a length: tiles and FlashMask's vectors are counted in 32 bits
FARTHEST: Final = 2**60  # of an offset: positions, and what masks make of them, then stay well within 64 bits
ENDLESS: Final = 2**61  # tokens: no two positions are that far apart

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AUTOCAST: Final = ("cpu", "cuda")  # device types


def integer(operation: str, name: str, value: Any, *, low: int | None = 0, high: int | None = None) -> int:
    """An int (also numpy's) from `low` to `high`; a bool is not one."""
    try:
        number = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, Tensor)):
        fix = "; use `.item()` on a tensor" if isinstance(value, Tensor) else ""
        raise ArgumentTypeError(f"{operation}: {name} is {_kind(value)}, expected an int{fix}")
    if low is not None and number < low:
        raise ArgumentError(f"{operation}: {name} is {_shown(number)}, expected at least {low}")
    if high is not None and number > high:
        raise ArgumentError(f"{operation}: {name} is {_shown(number)}, expected at most {high}")
    return number  # type: ignore[return-value]  # a SymInt of a compiled graph is as good as an int


def length(operation: str, name: str, value: Any, *, low: int = 0) -> int:
    """How many tokens, batch rows or heads a call has."""
    return integer(operation, name, value, low=low, high=MOST_TOKENS)


def distance(operation: str, name: str, value: Any, *, low: int = 0) -> int:
    """How many tokens something reaches; however many there are more than any two are apart."""
    return min(integer(operation, name, value, low=low), ENDLESS)


def side(operation: str, name: str, value: Any) -> int | None:
    """How many tokens a window reaches to one side; None where it has no end."""
    if value is None:
        return None
    tokens = integer(operation, name, value, low=None)
    if tokens < 0:
        raise ArgumentError(
            f"{operation}: {name} is {_shown(tokens)}, expected at least 0; pass None for a side without an end"
        )
    return tokens if tokens < ENDLESS else None


def flag(operation: str, name: str, value: Any) -> bool:
    """A bool, also numpy's."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentTypeError(f"{operation}: {name} is {_kind(value)}, expected True or False")
    return bool(value)


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
        return integer(operation, "q_offset", value, low=-FARTHEST, high=FARTHEST)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise ArgumentTypeError(f"{operation}: q_offset has dtype {value.dtype}, expected an integer dtype")
    if tuple(value.shape) != (batch,):
        raise ArgumentError(
            f"{operation}: q_offset has shape {tuple(value.shape)}, expected ({batch},), one for each batch row; "
            "pass an int where all rows share it"
        )
    return value


def offsets_in_range(operation: str, offsets: Tensor) -> None:
    """Check the numbers of an offset for each batch row, where they can be had at once."""
    if offsets.device.type == "cpu" and offsets.numel() and not without_data(offsets):
        low, high = (int(end) for end in torch.aminmax(offsets))
        for number in (low, high):
            integer(operation, "an entry of q_offset", number, low=-FARTHEST, high=FARTHEST)


def int_table(operation: str, name: str, value: Any, dims: Sequence[int]) -> Tensor:
    """An integer tensor with a number of dimensions out of `dims`: a tensor itself; numbers in sequences, copied.

    Numbers go to the CPU, whatever device or mode is in force.
    """
    table = value if isinstance(value, Tensor) else _read(operation, name, value)
    if table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool:
        raise ArgumentTypeError(f"{operation}: {name} has dtype {table.dtype}, expected an integer dtype")
    if table.ndim not in dims:
        expected = " or ".join(f"{n}-d" for n in dims)
        raise ArgumentError(f"{operation}: {name} has shape {tuple(table.shape)}, expected a {expected} tensor")
    return table


def int_list(operation: str, name: str, value: Any, dims: Sequence[int]) -> list[Any]:
    """What an integer table holds now, as (nested) lists."""
    table = int_table(operation, name, value, dims)
    if without_data(table):
        kind = "on meta" if table.is_meta else "a fake tensor"
        raise ArgumentError(
            f"{operation}: {name} is {kind}, expected numbers, which are read now; pass a list, or make the mask where "
            "the tensor has its data"
        )
    with modes.off():
        found: list[Any] = table.tolist()
    return found


def without_data(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and nothing else: one on meta, or of FakeTensorMode."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor))


def is_table(value: Any) -> bool:
    """Whether a value holds several numbers, where one would do as well."""
    return isinstance(value, (Tensor, np.ndarray)) or (isinstance(value, Sequence) and not isinstance(value, str))


def _read(operation: str, name: str, value: Any) -> Tensor:
    """(Nested) sequences of ints as a tensor."""
    if isinstance(value, Sequence) and bool in set(map(type, value)):
        raise ArgumentTypeError(f"{operation}: {name} holds True or False, expected integers")
    try:
        with modes.off():
            table = torch.tensor(value, device="cpu")
            return table.long() if table.numel() == 0 else table
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, OverflowError) or "verflow" in str(error):
            raise ArgumentError(
                f"{operation}: {name} holds a number beyond 64 bits, expected at most 2**63 - 1"
            ) from None
        raise ArgumentTypeError(
            f"{operation}: {name} is {_kind(value)}, expected integers in a tensor or in lists of equal length"
        ) from None


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


def tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check what attention is computed of: shapes, dtypes, devices and layouts that fit."""
    if not _fit(q, k, v):
        _refuse(q, k, v)


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if not (q.ndim == k.ndim == v.ndim == 4 and q.layout == k.layout == v.layout == torch.strided):
        return False
    batch, heads, _, dim = q.shape
    k_batch, k_heads, k_len, k_dim = k.shape
    v_batch, v_heads, v_len, v_dim = v.shape
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in _DTYPES
        and q.device == k.device == v.device
        and batch == k_batch == v_batch
        and (k_heads, k_len, k_dim) == (v_heads, v_len, dim)
        and dim > 0
        and v_dim > 0
        and heads > 0
        and k_heads > 0
        and heads % k_heads == 0
    )


def _refuse(q: Tensor, k: Tensor, v: Tensor) -> NoReturn:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"attention: {name} is a {type(x).__name__}, expected a tensor")
        if x.ndim != 4:
            raise ArgumentError(
                f"attention: {name} has shape {tuple(x.shape)}, expected 4 dimensions (batch, heads, tokens, head_dim)"
            )
        if x.dtype not in _DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise ArgumentTypeError(f"attention: {name} has dtype {x.dtype}, expected one of {expected}")
        if x.layout != torch.strided:
            raise ArgumentTypeError(f"attention: {name} has layout {x.layout}, expected a dense tensor")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ArgumentTypeError(f"attention: {name} has dtype {x.dtype}, expected q's {q.dtype}")
        if x.device != q.device:
            raise ArgumentError(f"attention: {name} is on {x.device}, expected q's {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(f"attention: {name} has batch {x.shape[0]}, expected q's {q.shape[0]}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0 or v.shape[3] == 0:
        raise ArgumentError(
            f"attention: head_dim is {q.shape[3]} for q, {k.shape[3]} for k and {v.shape[3]} for v; expected at least "
            "1, and the same for q and k"
        )
    if k.shape[1:3] != v.shape[1:3]:
        raise ArgumentError(
            f"attention: k has {k.shape[1]} heads of {k.shape[2]} tokens and v {v.shape[1]} of {v.shape[2]}; "
            "expected the same"
        )
    raise ArgumentError(f"attention: q has {q.shape[1]} heads and k {k.shape[1]}; expected q's to be a multiple of k's")


def same_device(device: torch.device, names: tuple[str, ...], tables: list[Tensor], offset: int | Tensor) -> None:
    """Check that a mask's tables and the offset are where q is."""
    if isinstance(offset, Tensor):
        names, tables = (*names, "q_offset"), [*tables, offset]
    for name, tensor in zip(names, tables, strict=True):
        if tensor.device != device:
            raise ArgumentError(
                f"attention: the mask's {name} is on {tensor.device}, expected q's {device}; move it once, before "
                f"the call: {name}.to({str(device)!r})"
            )


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as autocast has torch's own attention take them: in its dtype, but for float64."""
    if not torch._C._is_any_autocast_enabled():
        return q, k, v
    if isinstance(q, Tensor) and q.device.type in _AUTOCAST and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (q, k, v)
        )
    return q, k, v


def _shown(number: Any) -> str:
    """A number in an error; Python refuses to print the very long ones."""
    number = int(number)
    return str(number) if number.bit_length() <= 128 else f"{'-' * (number < 0)}2**{number.bit_length() - 1} or more"


def _kind(value: Any) -> str:
    """A value in an error: numbers and short texts as they are, else the type."""
    text = repr(value)
    return text if len(text) <= 30 and not isinstance(value, Tensor) else f"a {type(value).__name__}"
