"""Closures made anew at each step -> one mask for all of the same structure, with their tensors as arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from maskflash.masks.mask import Mask
from maskflash.trace.trace import Traced, trace


class Unknown(Exception):
    """A function holds something whose meaning its structure doesn't tell."""


def lifted(function: Callable[..., Any], home: ModuleType) -> tuple[Mask, dict[str, Tensor]]:
    """A mask function as a mask that is the same object for all functions of its structure, and its tensors by name.

    Args:
        function: `f(b, h, q, kv) -> bool`, and the functions it holds, of module `home`: known to be pure, and to read
            nothing but their arguments, their closures and the module's own functions.
        home: that module.

    Returns:
        The mask, and its arguments.

    Raises:
        Unknown: the function, or one that it holds, is of another module or holds other things than numbers, tensors
            and functions.
    """
    tensors: list[Tensor] = []
    structure = _structure(function, home, tensors)
    return _mask(structure, home, len(tensors)), {_name(place): tensor for place, tensor in enumerate(tensors)}


class _Part(NamedTuple):
    """A value apart from its tensors.

    Attributes:
        kind: "tensor", "tuple", "function", or a number's type: True is not 1.
        held: a tensor's place among all that are held, a function's code, or the number.
        parts: of a tuple its items, of a function what its cells hold.
    """

    kind: object
    held: Any = None
    parts: tuple[_Part, ...] = ()


class _Lifted(Mask):
    """The mask of a structure; its tensors come with each call."""

    def __init__(self, structure: _Part, home: ModuleType, tensors: int) -> None:
        name = structure.held.co_qualname if structure.kind == "function" else "mask"
        super().__init__(name, tuple(map(_name, range(tensors))), {})
        self.structure = structure
        self.home = home

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The function, holding these tables."""
        return _filled(self.structure, self.home, mask_args)(b, h, q, kv)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The function, run once on symbols."""
        return trace(self, mask_args)


_mask = lru_cache(maxsize=256)(_Lifted)


def _structure(value: Any, home: ModuleType, tensors: list[Tensor]) -> _Part:
    """What a value is apart from its tensors, which are collected."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Part("tensor", len(tensors) - 1)
    if isinstance(value, tuple):
        return _Part("tuple", parts=tuple(_structure(item, home, tensors) for item in value))
    if isinstance(value, FunctionType) and value.__globals__ is vars(home) and not value.__defaults__:
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        return _Part("function", value.__code__, tuple(_structure(held, home, tensors) for held in cells))
    if value is None or isinstance(value, bool | int | float):
        return _Part(type(value), value)
    raise Unknown(repr(value))


def _filled(part: _Part, home: ModuleType, tables: dict[str, Any]) -> Any:
    """The value of a structure with these tensors."""
    if part.kind == "tensor":
        return tables[_name(part.held)]
    inner = tuple(_filled(each, home, tables) for each in part.parts)
    if part.kind == "function":
        return FunctionType(part.held, vars(home), closure=tuple(map(CellType, inner)))
    return inner if part.kind == "tuple" else part.held


def _name(place: int) -> str:
    return f"table{place}"
