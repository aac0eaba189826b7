"""Stand-ins for indices, run-time arguments and table elements: operating on them records expression nodes."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor

from maskflash.expr.nodes import Node
from maskflash.expr.ops import OPERATIONS
from maskflash.trace.frames import asks_for_class
from maskflash.trace.tracer import Tracer

_INT64 = torch.iinfo(torch.int64)

# Recording


def apply(tracer: Tracer, op: str, *operands: object) -> Symbol:
    """Record an operation on symbols, numbers and 0-dim tensors, under torch's promotion rules."""
    operation = OPERATIONS[op]
    if operation.inexact and not tracer.role.scores:
        tracer.fail_inexact(op)
    masks = operation.fixes == "mask"
    quotient = op == "truediv" and tracer.role.scores and isinstance(operands[1], Symbol)  # of a cap, say
    fixed = (masks, bool(operation.fixes) and not quotient)
    args = [position(tracer, operand, place, fixed[place]) for place, operand in enumerate(operands)]
    if masks and tracer.builder.nodes[args[0]].op == "const":
        args.reverse()  # bit masks on the right
    kinds = [tracer.builder.nodes[arg] for arg in args]
    truths = [kind.dtype == torch.bool and not kind.weak for kind in kinds]
    if not operation.of_truths and all(truths):
        tracer.fail(f"applies `{op}` to truth values", "Use `&`, `|`, `^` or `not` on them, or convert with `.long()`.")
    if not operation.of_reals and any(kind.dtype.is_floating_point for kind in kinds):
        tracer.fail("does bit operations on floating-point numbers", "Convert with `.long()` first.")
    if operation.fixes == "divisor" and kinds[1].op == "const" and kinds[1].value == 0:
        tracer.fail("divides by the constant zero", "Check the divisor this predicate was built with.")
    return Symbol(tracer, tracer.record(op, *args))


def truth(tracer: Tracer, value: object) -> Symbol:
    """A value as a bool node."""
    found = symbol(tracer, value)
    if found.dtype == torch.bool:
        return found
    return Symbol(tracer, tracer.record("cast", found.position, dtype=torch.bool))


def symbol(tracer: Tracer, value: object) -> Symbol:
    """A value as a symbol; a number becomes a constant of the structure."""
    return value if isinstance(value, Symbol) else Symbol(tracer, position(tracer, value, 0, structural=True))


def position(tracer: Tracer, value: object, place: int, structural: bool = False) -> int:
    """The node of an operand.

    Integers become params, so that their values don't shape the expression, unless `structural`: divisors, moduli,
    shift counts and bit masks are cheaper as constants of the kernel.
    """
    if isinstance(value, Symbol):
        if value.tracer is not tracer:
            tracer.fail("uses an index of another trace", "Don't keep b, h, q or kv between calls.")
        return tracer.fix(value.position) if structural else value.position
    if is_bool(value):
        return tracer.builder.const(bool(value))
    if isinstance(value, float):
        return tracer.builder.const(float(value))
    if isinstance(value, numbers.Integral):
        number = int(value)
        if not _INT64.min <= number <= _INT64.max:
            short = number.bit_length() < 256
            _fail_size(tracer, str(number) if short else f"an integer of {number.bit_length():,} bits")
        return tracer.builder.const(number) if structural else tracer.param(number, place)
    if isinstance(value, numbers.Real):
        try:
            return tracer.builder.const(float(value))
        except OverflowError:
            _fail_size(tracer, f"a {type(value).__name__}")
    if isinstance(value, Tensor) and value.ndim == 0:
        return element(tracer, tracer.table(value), value.dtype, ()).position
    if isinstance(value, (Tensor, Table)):
        tracer.fail(f"computes with a whole tensor of shape {tuple(value.shape)}", tracer.index_fix)
    if value is None:
        tracer.fail("computes with None", "Is a `return` missing in a helper function?")
    tracer.fail(f"computes with a {type(value).__name__}", "Use numbers, tensors and the indices b, h, q, kv.")


def _fail_size(tracer: Tracer, number: str) -> NoReturn:
    tracer.fail(f"uses {number}, which does not fit 64 bits", "Tables and indices are at most 64-bit.")


def is_bool(value: object) -> bool:
    """Whether a value is True or False, Python's or numpy's."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def element(tracer: Tracer, slot: int, dtype: torch.dtype, indices: tuple[int, ...]) -> Symbol:
    """A fully indexed table."""
    return Symbol(tracer, tracer.record("lookup", *indices, dtype=dtype, weak=False, value=slot))


# Values


class _StandIn:
    """What passes for another value while a predicate runs, and records what is done with it."""

    __slots__ = ("tracer",)
    __array_ufunc__ = None  # numpy scalars hand their operators over

    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` and class patterns read: for our code the true one."""
        if not asks_for_class(sys._getframe(1)):
            return type(self)
        kinds = stands_for(cast("Symbol | Table", self))
        return fail_type(self) if len(kinds) > 1 else kinds[0]

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tracer = tracer_of(args, kwargs)
        assert tracer is not None
        return tracer.torch.call(tracer, func, args, kwargs)


