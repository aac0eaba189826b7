"""What a caller says of dropout -> a probability, and a seed on the device of the call."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments

_LEAST, _MOST = -(2**63), 2**63 - 1
_FIX: Final = "pass an int of 64 bits, or an int64 tensor of one element"


def probability(operation: str, value: Any, name: str = "dropout_p") -> float:
    """How likely a pair is dropped: a float, 0 <= p < 1, from any Python or numpy number.

    Raises:
        ArgumentTypeError: it is no number.
        ArgumentError: it is out of range.
    """
    if isinstance(value, (bool, np.bool_, Tensor, np.ndarray)) or not hasattr(type(value), "__float__"):
        fix = "; use `.item()` on a tensor" if isinstance(value, (Tensor, np.ndarray)) else ""
        raise ArgumentTypeError(f"{operation}: {name} is {arguments.by_type(value)}, expected a number{fix}")
    if not 0 <= value < 1:
        raise ArgumentError(f"{operation}: {name} is {value}, expected at least 0 and less than 1")
    return float(value)


def seed_of(operation: str, seed: Any, generator: Any, device: torch.device) -> Tensor:
    """The seed of a call: the one given, or one that is drawn.

    It is drawn from `generator`, or else from torch's default generator of the device, where torch.manual_seed,
    checkpointing and torch.compile find it. Nothing here waits for a device, unless the generator is on another one.

    Args:
        operation: what is called, for errors.
        seed: an int from -2^63 to 2^64 - 1, or an int64 tensor of one element on the device; None to draw one.
        generator: a torch.Generator, or None; it draws on its own device.
        device: of the call.

    Returns:
        (1,) int64 on the device.

    Raises:
        ArgumentTypeError: the seed is no int and no int64 tensor, or the generator none of torch's.
        ArgumentError: both are given, the seed has more than 64 bits or one element, or is on another device.
    """
    if generator is not None:
        if seed is not None:
            raise ArgumentError(f"{operation}: seed and generator are both given, expected one; leave one out")
        arguments.instance(operation, "generator", generator, torch.Generator, "such as torch.Generator()")
    if seed is not None:
        return given(operation, seed, device)
    if generator is None:
        return torch.randint(_LEAST, _MOST, (1,), dtype=torch.int64, device=device)
    drawn = torch.randint(_LEAST, _MOST, (1,), dtype=torch.int64, device=generator.device, generator=generator)
    return drawn.to(device, non_blocking=device.type != "cpu")


def given(operation: str, seed: Any, device: torch.device) -> Tensor:
    """A seed that a caller gives, as `seed_of` returns it, with its errors."""
    if isinstance(seed, Tensor):
        arguments.held(operation, "seed", seed)
        if seed.dtype != torch.int64:
            raise ArgumentTypeError(f"{operation}: seed has dtype {seed.dtype}, expected torch.int64; {_FIX}")
        if seed.numel() != 1:
            raise ArgumentError(f"{operation}: seed has shape {tuple(seed.shape)}, expected (1,); {_FIX}")
        if seed.device != device:
            raise ArgumentError(f"{operation}: seed is on {seed.device}, expected {device}, where q is; move it once")
        return seed.reshape(1)
    number = arguments.integer(operation, "seed", seed, low=None)
    if not _LEAST <= number < 2**64:
        raise ArgumentError(
            f"{operation}: seed is an integer of {number.bit_length()} bits, expected one from -2**63 to 2**64 - 1"
        )
    return torch.full((1,), number - 2**64 if number > _MOST else number, dtype=torch.int64, device=device)
