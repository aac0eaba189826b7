"""Stand-ins for indices, run-time arguments and table elements: operating on them records expression nodes."""

from __future__ import annotations

import linecache
import numbers
import sys
from collections.abc import Callable, Mapping
from itertools import islice
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import MaskTraceError
from .nodes import Builder, Node, Scalar, Source
from .paths import CannotMerge, Paths

_INT64 = torch.iinfo(torch.int64)
_OWN = __name__.rpartition(".")[0]


class Argument(str):
    """The name of a keyword argument that fills a slot at run time."""


class Tracer:
    """Everything one trace accumulates: nodes, slots for run-time values, and where the user's code stands."""

    def __init__(self, name: str, limit: int, use_values: bool) -> None:
        self.name = name
        self.builder = Builder()
        self.paths = Paths(self.builder, self._fixed_number, limit, use_values)
        self.params: list[int | Argument] = []
        self.tables: list[Tensor | Argument] = []
        self.specialised: set[str] = set()  # arguments whose value or shape the expression depends on
        self._argument_values: dict[str, int] = {}
        self._slots: dict[object, int] = {}
        self._occurrences: dict[object, int] = {}
        self._journal: list[object] = []
        self._sources: dict[tuple[CodeType, int], Source] = {}

    # Recording

    def record(self, op: str, *args: int, **kwargs: Any) -> Symbol:
        return Symbol(self, self.builder.add(op, *args, source=self.source(), **kwargs))

    def apply(self, op: str, *operands: object) -> Symbol:
        """Record an operation on symbols, numbers and 0-dim tensors."""
        divides = op in ("floordiv", "mod", "truncdiv", "fmod", "truediv", "shl", "shr")
        masks = op in ("bitand", "bitor", "bitxor")
        args = []
        for place, operand in enumerate(operands):
            args.append(self.position(operand, place, structural=masks or (divides and place == 1)))
        if masks and self.builder.nodes[args[0]].op == "const":
            args.reverse()  # bit masks on the right
        kinds = [self.builder.nodes[arg] for arg in args]
        if op in ("sub", "neg") and all(kind.dtype == torch.bool and not kind.weak for kind in kinds):
            self.fail("subtracts truth values", "Use `^` for exclusive or, or `not`/`~` to negate.")
        if (masks or op in ("bitnot", "shl", "shr")) and any(kind.dtype.is_floating_point for kind in kinds):
            self.fail("does bit operations on floating-point numbers", "Convert with `.long()` first.")
        if divides and kinds[-1].op == "const" and kinds[-1].value == 0:
            self.fail("divides by the constant zero", "Check the divisor this predicate was built with.")
        return self.record(op, *args)

    def truth(self, value: object) -> Symbol:
        """A value as a bool node."""
        symbol = self.symbol(value)
        node = self.builder.nodes[symbol.position]
        return symbol if node.dtype == torch.bool else self.record("cast", symbol.position, dtype=torch.bool)

    def symbol(self, value: object) -> Symbol:
        return value if isinstance(value, Symbol) else Symbol(self, self.position(value, 0, structural=True))

    def position(self, value: object, place: int, structural: bool = False) -> int:
        """The node of an operand. Integers become params, so that their values don't shape the expression, unless
        `structural`: divisors, moduli, shift counts and bit masks are cheaper as constants of the kernel."""
        if isinstance(value, Table):
            value = value.element()
        if isinstance(value, Symbol):
            if value.tracer is not self:
                self.fail("uses an index of another trace", "Don't keep b, h, q or kv between calls.")
            return self._fix(value.position) if structural else value.position
        if isinstance(value, (bool, float)) or type(value).__name__ in ("bool", "bool_"):
            return self.builder.const(value if isinstance(value, float) else bool(value))
        if isinstance(value, numbers.Integral):
            number = int(value)
            if not _INT64.min <= number <= _INT64.max:
                self.fail(f"uses {number}, which does not fit 64 bits", "Tables and indices are at most 64-bit.")
            return self.builder.const(number) if structural else self._param(number, place)
        if isinstance(value, numbers.Real):
            return self.builder.const(float(value))
        if isinstance(value, Tensor):
            if value.ndim == 0:
                return self.table(value).element().position
            self.fail(
                f"computes with a whole tensor of shape {tuple(value.shape)}",
                "Index the tensor with b, h, q or kv, one index per dimension.",
            )
        self.fail(f"computes with a {type(value).__name__}", "Use numbers, tensors and the indices b, h, q, kv.")

    def _fix(self, position: int) -> int:
        """An integer argument in a structural place: its value becomes part of the structure."""
        node = self.builder.nodes[position]
        if node.op == "param" and isinstance(name := self.params[int(node.value or 0)], Argument):
            self.specialised.add(name)
            return self.builder.const(self._argument_values[name])
        return position

    # Slots

    def _param(self, number: int, place: int) -> int:
        """A slot for this integer at this place of the user's code: not shared with equal integers elsewhere."""
        frame = user_frame()
        site = (frame.f_code, frame.f_lasti, place)
        turn = self._occurrences.get(site, 0)
        self._occurrences[site] = turn + 1
        self._journal.append(site)
        return self._slot_node("param", (site, turn, number), self.params, number)

    def _slot_node(self, op: str, key: object, values: list[Any], value: object) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(values)
            values.append(value)
        return self.builder.add(op, dtype=torch.int64, weak=True, value=slot)

    def mark(self) -> int:
        return len(self._journal)

    def rewind(self, mark: int) -> None:
        while len(self._journal) > mark:
            self._occurrences[self._journal.pop()] -= 1

    def argument(self, name: str, value: object) -> object:
        """The stand-in for a keyword argument."""
        if isinstance(value, Tensor):
            return self.table(value, Argument(name))
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            self._argument_values[name] = int(value)
            return Symbol(self, self._slot_node("param", Argument(name), self.params, Argument(name)))
        self.specialised.add(name)
        return value

    def table(self, tensor: Tensor, name: Argument | None = None) -> Table:
        """A slot for a tensor; views of the same memory share one."""
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            self.fail(f"looks up a tensor of {tensor.dtype}, {tensor.layout}", "Use a dense real or integer tensor.")
        key: object = name
        if name is None:
            memory = tensor.data_ptr() if tensor.numel() else id(tensor)
            key = (memory, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self.tables)
            self.tables.append(tensor if name is None else name)
        return Table(self, slot, tensor, ())

    def _fixed_number(self, node: Node) -> float | None:
        number: Scalar | Argument | None = node.value if node.op == "const" else None
        if node.op == "param":
            number = self.params[int(node.value or 0)]
        return float(number) if isinstance(number, (int, float)) and abs(number) < 2**53 else None

    # Branches

    def explore(self, run: Callable[[], Any]) -> Any:
        """`run()` with its own branches merged into one value."""
        return self.paths.explore(run, self.merge, self.mark, self.rewind)

    def merge(self, condition: int, x: Any, y: Any) -> Any:
        """x where the condition holds, else y; CannotMerge if no expression can say that."""
        if x is y or (isinstance(x, Symbol) and isinstance(y, Symbol) and x.position == y.position):
            return x
        if isinstance(x, tuple) and type(x) is type(y) and len(x) == len(y):
            return tuple(self.merge(condition, a, b) for a, b in zip(x, y, strict=True))
        if not (_is_value(x) and _is_value(y)):
            raise CannotMerge(f"{type(x).__name__} and {type(y).__name__}")
        if type(x) is type(y) and not isinstance(x, (Symbol, Table, Tensor)) and x == y:
            return x
        args = [self.position(value, place) for place, value in enumerate((x, y))]
        return Symbol(self, self.builder.add("select", condition, *args))

    # Errors

    def source(self) -> Source:
        frame = user_frame()
        key = (frame.f_code, frame.f_lasti)
        if key not in self._sources:
            self._sources[key] = Source(self.name, frame.f_code.co_filename, frame.f_lineno, _code_text(frame))
        return self._sources[key]

    def fail(self, what: str, fix: str) -> NoReturn:
        source = self.source()
        code = f'"{source.text}" ' if source.text else ""
        raise MaskTraceError(f"{source}: {code}{what}. {fix}")


