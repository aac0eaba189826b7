"""torch functions and tensor methods on symbols -> expression nodes; on captured tensors, only what stays a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .symbols import BINARY, Symbol, Table, Tracer

_BINARY = {
    **{f"__{name}__": op for name, op in BINARY.items()},
    **{f"__i{name}__": op for name, op in BINARY.items()},
    **{op: op for op in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "fmod")},
    **{"subtract": "sub", "multiply": "mul", "true_divide": "truediv", "floor_divide": "floordiv"},
    **{"remainder": "mod", "minimum": "min", "maximum": "max", "min": "min", "max": "max"},
    **{"bitwise_and": "bitand", "bitwise_or": "bitor", "bitwise_xor": "bitxor"},
    **{"bitwise_left_shift": "shl", "bitwise_right_shift": "shr"},
    **{"not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge"},
}
_REFLECTED = {**{f"__r{name}__": op for name, op in BINARY.items()}, "rsub": "sub"}
_UNARY = {
    **{name: name for name in ("neg", "abs", "floor", "ceil", "trunc", "sqrt")},
    **{"negative": "neg", "absolute": "abs", "fix": "trunc", "__neg__": "neg", "__abs__": "abs", "round": "round"},
}
_SAME = frozenset(("clone", "detach", "contiguous", "squeeze", "view", "reshape", "cpu", "expand", "positive"))
_CASTS = {
    **{"long": torch.int64, "int": torch.int32, "short": torch.int16, "char": torch.int8, "byte": torch.uint8},
    **{"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16},
    "bool": torch.bool,
}
_CONCRETE = frozenset(("item", "tolist", "numpy", "__int__", "__float__", "__index__", "__bool__", "__iter__"))
_METADATA = frozenset(
    ("size", "dim", "numel", "stride", "__len__", "ndimension", "data_ptr", "is_floating_point", "is_complex")
)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A torch function with a symbol among its arguments."""
    name = getattr(func, "__name__", str(func))
    tracer = _tracer_of(args, kwargs)
    if name == "__getitem__" and isinstance(args[0], Tensor):
        return tracer.table(args[0])[args[1]]
    if name == "__get__":  # a property of a tensor, which has no symbol in it
        _unsupported(tracer, "this attribute")
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    return _apply(tracer, name, args, kwargs)