class Symbol(_StandIn):
    """A scalar whose value depends on the pair: an index, an argument, a table element, or computed from these."""

    __slots__ = ("position",)

    def __init__(self, tracer: Tracer, position: int) -> None:
        self.tracer = tracer
        self.position: int = position

    @property
    def node(self) -> Node:
        """What the symbol stands for."""
        return self.tracer.builder.nodes[self.position]

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.node.dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        held = (*self.tracer.tables, *self.tracer.sources.values.values())
        return next((value.device for value in held if isinstance(value, Tensor)), torch.device("cpu"))

    @property
    def shape(self) -> torch.Size:
        """As of a 0-dim tensor."""
        return torch.Size(())

    @property
    def ndim(self) -> int:
        """How many indices are missing."""
        return 0

    def __bool__(self) -> bool:
        return self.tracer.decide(truth(self.tracer, self).position)

    def __pos__(self) -> Symbol:
        return self

    def __invert__(self) -> Symbol:
        self.tracer.settle("bitnot", self.position)
        strong_truth = self.dtype == torch.bool and not self.node.weak  # Python's ~True is -2
        return apply(self.tracer, "not" if strong_truth else "bitnot", self)

    def __rtruediv__(self, other: object) -> Symbol:
        if isinstance(other, numbers.Real):  # as torch does, to the last bit
            return apply(self.tracer, "mul", apply(self.tracer, "truediv", 1.0, self), other)
        return apply(self.tracer, "truediv", other, self)

    def __divmod__(self, other: object) -> tuple[Symbol, Symbol]:
        return apply(self.tracer, "floordiv", self, other), apply(self.tracer, "mod", self, other)

    def __rdivmod__(self, other: object) -> tuple[Symbol, Symbol]:
        return apply(self.tracer, "floordiv", other, self), apply(self.tracer, "mod", other, self)

    def __pow__(self, exponent: object) -> Symbol:
        most = 3 if self.dtype.is_floating_point else 8  # torch multiplies floats out only so far
        if not isinstance(exponent, int) or not 0 < exponent <= most or self.dtype == torch.bool:
            if self.tracer.role.scores:
                return apply(self.tracer, "pow", self, exponent)
            self.tracer.fail(
                "raises to a power", "Exponents may be 1 to 8 on integers and 1 to 3 on floats; else multiply."
            )
        if exponent == 1:
            return self
        if exponent % 2:
            return apply(self.tracer, "mul", self ** (exponent - 1), self)
        root = self ** (exponent // 2)
        return apply(self.tracer, "mul", root, root)  # a square, which is never negative

    def __rpow__(self, base: object) -> Symbol:
        return apply(self.tracer, "pow", base, self) if self.tracer.role.scores else self._concrete()

    def _concrete(self, *_: object) -> NoReturn:
        self.tracer.fail(
            "needs a concrete value",
            "Index tensors with q or kv, not lists or arrays, compare with `<`, `==` or `in` instead of converting, "
            "and use torch's functions, not math's.",
        )

    __int__ = __float__ = __index__ = __complex__ = __iter__ = __len__ = __array__ = __format__ = _concrete
    __round__ = __trunc__ = __floor__ = __ceil__ = __matmul__ = __setitem__ = _concrete

    def __hash__(self) -> int:
        self.tracer.fail("uses an index as a key", "Look it up in a tensor instead of a dict, set or cache.")

    def __getitem__(self, index: object) -> Symbol:
        if index is Ellipsis or (isinstance(index, tuple) and not index):
            return self
        self.tracer.fail("indexes a single element", "This tensor has fewer dimensions than indices.")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._concrete()

    def __repr__(self) -> str:
        if not self.tracer.tells:
            self._concrete()
        return f"Symbol({self.tracer.builder.finish(self.position)})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.tracer.torch.method(self, name)


def tracer_of(*values: object) -> Tracer | None:
    """The trace of a symbol found in (containers of) these values."""
    for value in values:
        if isinstance(value, (Symbol, Table)):
            return value.tracer
        if isinstance(value, (tuple, list, dict)):
            found = tracer_of(*(value.values() if isinstance(value, dict) else value))
            if found is not None:
                return found
    return None


class Table(_StandIn):
    """A tensor that is looked up: a keyword argument, or a captured one that has met a symbol; maybe partly indexed."""

    __slots__ = ("indices", "slot", "tensor")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tracer: Tracer, slot: int, tensor: Tensor, indices: tuple[int, ...]) -> None:
        self.tracer = tracer
        self.slot: int = slot
        self.tensor: Tensor = tensor
        self.indices: tuple[int, ...] = indices

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.tensor.device

    @property
    def ndim(self) -> int:
        """How many indices are missing."""
        return self.tensor.ndim - len(self.indices)

    @property
    def shape(self) -> torch.Size:
        """The remaining sizes; asking makes the expression depend on the argument's shape."""
        self.tracer.depends_on_shape(self.slot)
        return self.tensor.shape[len(self.indices) :]

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor; see `shape`."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As of a tensor; see `shape`."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """As of a tensor."""
        return self.ndim

    def __getitem__(self, index: object) -> Any:
        items = list(index) if isinstance(index, tuple) else [index]
        while items and (items[-1] is Ellipsis or (isinstance(items[-1], slice) and items[-1] == slice(None))):
            items.pop()
        if any(_takes_several(item) for item in items):
            self.tracer.fail("slices a tensor or takes several elements", "Use one integer index per dimension.")
        if len(items) > self.ndim:
            self.tracer.fail(f"has {len(items)} indices for {self.ndim} dimensions", "Drop the extra ones.")
        indices = (*self.indices, *(self._index(item, place + 2) for place, item in enumerate(items)))
        if len(indices) == self.tensor.ndim:
            return element(self.tracer, self.slot, self.tensor.dtype, indices)
        return Table(self.tracer, self.slot, self.tensor, indices)

    def _index(self, item: object, place: int) -> int:
        found = position(self.tracer, item, place)
        dtype = self.tracer.builder.nodes[found].dtype
        if dtype.is_floating_point or dtype in (torch.bool, torch.uint8):  # torch takes uint8 for a mask
            self.tracer.fail(f"indexes with {dtype}", "Use an integer index: `x // y`, or `x.long()`.")
        return found

    def _whole(self, *_: object) -> NoReturn:
        self.tracer.fail(f"uses a tensor with {self.ndim} of its dimensions not indexed", self.tracer.index_fix)

    def __iter__(self) -> NoReturn:
        self.tracer.fail("loops over the contents of a tensor", "Index it with q or kv instead.")

    def __setitem__(self, index: object, value: object) -> NoReturn:
        self.tracer.fail("writes to a tensor", "A predicate may only read; prepare tensors before the call.")

    def __contains__(self, value: object) -> NoReturn:
        self.tracer.fail_member()

    def __repr__(self) -> str:
        return f"Table(slot={self.slot}, shape={tuple(self.tensor.shape)})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        before = "Index the tensor with q or kv first, or compute it before the call and pass it in."
        fix = self.tracer.index_fix if self.tracer.role.scores else before
        self.tracer.fail(f"asks a whole tensor for `.{name}`, which needs a concrete value", fix)


