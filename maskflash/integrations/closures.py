"""Closures made anew at each step -> one mask for all of the same structure, with their tensors as arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

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
    return _mask(structure, len(tensors)), {_name(place): tensor for place, tensor in enumerate(tensors)}


@dataclass(frozen=True, slots=True)
class _Table:
    """A tensor, by its place among all that a function holds."""

    place: int


@dataclass(frozen=True, slots=True)
class _Number:
    """A number, and its type: True is not 1."""

    value: Any
    type: type


@dataclass(frozen=True, slots=True)
class _Several:
    """A tuple."""

    items: tuple[Hashable, ...]


class _Function:
    """A function as its code and what its cells hold."""

    def __init__(self, function: FunctionType, cells: tuple[Hashable, ...]) -> None:
        self.code: CodeType = function.__code__
        self.cells = cells
        self.globals = function.__globals__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and (self.code, self.cells) == (other.code, other.cells)

    def __hash__(self) -> int:
        return hash((self.code, self.cells))


class _Lifted(Mask):
    """The mask of a structure; its tensors come with each call."""

    def __init__(self, structure: Hashable, tensors: int) -> None:
        name = structure.code.co_qualname if isinstance(structure, _Function) else "mask"
        super().__init__(name, tuple(map(_name, range(tensors))), {})
        self.filling = structure

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The function, holding these tables."""
        return _filled(self.filling, mask_args)(b, h, q, kv)

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The function, run once on symbols."""
        return trace(self, mask_args)


_mask = lru_cache(maxsize=256)(_Lifted)


def _structure(value: Any, home: ModuleType, tensors: list[Tensor]) -> Hashable:
    """What a value is apart from its tensors, which are collected."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Table(len(tensors) - 1)
    if isinstance(value, tuple):
        return _Several(tuple(_structure(item, home, tensors) for item in value))
    if isinstance(value, FunctionType) and value.__globals__ is vars(home) and not value.__defaults__:
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        return _Function(value, tuple(_structure(held, home, tensors) for held in cells))
    if value is None or isinstance(value, bool | int | float):
        return _Number(value, type(value))
    raise Unknown(repr(value))


def _filled(structure: Any, tables: dict[str, Any]) -> Any:
    """The value of a structure with these tensors."""
    if isinstance(structure, _Table):
        return tables[_name(structure.place)]
    if isinstance(structure, _Several):
        return tuple(_filled(item, tables) for item in structure.items)
    if isinstance(structure, _Function):
        cells = tuple(CellType(_filled(held, tables)) for held in structure.cells)
        return FunctionType(structure.code, structure.globals, closure=cells)
    return structure.value


def _name(place: int) -> str:
    return f"table{place}"