def method(symbol: Symbol, name: str) -> Any:
    """A tensor method of a symbol, found by attribute."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "T":
        return symbol
    if name not in _METHODS:
        _unsupported(symbol.tracer, f"`.{name}`")
    return partial(_call_method, symbol, name)


def _call_method(symbol: Symbol, name: str, *args: Any, **kwargs: Any) -> Any:
    return _apply(symbol.tracer, name, (symbol, *args), kwargs)


def _apply(tracer: Tracer, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name in _CONCRETE:
        tracer.fail(f"needs a concrete value (`.{name}`)", "Index the tensor with q or kv instead.")
    if name in _BINARY and len(args) + len(kwargs) == 2:
        return tracer.apply(_BINARY[name], *args, *kwargs.values())
    if name in _REFLECTED:
        return tracer.apply(_REFLECTED[name], args[1], args[0])
    if name in _UNARY:
        return tracer.apply(_UNARY[name], args[0])
    if name in _SAME:
        return tracer.symbol(args[0])
    if name in _CASTS:
        return _cast(tracer, args[0], _CASTS[name])
    if name in _SPECIAL:
        return _SPECIAL[name](tracer, *args, **kwargs)
    _unsupported(tracer, f"`{name}`")


def _unsupported(tracer: Tracer, what: str) -> NoReturn:
    tracer.fail(
        f"uses {what}, which has no meaning in a mask expression",
        "Masks may use arithmetic, comparisons, look-ups, where, min/max/clamp/abs and rounding.",
    )


def _tracer_of(*values: Any) -> Tracer:
    for value in values:
        if isinstance(value, (Symbol, Table)):
            return value.tracer
        if isinstance(value, (tuple, list, dict)):
            found = _tracer_of(*(value.values() if isinstance(value, dict) else value))
            if found is not None:
                return found
    return None  # type: ignore[return-value]


def _cast(tracer: Tracer, value: object, dtype: torch.dtype) -> Symbol:
    symbol = tracer.symbol(value)
    if dtype == torch.bool:
        return tracer.truth(symbol)
    if symbol.dtype == dtype and not symbol.node.weak:
        return symbol
    return tracer.record("cast", symbol.position, dtype=dtype, weak=False)


def _to(tracer: Tracer, value: object, *args: object, **kwargs: object) -> Symbol:
    for target in (*args, *kwargs.values()):
        if isinstance(target, torch.dtype):
            return _cast(tracer, value, target)
        if isinstance(target, (Symbol, Tensor, Table)):
            return _cast(tracer, value, target.dtype)
    return tracer.symbol(value)


def _where(tracer: Tracer, condition: object, x: object, y: object) -> Symbol:
    args = [tracer.position(value, place) for place, value in enumerate((x, y))]
    return tracer.record("select", tracer.truth(condition).position, *args)


def _clamp(tracer: Tracer, value: object, min: object = None, max: object = None) -> Symbol:
    symbol = tracer.symbol(value)
    if min is not None:
        symbol = tracer.apply("max", symbol, min)
    return symbol if max is None else tracer.apply("min", symbol, max)


def _divide(tracer: Tracer, x: object, y: object, *, rounding_mode: str | None = None) -> Symbol:
    return tracer.apply({None: "truediv", "floor": "floordiv", "trunc": "truncdiv"}[rounding_mode], x, y)


def _logical(op: str) -> Callable[..., Symbol]:
    def apply(tracer: Tracer, *operands: object) -> Symbol:
        return tracer.apply(op, *(tracer.truth(operand) for operand in operands))

    return apply


def _invert(tracer: Tracer, value: object) -> Symbol:
    return ~tracer.symbol(value)


def _filled(number: object) -> Callable[..., Any]:
    """ones_like, new_zeros and friends: a constant, when asked for a single element."""

    def fill(tracer: Tracer, like: Symbol, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        size = args[0] if args else kwargs.get("size", ())
        if tuple(size) if isinstance(size, (tuple, list, torch.Size)) else True:
            tracer.fail("makes a tensor inside the predicate", "Make it outside and index it with q or kv.")
        return _cast(tracer, tracer.symbol(number), dtype or like.dtype)

    return fill


def _full(tracer: Tracer, like: Symbol, *args: Any, **kwargs: Any) -> Any:
    *size, number = args if "fill_value" not in kwargs else (*args, kwargs.pop("fill_value"))
    return _filled(number)(tracer, like, *size, **kwargs)


def _power(tracer: Tracer, value: object, exponent: object) -> Symbol:
    return tracer.symbol(value) ** exponent


def _round_half(tracer: Tracer, value: object, **kwargs: object) -> Symbol:
    return tracer.apply("round", value)


_SPECIAL: dict[str, Callable[..., Any]] = {
    **{"to": _to, "type": _to, "type_as": _to, "where": _where, "clamp": _clamp, "clip": _clamp},
    **{"clamp_min": lambda t, x, low: _clamp(t, x, low), "clamp_max": lambda t, x, high: _clamp(t, x, None, high)},
    **{"div": _divide, "divide": _divide, "logical_not": _logical("not"), "logical_xor": _logical("bitxor")},
    **{"logical_and": _logical("bitand"), "logical_or": _logical("bitor")},
    **{"bitwise_not": _invert, "__invert__": _invert, "pow": _power, "square": lambda t, x: _power(t, x, 2)},
    **{"ones_like": _filled(1), "zeros_like": _filled(0), "new_ones": _filled(1), "new_zeros": _filled(0)},
    **{"full_like": _full, "new_full": _full, "new_tensor": lambda t, like, x, **kw: _filled(x)(t, like, (), **kw)},
    **{"any": lambda t, x: t.truth(x), "all": lambda t, x: t.truth(x), "size": lambda t, x: torch.Size(())},
    **{"dim": lambda t, x: 0, "numel": lambda t, x: 1, "__getitem__": lambda t, x, index: x[index]},
    **{"is_floating_point": lambda t, x: x.dtype.is_floating_point},
}
_METHODS = frozenset((*_BINARY, *_UNARY, *_SAME, *_CASTS, *_CONCRETE, *_SPECIAL))


class CapturedTensors(TorchFunctionMode):
    """While a predicate runs, what it does with captured tensors alone.

    Their contents may change later, so a value computed from them now would silently go stale: reading sizes and
    taking views is fine, arithmetic on 0-dim tensors is recorded, everything else is refused.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if _tracer_of(args, dict(kwargs)) is not None:
            return call(func, args, kwargs)
        if not tensors or name in _METADATA or name == "__get__":
            return func(*args, **kwargs)
        if name in _CONCRETE:
            self.tracer.fail("needs a concrete value", "Index the tensor with q or kv instead.")
        if name != "__getitem__" and all(tensor.ndim == 0 for tensor in tensors):
            wrapped = [self.tracer.symbol(value) if isinstance(value, Tensor) else value for value in args]
            return _apply(self.tracer, name, tuple(wrapped), kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if any(_same_memory(result, tensor) for tensor in tensors):
            return result
        self.tracer.fail(
            f"computes a new tensor (`{name}`) whose contents would be frozen at this moment",
            "Compute it outside the predicate and index the result, or index first and compute on elements.",
        )


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
