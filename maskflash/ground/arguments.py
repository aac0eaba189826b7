"""What callers pass -> checked values, or an error that says operation, argument, got, expected and fix."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import modes
from maskflash.ground.names import unexpected

BlockSize = int | tuple[int, int]

MOST_SCALE: Final = 2.0**64  # and least its inverse: beyond them scores overflow float32, or the factor vanishes in it
MOST_SIDE: Final = 1 << 20  # tokens of a tile
MOST_PAIRS: Final = 1 << 24  # of a tile: those that nothing else decides are evaluated together
MOST_TOKENS: Final = 2**31 - 1  # of a length: tiles and FlashMask's vectors are counted in 32 bits
FARTHEST: Final = 2**60  # of an offset: positions, and what masks make of them, then stay well within 64 bits
ENDLESS: Final = 2**61  # tokens: no two positions are that far apart

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_UNSIGNED: Final = (torch.uint16, torch.uint32, torch.uint64)  # of which torch computes next to nothing
_LEAST, _MOST = -(2**63), 2**63 - 1


def integer(operation: str, name: str, value: Any, *, low: int | None = 0, high: int | None = None) -> int:
    """An int (also numpy's) from `low` to `high`; a bool is not one."""
    number = None
    if not isinstance(value, (bool, Tensor)):
        with contextlib.suppress(TypeError):
            number = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    if number is None:
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


def dtype(operation: str, value: Any) -> torch.dtype:
    """One of the dtypes that attention computes in."""
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        expected = ", ".join(f"{known}" for known in DTYPES)
        raise ArgumentTypeError(f"{operation}: dtype is {_kind(value)}, expected one of {expected}")
    found: torch.dtype = value
    return found


def instance(operation: str, name: str, value: Any, kind: type, fix: str) -> None:
    """Check that a value is of a class, or say what makes one."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{operation}: {name} is {_kind(value)}, expected {_an(kind.__name__)}; {fix}")


def choice(operation: str, name: str, value: Any, known: Sequence[str]) -> None:
    """Check that a text is one of those that mean something."""
    if not isinstance(value, str) or value not in known:
        *most, last = (f'"{text}"' for text in known)
        raise ArgumentError(f"{operation}: {name} is {_kind(value)}, expected {', '.join(most)} or {last}")


def scale(operation: str, value: Any) -> float:
    """A positive float within `MOST_SCALE`, from any Python or numpy number."""
    positive(operation, "scale", value, "; negate q instead")
    if not 1 / MOST_SCALE <= value <= MOST_SCALE:
        raise ArgumentError(
            f"{operation}: scale is {_kind(value)}, expected from 2**-64 to 2**64: beyond them scores leave float32"
        )
    return float(value)


def positive(operation: str, name: str, value: Any, if_negative: str = "") -> float:
    """A finite positive float, from any Python or numpy number."""
    found = real(operation, name, value, "a finite positive number")
    if found <= 0:
        fix = if_negative if found < 0 else ""
        raise ArgumentError(f"{operation}: {name} is {_kind(value)}, expected a finite positive number{fix}")
    return found


def real(operation: str, name: str, value: Any, expected: str = "a finite number") -> float:
    """A finite float, from any Python or numpy number."""
    if isinstance(value, (bool, np.bool_, Tensor, np.ndarray)) or not hasattr(type(value), "__float__"):
        fix = "; use `.item()` on a tensor" if isinstance(value, (Tensor, np.ndarray)) else ""
        raise ArgumentTypeError(f"{operation}: {name} is {_kind(value)}, expected a number{fix}")
    if not abs(value) < float("inf"):
        raise ArgumentError(f"{operation}: {name} is {_kind(value)}, expected {expected}")
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        raise ArgumentError(f"{operation}: {name} is {_kind(value)}, expected a number that a float can hold") from None


def block_size(operation: str, value: Any, *, attended: bool = True) -> tuple[int, int]:
    """(bq, bkv) in tokens, from an int or a pair; larger ones where nothing is `attended` by them."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ArgumentError(f"{operation}: block_size is {value!r}, expected an int or (q_tokens, kv_tokens)")
    rows, columns = (integer(operation, "block_size", side, low=1) for side in pair)
    if max(rows, columns) > MOST_SIDE or (attended and rows * columns > MOST_PAIRS):
        raise ArgumentError(
            f"{operation}: block_size is {_kind(value)}, expected tiles of at most {MOST_SIDE:,} tokens a side"
            + f" and {MOST_PAIRS:,} pairs" * attended
        )
    return rows, columns


def device(operation: str, value: Any, *, on_meta: bool = False) -> torch.device:
    """A device that tensors with data can be on here; or meta.

    Raises:
        ArgumentTypeError: it is no device, and no name of one.
        ArgumentError: torch has no such device here, or it holds no data.
    """
    if not isinstance(value, (torch.device, str)):
        raise ArgumentTypeError(f'{operation}: device is {_kind(value)}, expected one such as "cpu" or "cuda"')
    try:
        found = torch.device(value)
    except RuntimeError:
        raise ArgumentError(f'{operation}: device is {_kind(value)}, expected one such as "cpu" or "cuda"') from None
    problem = None if on_meta and found.type == "meta" else _unusable(found)
    if problem:
        raise ArgumentError(f'{operation}: device is "{found}", {problem}; expected one such as "cpu"')
    return found


def _unusable(found: torch.device) -> str | None:
    """Why tensors with data can't be on a device; None where they can."""
    if found.type == "cpu":
        return None
    if found.type == "meta":
        return "which holds no data"
    if found.type == "cuda":  # nothing that would start CUDA: a data loader's process may not
        return (
            None
            if torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()
            else "which torch doesn't find here"
        )
    try:
        torch.empty(0, device=found)
    except Exception:  # of as many kinds as there are devices
        return "which torch doesn't find here"
    return None


def held(operation: str, name: str, tensor: Tensor, *, on_meta: bool = False) -> None:
    """Check that a tensor's elements lie in memory, where indices find them; `on_meta`, that they would.

    Raises:
        ArgumentTypeError: it is sparse, nested or quantized.
        ArgumentError: it is on meta.
    """
    if not (tensor.is_nested or tensor.is_quantized) and tensor.layout == torch.strided:
        if on_meta or not tensor.is_meta:
            return
        raise ArgumentError(f"{operation}: {name} is on meta, which holds no data; make it on the call's device")
    kind, fix = "quantized", "dequantize()"
    if not tensor.is_quantized:
        kind, fix = ("nested", "to_padded_tensor(0)") if tensor.is_nested else (f"{tensor.layout}", "to_dense()")
    raise ArgumentTypeError(f"{operation}: {name} is {kind}, expected a dense tensor; convert it once: {name}.{fix}")


def offset(operation: str, name: str, value: Any, batch: int) -> int | Tensor:
    """An int, or an integer tensor (batch,); of a tensor of one element a view that gives it to all batch rows."""
    if type(value) is int and -FARTHEST <= value <= FARTHEST:
        return value
    if not isinstance(value, Tensor):
        return integer(operation, name, value, low=-FARTHEST, high=FARTHEST)
    held(operation, name, value)
    _check_integers(operation, name, value)
    shape = tuple(value.shape)
    if shape == (batch,):
        return value
    if shape not in ((), (1,)):
        raise ArgumentError(
            f"{operation}: {name} has shape {shape}, expected ({batch},), one for each batch row; pass an int, or a "
            "tensor of one element, where all rows share it"
        )
    return value.expand(batch)


def offsets_in_range(operation: str, offsets: Tensor, name: str = "q_offset") -> None:
    """Check the numbers of an offset for each batch row, where they can be had at once."""
    if offsets.device.type == "cpu" and offsets.numel() and not without_data(offsets):
        low, high = (int(end) for end in torch.aminmax(offsets))
        for number in (low, high):
            integer(operation, f"an entry of {name}", number, low=-FARTHEST, high=FARTHEST)


def int_table(operation: str, name: str, value: Any, dims: Sequence[int]) -> Tensor:
    """An integer tensor with a number of dimensions out of `dims`: a tensor itself; numbers in sequences, copied.

    Numbers go to the CPU, whatever device or mode is in force.
    """
    table = value if isinstance(value, Tensor) else _read(operation, name, value)
    held(operation, name, table, on_meta=True)
    _check_integers(operation, name, table)
    if table.ndim not in dims:
        expected = " or ".join(f"{n}-d" for n in dims)
        raise ArgumentError(f"{operation}: {name} has shape {tuple(table.shape)}, expected a {expected} tensor")
    return table


def _check_integers(operation: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _INTEGERS:
        fix = f"; convert it once: {name}.long()" if tensor.dtype in _UNSIGNED else ""
        raise ArgumentTypeError(f"{operation}: {name} has dtype {tensor.dtype}, expected an integer dtype{fix}")


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
            raise unexpected(operation, name, keywords)
    values = {**defaults, **given}
    missing = [name for name in keywords if name not in values]
    if missing:
        example = f"{missing[0]}=..."
        raise ArgumentTypeError(f"{operation}: the mask needs {', '.join(missing)}; pass it by name: {example}")
    return {name: _mask_arg(operation, name, values[name]) for name in keywords}


def _mask_arg(operation: str, name: str, value: Any) -> Any:
    """A tensor, or a number as Python has it."""
    if isinstance(value, Tensor):
        held(operation, name, value)
        return value
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, float)) or value is None:
        return value
    if not isinstance(value, int):
        if isinstance(value, (np.number, np.bool_)) and isinstance(value.item(), (int, float)):
            value = value.item()
        elif hasattr(type(value), "__index__") and not isinstance(value, np.ndarray):
            value = operator.index(value)
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        bits = value.bit_length() + 1
        raise ArgumentError(f"{operation}: {name} is an integer of {bits} bits, expected one that fits 64")
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, np.ndarray):
        fix = f"convert it once, before the call: torch.from_numpy({name})"
    elif isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        fix = f"give each tensor in it an argument of its own, such as {name}_ids"
    elif isinstance(value, Sequence) and any(isinstance(item, Tensor) for item in value):
        fix = f"join its tensors once, before the call: torch.stack({name})"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        fix = f"convert it once, before the call: torch.as_tensor({name})"
    else:
        fix = "what is neither is a parameter of a function that returns the mask"
    raise ArgumentTypeError(f"{operation}: {name} is {_kind(value)}, expected a tensor or a number; {fix}")


def _shown(number: Any) -> str:
    """A number in an error; Python refuses to print the very long ones."""
    number = int(number)
    return str(number) if number.bit_length() <= 128 else f"{'-' * (number < 0)}2**{number.bit_length() - 1} or more"


def _kind(value: Any) -> str:
    """A value in an error: numbers and short texts as they are, else the type."""
    if isinstance(value, (Tensor, np.ndarray)):
        return by_type(value)
    if type(value) is int:
        return _shown(value)
    text = repr(value)
    return text if len(text) <= 30 else by_type(value)


def by_type(value: Any) -> str:
    """A value in an error, by its type."""
    return _an(type(value).__name__)


def _an(noun: str) -> str:
    return f"a{'n' * (noun[0] in 'aeiouAEIOU')} {noun}"
