"""A function -> every value that its code can get at by the names that stand in it, and the steps that lead there."""

from __future__ import annotations

import dis
import os
import sys
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterator, KeysView
from enum import Enum
from functools import partial
from inspect import getattr_static
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, Final, NamedTuple
from weakref import ProxyTypes, ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor

from maskflash.trace.symbols import Symbol, Table

_MOST: Final = 4096  # steps; code that reaches more is not followed
_HERE: Final = __name__.partition(".")[0]
_LIBRARIES: Final = ("torch", "numpy", _HERE)  # nothing in them changes, nor in Python's own modules
_STANDARD: Final = os.path.dirname(os.__file__)


class _Absent:
    """What a step leads to that leads nowhere as yet: an empty cell, an attribute that a slot is kept for."""


ABSENT: Final = _Absent()
_VALUES: Final = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, Enum, _Absent),
    *(torch.dtype, torch.device, torch.layout, torch.Size),
)
_OF_A_TRACE: Final = (
    Symbol,
    Table,
)  # kept by a predicate, which is an error wherever it is used; they refuse questions
_CALLED: Final = frozenset(
    f"__{name}__"
    for name in (
        *("call", "getitem", "len", "iter", "next", "contains", "getattr", "getattribute", "bool", "index", "int"),
        *("float", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg"),
        *("and", "or", "xor", "invert", "radd", "rsub", "rmul", "rand", "ror", "abs", "enter", "exit", "get"),
    )
)  # methods that Python calls by itself
SEQUENCES: Final = (list, tuple, deque)
MAPPINGS: Final = (dict, MappingProxyType)
_PLAIN: Final = frozenset((*SEQUENCES, *MAPPINGS))  # which have no attributes of their own
_WRAPPERS: Final = {UserDict: "data", UserList: "data", ChainMap: "maps"}  # by what they keep all in
_HAVE_NO_NAMES: Final = (Tensor, set, frozenset, BuiltinFunctionType, MethodType, partial, property, ReferenceType)
_CONTAINERS: Final = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)


class Step(NamedTuple):
    """One name that code reads.

    Attributes:
        parent: place of the value that it is read from; 0 is the function.
        kind: "cell", "global", "attr", "item" or "ref".
        key: the cell's number, the global's or attribute's name, the item's index or key.
        name: what code calls it; "" for an item.
    """

    parent: int
    kind: str
    key: Any
    name: str


_Read = tuple[str, Any, str]  # a step without its parent


class Names(NamedTuple):
    """What code reads, by name."""

    globals: frozenset[str]
    attributes: frozenset[str]


class Reach:
    """What a search found.

    Attributes:
        values: in the order they were found, the function first.
        steps: to each value but the first.
        codes: of all functions among them.
        alias: for places whose value was found before, the place of that; or a view of the same memory.
        open: for places the names that code would read there if they were there.
        complete: whether all steps were followed.
    """

    def __init__(self, function: Any) -> None:
        self.values: list[Any] = [function]
        self.steps: list[Step] = []
        self.codes: dict[CodeType, None] = {}
        self.alias: dict[int, int] = {}
        self.open: dict[int, frozenset[str]] = {}
        self.complete = True


def reach(function: Any) -> Reach:
    """Follow the names in a function's code, and in that of all functions it can get at, to values."""
    names: frozenset[str] = frozenset()
    while True:
        found = _search(function, names)
        grown = names.union(*(names_of(code).attributes for code in found.codes))
        if grown == names:
            return found
        names = grown


def follow(value: Any, step: Step) -> Any:
    """What a step leads to."""
    _, kind, key, _ = step
    if kind == "attr":
        return getattr(value, key)
    if kind == "cell":
        return value.__closure__[key].cell_contents
    if kind == "ref":
        return value()
    return value.__globals__[key] if kind == "global" else value[key]


def find(value: Any, step: Step) -> Any:
    """The same, or `ABSENT`."""
    try:
        return follow(value, step)
    except Exception:  # of an attribute's own code too: a trace will meet it
        return ABSENT