def _is_value(value: object) -> bool:
    return isinstance(value, (Symbol, bool, numbers.Real)) or (isinstance(value, (Tensor, Table)) and value.ndim == 0)


class Symbol:
    """A scalar whose value depends on the pair: an index, an argument, a table element, or computed from these."""

    __slots__ = ("position", "tracer")
    __array_ufunc__ = None  # numpy scalars hand their operators over
    __hash__ = None  # type: ignore[assignment]  # == builds an expression

    def __init__(self, tracer: Tracer, position: int) -> None:
        self.tracer = tracer
        self.position = position

    @property
    def node(self) -> Node:
        return self.tracer.builder.nodes[self.position]

    @property
    def dtype(self) -> torch.dtype:
        return self.node.dtype

    @property
    def device(self) -> torch.device:
        tensors = (table for table in self.tracer.tables if isinstance(table, Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def shape(self) -> torch.Size:
        return torch.Size(())

    @property
    def ndim(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return self.tracer.paths.decide(self.tracer.truth(self).position)

    def __abs__(self) -> Symbol:
        return self.tracer.apply("abs", self)

    def __neg__(self) -> Symbol:
        return self.tracer.apply("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __invert__(self) -> Symbol:
        return self.tracer.apply("not" if self.dtype == torch.bool else "bitnot", self)

    def __divmod__(self, other: object) -> tuple[Symbol, Symbol]:
        return self.tracer.apply("floordiv", self, other), self.tracer.apply("mod", self, other)

    def __pow__(self, exponent: object) -> Symbol:
        if not isinstance(exponent, int) or not 0 < exponent <= 8:
            self.tracer.fail("raises to a power", "Only small positive integer exponents are supported.")
        power = self
        for _ in range(exponent - 1):
            power = self.tracer.apply("mul", power, self)
        return power

    def __round__(self, digits: object = None) -> Symbol:
        return self.tracer.apply("round", self)

    def _concrete(self, *_: object) -> NoReturn:
        self.tracer.fail(
            "needs a concrete value",
            "Index tensors (not lists) with q or kv, and compare with `<`, `==`, `in` instead of converting.",
        )

    __int__ = __float__ = __index__ = __complex__ = __iter__ = __len__ = __array__ = __format__ = _concrete

    def __getitem__(self, index: object) -> Symbol:
        if index in ((), ...) and not isinstance(index, Symbol):
            return self
        self.tracer.fail("indexes a single element", "This tensor has fewer dimensions than indices.")

    def __repr__(self) -> str:
        return f"Symbol({self.tracer.builder.finish(self.position)})"

    def __getattr__(self, name: str) -> Any:
        from .torch_calls import method

        return method(self, name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from .torch_calls import call

        return call(func, args, kwargs or {})


def _binary(op: str) -> tuple[Callable[..., Symbol], Callable[..., Symbol]]:
    def forward(self: Symbol, other: object) -> Symbol:
        return self.tracer.apply(op, self, other)

    def reflected(self: Symbol, other: object) -> Symbol:
        return self.tracer.apply(op, other, self)

    return forward, reflected


BINARY = {
    **{name: name for name in ("add", "sub", "mul", "truediv", "floordiv", "mod")},
    **{"lshift": "shl", "rshift": "shr", "and": "bitand", "or": "bitor", "xor": "bitxor"},
}
for _name, _op in BINARY.items():
    _forward, _reflected = _binary(_op)
    setattr(Symbol, f"__{_name}__", _forward)
    setattr(Symbol, f"__r{_name}__", _reflected)
for _op in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Symbol, f"__{_op}__", _binary(_op)[0])


class Table:
    """A tensor that is looked up: a keyword argument, or a captured one that has met a symbol; maybe partly indexed."""

    __slots__ = ("indices", "slot", "tensor", "tracer")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def __init__(self, tracer: Tracer, slot: int, tensor: Tensor, indices: tuple[int, ...]) -> None:
        self.tracer = tracer
        self.slot = slot
        self.tensor = tensor
        self.indices = indices

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def ndim(self) -> int:
        return self.tensor.ndim - len(self.indices)

    @property
    def shape(self) -> torch.Size:
        """The remaining sizes; asking makes the expression depend on the argument's shape."""
        if isinstance(name := self.tracer.tables[self.slot], Argument):
            self.tracer.specialised.add(name)
        return self.tensor.shape[len(self.indices) :]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return self.ndim

    def __getitem__(self, index: object) -> Any:
        items = list(index) if isinstance(index, tuple) else [index]
        while items and (items[-1] is Ellipsis or (isinstance(items[-1], slice) and items[-1] == slice(None))):
            items.pop()
        if len(items) > self.ndim:
            self.tracer.fail(f"has {len(items)} indices for {self.ndim} dimensions", "Drop the extra ones.")
        positions = []
        for place, item in enumerate(items):
            if isinstance(item, (slice, list, type(None), type(Ellipsis), bool)) or (
                isinstance(item, Tensor) and item.ndim
            ):
                self.tracer.fail("slices a tensor or takes several elements", "Use one integer index per dimension.")
            position = self.tracer.position(item, place + 2)
            dtype = self.tracer.builder.nodes[position].dtype
            if dtype.is_floating_point or dtype == torch.bool:
                self.tracer.fail(f"indexes with {dtype}", "Use an integer index: `x // y`, or `x.long()`.")
            positions.append(position)
        found = Table(self.tracer, self.slot, self.tensor, (*self.indices, *positions))
        return found.element() if found.ndim == 0 else found

    def element(self) -> Symbol:
        """The fully indexed element."""
        if self.ndim:
            self.tracer.fail(
                f"uses a tensor with {self.ndim} of its dimensions not indexed",
                "Index the tensor with b, h, q or kv, one index per dimension.",
            )
        return self.tracer.record("lookup", *self.indices, dtype=self.tensor.dtype, weak=False, value=self.slot)

    def __bool__(self) -> bool:
        return bool(self.element())

    def __iter__(self) -> NoReturn:
        self.tracer.fail("loops over the contents of a tensor", "Index it with q or kv instead.")

    def __repr__(self) -> str:
        return f"Table(slot={self.slot}, shape={tuple(self.tensor.shape)})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.ndim == 0:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(self.element(), name)
        self.tracer.fail(
            f"asks a mask argument for `.{name}`, which needs a concrete value",
            "Index the tensor with q or kv instead, or compute it before the call and pass it in.",
        )

    __torch_function__ = Symbol.__dict__["__torch_function__"]


def _element_operator(name: str) -> Callable[..., Any]:
    def operator(self: Table, *others: object) -> Any:
        return getattr(self.element(), name)(*others)

    return operator


for _name in (
    *(f"__{prefix}{name}__" for name in BINARY for prefix in ("", "r")),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__abs__", "__neg__", "__invert__"),
    *("__int__", "__float__", "__index__", "__divmod__", "__pow__"),
):
    setattr(Table, _name, _element_operator(_name))


def user_frame() -> FrameType:
    """The innermost frame that is neither this folder's nor torch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module != _OWN and not module.startswith((_OWN + ".", "torch.")):
            break
        frame = frame.f_back
    return frame


def _code_text(frame: FrameType) -> str:
    """The source of the expression the frame is evaluating, shortened to one line."""
    span = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    first, last, start, stop = span
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if first is not None and first == last and start is not None and stop is not None:
        return line.encode()[start:stop].decode(errors="replace").strip()
    return line.strip()