# What they pass for


def stands_for(value: Symbol | Table) -> tuple[type, ...]:
    """The types that a value may have where Python runs the predicate on pairs: indices may be ints or tensors."""
    if isinstance(value, Table):
        return (type(value.tensor),)
    number = bool if value.dtype == torch.bool else float if value.dtype.is_floating_point else int
    return (number,) if value.node.weak else (number, Tensor)


def fail_type(value: _StandIn) -> NoReturn:
    """Refuse to say whether a value is a number or a tensor."""
    value.tracer.fail(
        "asks for the type of an index or of what is computed from it, which may be a number or a tensor",
        "Write what serves both, or decide by an argument of the mask.",
    )


def _takes_several(index: object) -> bool:
    if isinstance(index, (Tensor, Table)):
        return index.ndim > 0
    return isinstance(index, (slice, list, type(None), type(Ellipsis), bool))


# Operators

METHODS = {row.method: row for row in OPERATIONS.values() if row.method}
REFLECTED = {name: row for name, row in METHODS.items() if row.arity == 2 and not row.mirrored}


def _forward(op: str) -> Callable[..., Symbol]:
    return lambda self, *other: apply(self.tracer, op, self, *other)


def _reflected(op: str) -> Callable[..., Symbol]:
    return lambda self, other: apply(self.tracer, op, other, self)


for _name, _row in METHODS.items():
    setattr(Symbol, f"__{_name}__", _forward(_row.name))
    setattr(Table, f"__{_name}__", Table._whole)
for _name, _row in REFLECTED.items():
    setattr(Table, f"__r{_name}__", Table._whole)
    if _name != "truediv":
        setattr(Symbol, f"__r{_name}__", _reflected(_row.name))
for _name in ("invert", "bool", "int", "float", "index", "divmod", "rdivmod", "pow", "rpow", "matmul", "rmatmul"):
    setattr(Table, f"__{_name}__", Table._whole)
