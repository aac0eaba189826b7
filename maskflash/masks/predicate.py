"""A predicate -> a mask."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Final

from maskflash.errors import ArgumentTypeError
from maskflash.functions.written import Recorded, WrittenFunction
from maskflash.masks.mask import Mask, MaskFunction

MaskLike = Mask | MaskFunction

# Modules whose functions make masks.
_MAKERS: Final = ("maskflash.presets.", "maskflash.flashmask.paper", "maskflash.masks.columns")


class RecordedMask(Recorded, Mask):
    """A mask that came out of a pickle without its function."""


class Predicate(WrittenFunction, Mask):
    """A mask given by a function."""

    recorded: ClassVar[type[Recorded]] = RecordedMask


def mask(function: MaskLike) -> Mask:
    """Make a mask of a predicate; also a decorator.

    What the predicate captures (closures, globals, attributes and items of what these hold) is looked up again at each
    call. Another number or tensor, or other contents of a tensor, never mean tracing again.

    Args:
        function: `f(b, h, q, kv, *, ...) -> bool`, plain Python over int64 indices. Keyword-only parameters are
            run-time tensors or numbers: changing a tensor's contents or an int never means tracing again.

    Returns:
        The mask; a mask is returned as it is.

    Raises:
        MaskTraceError: the predicate does something that can't become an expression; the message says where.
        ArgumentError: it does not take (b, h, q, kv).

    Example:
        >>> import torch
        >>> @mask
        ... def packed(b, h, q, kv, *, doc):
        ...     return q >= kv and doc[b, q] == doc[b, kv]
        >>> packed.dense(3, 3, doc=torch.tensor([[0, 0, 1]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    if isinstance(function, Mask):
        return function
    refuse_maker("mask", function)
    return Predicate(function)


def refuse_maker(operation: str, value: Any) -> None:
    """An error for what stands for a mask by mistake: the name of a preset, or a preset that wasn't called."""
    if isinstance(value, str):
        raise ArgumentTypeError(
            f"{operation}: got the text {value!r}, expected a predicate f(b, h, q, kv) or a mask; presets are "
            "functions, and called: mf.causal()"
        )
    public = str(getattr(value, "__qualname__", "")).isidentifier()  # a preset's own predicate is local to it
    if public and str(value.__module__).startswith(_MAKERS):
        parameters = list(inspect.signature(value).parameters.values())
        takes = [p.name for p in parameters if p.default is p.empty] or [p.name for p in parameters[:1]]
        raise ArgumentTypeError(
            f"{operation}: got {value.__name__}, which makes a mask; call it: {value.__name__}({', '.join(takes)})"
        )