def members(value: Any) -> list[KeysView[str]]:
    """The names of what stands in a value itself: in a function's globals, an object's or a class's attributes."""
    if isinstance(value, FunctionType):
        return [value.__globals__.keys()]
    if isinstance(value, type):
        return [vars(kind).keys() for kind in _own_classes(value)]
    if isinstance(value, torch.nn.Module):
        own = vars(value)
        return [own.keys(), *(own[name].keys() for name in ("_parameters", "_buffers", "_modules") if name in own)]
    return [value.__dict__.keys()] if hasattr(value, "__dict__") else []


def owner(value: Any, step: Step) -> object:
    """Where a step reads: the same for all steps that read there."""
    if step.kind == "cell":
        return id(value.__closure__[step.key])
    return (id(value.__globals__ if step.kind == "global" else value), step.key)


def is_value(value: Any) -> bool:
    """Whether nothing in a value can change, so that an equal one is as good: a number, a name, a tuple of those."""
    if type(value) in _OF_A_TRACE:
        return False
    if type(value) in (tuple, frozenset):
        return all(map(is_value, value))
    return isinstance(value, _VALUES) or (type(value).__module__ == "numpy" and not hasattr(value, "__setitem__"))


def names_of(code: CodeType) -> Names:
    """The names that a function's code reads, and the functions within it."""
    found = _names.get(code)
    if found is None:
        inner = [names_of(const) for const in code.co_consts if isinstance(const, CodeType)]
        globals_, attributes = set[str](), {x for x in code.co_consts if isinstance(x, str) and x.isidentifier()}
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attributes.add(instruction.argval)
        own = frozenset(name for name in attributes if name == "__dict__" or not name.endswith("__"))
        found = Names(frozenset(globals_).union(*(x.globals for x in inner)), own.union(*(x.attributes for x in inner)))
        _names[code] = found
    return found


# A mask of known code is made in 0.8 instead of 1.6 ms.
_names: WeakKeyDictionary[CodeType, Names] = WeakKeyDictionary()


def _search(function: Any, names: frozenset[str]) -> Reach:
    found = Reach(function)
    places: dict[object, int] = {id(function): 0}
    place = 0
    while place < len(found.values):
        value = found.values[place]
        if isinstance(value, FunctionType):
            found.codes[value.__code__] = None
        if place in found.alias:
            reads: Iterator[_Read] = iter(())
        elif place and found.steps[place - 1].key == "__class__":
            reads = _reads_of_class(value, names)  # of objects that are there already
        else:
            reads = _reads(value, names)
        stepped = set[str]()
        for kind, key, name in reads:
            step = Step(place, kind, key, name)
            stepped.add(name)
            there = find(value, step)
            if type(there) in _OF_A_TRACE:
                continue
            if len(found.steps) >= _MOST:
                found.complete = False
                return found
            found.steps.append(step)
            found.values.append(there)
            if not is_value(there) or isinstance(there, Enum):
                first = places.setdefault(_identity(there), len(found.steps))
                if first != len(found.steps):
                    found.alias[len(found.steps)] = first
        if place not in found.alias and (missing := _named_here(value, names) - stepped) and members(value):
            found.open[place] = missing
        place += 1
    return found


def _named_here(value: Any, names: frozenset[str]) -> frozenset[str]:
    """The names that code would read from a value, wherever they are."""
    if isinstance(value, FunctionType):
        return frozenset() if _is_library(value.__globals__.get("__name__")) else names_of(value.__code__).globals
    if isinstance(value, ModuleType):
        return frozenset() if _is_library(value.__name__) else names
    fixed = is_value(value) or type(value) in _PLAIN or hasattr(type(value), "reachable")
    return frozenset() if fixed or isinstance(value, _HAVE_NO_NAMES) else names


def _identity(value: Any) -> object:
    """What tells a value from others; views of the same memory, laid out alike, are one."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() and type(value) is Tensor:
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return id(value)


def _reads(value: Any, names: frozenset[str]) -> Iterator[_Read]:
    """The steps from a value: kind, key and name of each."""
    if isinstance(value, (Tensor, set, frozenset, BuiltinFunctionType)):
        return
    if is_value(value) and not isinstance(value, Enum):  # which has methods
        return
    if isinstance(value, SEQUENCES):
        yield from (("item", place, "") for place, item in enumerate(value) if not is_value(item))
    elif isinstance(value, MAPPINGS):
        yield from (("item", key, "") for key, item in value.items() if not is_value(item))
    if type(value) in _PLAIN:
        return
    if isinstance(value, FunctionType):
        yield from _reads_of_function(value)
    elif isinstance(value, MethodType):
        yield from _attributes("__func__", "__self__")
    elif isinstance(value, partial):
        yield from _attributes("func", "args", "keywords")
    elif isinstance(value, property):
        yield from _attributes("fget")
    elif isinstance(value, ReferenceType):
        yield "ref", None, ""
    elif isinstance(value, ModuleType):
        if not _is_library(value.__name__):
            yield from _attributes(*sorted(names & vars(value).keys()))
    elif isinstance(value, type):
        yield from chain(_reads_of_class(value, names), _attributes("__init__"))
    elif hasattr(type(value), "reachable"):  # a mask
        yield from _attributes(*value.reachable)
    else:
        yield from _reads_of_object(value, names)


def _reads_of_function(function: FunctionType) -> Iterator[_Read]:
    code = function.__code__
    yield from (("cell", place, name) for place, name in enumerate(code.co_freevars))
    if _is_library(function.__globals__.get("__name__")):
        return
    for name in sorted(names_of(code).globals & function.__globals__.keys()):
        yield "global", name, name
    for defaults in ("__defaults__", "__kwdefaults__"):
        if getattr(function, defaults):
            yield "attr", defaults, ""
    if hasattr(function, "__wrapped__"):
        yield "attr", "__wrapped__", ""


def _reads_of_class(cls: type, names: frozenset[str]) -> Iterator[_Read]:
    """Of a class its attributes that code names, and the methods that Python calls by itself."""
    own = _own_classes(cls)
    special = (
        name for kind in own for name in _CALLED & vars(kind).keys() if isinstance(vars(kind)[name], FunctionType)
    )
    found = {name for kind in own for name in names & vars(kind).keys()}
    yield from _attributes(*sorted(found.union(special)))


def _own_classes(cls: type) -> list[type]:
    return [kind for kind in cls.__mro__ if not _is_library(kind.__module__)]


def _reads_of_object(value: Any, names: frozenset[str]) -> Iterator[_Read]:
    if not _is_library(type(value).__module__):
        yield "attr", "__class__", ""
    if hasattr(value, "__wrapped__"):  # functools.lru_cache and the like
        yield "attr", "__wrapped__", ""
    if isinstance(value, _CONTAINERS):
        yield from _attributes("_modules", "_parameters", "_buffers")
    yield from _attributes(*(name for kind, name in _WRAPPERS.items() if isinstance(value, kind)))
    own, asks = frozenset(chain(*members(value))), _asks(value)
    for name in sorted(names):
        found = getattr_static(value, name, ABSENT)
        of_class = name not in own and isinstance(found, (FunctionType, property, classmethod, staticmethod))
        if not of_class and (asks or name in own or found is not ABSENT):
            yield "attr", name, name


def _asks(value: Any) -> bool:
    """Whether a value may have attributes that stand nowhere."""
    kind = type(value)
    asked = getattr(kind, "__getattr__", None) not in (None, torch.nn.Module.__getattr__)
    return asked or isinstance(kind.__getattribute__, FunctionType) or isinstance(value, ProxyTypes)


def _attributes(*names: str) -> Iterator[_Read]:
    yield from (("attr", name, name) for name in names)


def _is_library(module: object) -> bool:
    """Whether a module's code and attributes are taken to stay as they are: Python's own, torch's, numpy's and ours."""
    top = module.partition(".")[0] if isinstance(module, str) else ""
    return top in _LIBRARIES or (top in sys.stdlib_module_names and _is_standard(sys.modules.get(top)))


def _is_standard(module: ModuleType | None) -> bool:
    """Whether a module is Python's own: a user's may have the name of one."""
    file = getattr(module, "__file__", None)
    return file is None or (file.startswith(_STANDARD) and "site-packages" not in file)
