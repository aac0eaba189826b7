"""torch functions and tensor methods on symbols -> expression nodes; on captured tensors, only what stays a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskflash.errors import MaskTraceError
from maskflash.expr.ops import OPERATIONS
from maskflash.trace.symbols import (
    METHODS,
    REFLECTED,
    Symbol,
    Table,
    apply,
    element,
    is_bool,
    position,
    symbol,
    tracer_of,
    truth,
)
from maskflash.trace.tracer import Tracer

_NAMES = {
    **{f"__{name}__": row for name, row in METHODS.items()},
    **{f"__i{name}__": row for name, row in REFLECTED.items()},
    **{name: row for row in OPERATIONS.values() for name in row.called},
}
_SWAPPED = {f"__r{name}__": row.name for name, row in REFLECTED.items() if name != "truediv"} | {"rsub": "sub"}
_SAME = frozenset(("clone", "detach", "contiguous", "cpu", "positive", "__pos__"))
_STOPPING = frozenset(("detach", "detach_"))
_SHAPES = frozenset(("squeeze", "view", "reshape", "expand"))
_CASTS = {
    **{"long": torch.int64, "int": torch.int32, "short": torch.int16, "char": torch.int8, "byte": torch.uint8},
    **{"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16},
    "bool": torch.bool,
}
_CONCRETE = frozenset(("item", "tolist", "numpy", "__int__", "__float__", "__index__", "__bool__", "__iter__"))
_RANDOM = frozenset(
    str.split("""
        rand randn randint randperm normal rand_like randn_like randint_like bernoulli binomial multinomial poisson
    """)
)
_METADATA = frozenset(
    str.split("size dim numel stride __len__ ndimension data_ptr is_floating_point is_complex is_contiguous")
)


def call(tracer: Tracer, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A torch function with a symbol among its arguments."""
    name = _name_of(func)
    if name == "__getitem__" and isinstance(args[0], Tensor):
        return _look_up(tracer, args[0], args[1])
    return _dispatch(tracer, name, args, kwargs)


def _name_of(func: Callable[..., Any]) -> str:
    return "x.where" if func is Tensor.where else getattr(func, "__name__", str(func))


def method(owner: Symbol, name: str) -> Any:
    """A tensor method of a symbol, found by attribute."""
    if name == "T":
        return owner
    if name not in _METHODS:
        _check_in_place(owner.tracer, name)
        _unsupported(owner.tracer, f"`.{name}`")
    return partial(_call_method, owner, _METHOD_NAMES.get(name, name))


def _call_method(owner: Symbol, name: str, *args: Any, **kwargs: Any) -> Any:
    return _dispatch(owner.tracer, name, (owner, *args), kwargs)


def _look_up(tracer: Tracer, tensor: Tensor, index: object) -> object:
    slot = tracer.table(tensor)
    return Table(tracer, slot, tensor, ())[index] if tensor.ndim else element(tracer, slot, tensor.dtype, ())[index]


def _dispatch(tracer: Tracer, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name in _CONCRETE:
        tracer.fail(f"needs a concrete value (`.{name}`)", "Index the tensor with q or kv instead.")
    if name in ("isin", "__contains__"):
        tracer.fail_member()
    if "out" in kwargs:
        tracer.fail("writes to a tensor", "Use the function's result instead of `out=`.")
    _check_in_place(tracer, name)
    if name in _STOPPING and tracer.role.scores:
        _fail_stopped(tracer)
    args, kwargs = _positional(args, kwargs)
    plain = not kwargs
    if name in _NAMES and len(args) == _NAMES[name].arity and plain:
        return apply(tracer, _NAMES[name].name, *args)
    if name in _SWAPPED and len(args) == 2 and plain:
        return apply(tracer, _SWAPPED[name], args[1], args[0])
    if name in _SAME or (name in _SHAPES and _keeps_one_element(args[1:], kwargs)):
        return symbol(tracer, args[0])
    if name in _CASTS and len(args) == 1:
        return _cast(tracer, args[0], _CASTS[name])
    if name in _SPECIAL:
        try:
            return _SPECIAL[name](tracer, *args, **kwargs)
        except MaskTraceError:
            raise
        except (TypeError, KeyError):  # other arguments than ours
            pass
    if any(isinstance(value, Table) or (isinstance(value, Tensor) and value.ndim) for value in args):
        tracer.fail(f"uses `{name}` on a whole tensor", tracer.index_fix)
    known = name in _NAMES or name in _SPECIAL or name in _SHAPES
    _unsupported(tracer, f"`{name}`" + " with these arguments" * known)


def _positional(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operands of torch.f(input=..., other=...) by place."""
    rest = dict(kwargs)
    first = [rest.pop("input")] if "input" in rest else []
    places = (*first, *args)
    if "other" in rest and len(places) == 1:
        places = (*places, rest.pop("other"))
    return places, rest


def _keeps_one_element(sizes: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return not kwargs and all(size in ((), []) if isinstance(size, (tuple, list)) else False for size in sizes)


def _check_in_place(tracer: Tracer, name: str) -> None:
    if name.endswith("_") and not name.endswith("__"):
        tracer.fail("writes to a tensor", f"Use what `{name[:-1]}` returns instead of `{name}`.")


def _fail_stopped(tracer: Tracer) -> NoReturn:
    tracer.fail(
        "keeps a gradient from what it computes with",
        "Detach tensors before, outside of the score function; what depends on the score has its derivative.",
    )


def _unsupported(tracer: Tracer, what: str) -> NoReturn:
    if tracer.role.scores:
        tracer.fail(
            f"uses {what}, which has no derivative here",
            "Scores may use arithmetic, look-ups, where, min/max/clamp/abs, rounding, and exp, log, tanh, sigmoid, "
            "pow, sqrt, sin, cos and erf.",
        )
    tracer.fail(
        f"uses {what}, which has no meaning in a mask expression",
        "Masks may use arithmetic, comparisons, look-ups, where, min/max/clamp/abs and rounding.",
    )


def _cast(tracer: Tracer, value: object, dtype: torch.dtype) -> Symbol:
    found = symbol(tracer, value)
    if dtype == torch.bool:
        return truth(tracer, found)
    if found.dtype == dtype and not found.node.weak:
        return found
    return Symbol(tracer, tracer.record("cast", found.position, dtype=dtype, weak=False))


def _to(tracer: Tracer, value: object, *args: object, **kwargs: object) -> Symbol:
    for target in (*args, *kwargs.values()):
        if isinstance(target, torch.dtype):
            return _cast(tracer, value, target)
        if isinstance(target, (Symbol, Tensor, Table)):
            return _cast(tracer, value, target.dtype)
    return symbol(tracer, value)


def _type(tracer: Tracer, value: object, dtype: torch.dtype) -> Symbol:
    if not isinstance(dtype, torch.dtype):
        raise TypeError
    return _cast(tracer, value, dtype)


def _where(tracer: Tracer, condition: object, x: object, y: object) -> Symbol:
    args = [position(tracer, value, place) for place, value in enumerate((x, y))]
    return Symbol(tracer, tracer.record("select", truth(tracer, condition).position, *args))


def _clamp(tracer: Tracer, value: object, min: object = None, max: object = None) -> Symbol:
    found = symbol(tracer, value)
    for op, beyond, limit in (("max", "lt", min), ("min", "gt", max)):
        if limit is None:
            continue
        if tracer.role.scores and found.dtype.is_floating_point:  # torch's derivative at the limit is that inside
            found = _where(tracer, apply(tracer, beyond, found, limit), limit, found)
        else:
            found = apply(tracer, op, found, limit)
    return found


def _divide(tracer: Tracer, x: object, y: object, *, rounding_mode: str | None = None) -> Symbol:
    return apply(tracer, {None: "truediv", "floor": "floordiv", "trunc": "truncdiv"}[rounding_mode], x, y)


def _softplus(tracer: Tracer, x: object, beta: float = 1, threshold: float = 20) -> Symbol:
    scaled = apply(tracer, "mul", x, beta)
    small = apply(tracer, "truediv", apply(tracer, "log1p", apply(tracer, "exp", scaled)), beta)
    return _where(tracer, apply(tracer, "gt", scaled, threshold), x, small)


def _out_of_place(compute: Callable[[Tracer, object], Symbol]) -> Callable[..., Symbol]:
    def applied(tracer: Tracer, x: object, inplace: bool = False) -> Symbol:
        if inplace:
            tracer.fail("writes to a tensor", "Use the function's result instead of `inplace=`.")
        return compute(tracer, x)

    return applied


def _float_power(tracer: Tracer, x: object, exponent: object) -> Symbol:
    return apply(tracer, "pow", _cast(tracer, x, torch.float64), exponent)


def _logical(op: str) -> Callable[..., Symbol]:
    def connect(tracer: Tracer, x: object, *y: object) -> Symbol:
        return apply(tracer, op, truth(tracer, x), *(truth(tracer, operand) for operand in y))

    return connect


def _invert(tracer: Tracer, value: object) -> Symbol:
    return ~symbol(tracer, value)


def _filled(number: object) -> Callable[..., Any]:
    """ones_like, new_zeros and friends: a constant, when asked for a single element."""

    def fill(tracer: Tracer, like: Symbol, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        size = args[0] if args else kwargs.get("size", ())
        if tuple(size) if isinstance(size, (tuple, list, torch.Size)) else True:
            tracer.fail("makes a tensor inside the predicate", "Make it outside and index it with q or kv.")
        return _cast(tracer, symbol(tracer, number), dtype or like.dtype)

    return fill


def _full(tracer: Tracer, like: Symbol, *args: Any, **kwargs: Any) -> Any:
    *size, number = args if "fill_value" not in kwargs else (*args, kwargs.pop("fill_value"))
    return _filled(number)(tracer, like, *size, **kwargs)


_SPECIAL: dict[str, Callable[..., Any]] = {
    **{"to": _to, "type": _type, "type_as": _to, "where": _where, "clamp": _clamp, "clip": _clamp},
    **{"clamp_min": lambda t, x, low: _clamp(t, x, low), "clamp_max": lambda t, x, high: _clamp(t, x, None, high)},
    **{"div": _divide, "divide": _divide, "logical_not": _logical("not"), "logical_xor": _logical("bitxor")},
    **{"logical_and": _logical("bitand"), "logical_or": _logical("bitor")},
    **{"bitwise_not": _invert, "__invert__": _invert, "square": lambda t, x: symbol(t, x) ** 2},
    **{name: lambda t, x, exponent: symbol(t, x) ** exponent for name in ("pow", "__pow__")},
    **{name: lambda t, x, y: symbol(t, x).__rtruediv__(y) for name in ("__rtruediv__", "__rdiv__")},
    "x.where": lambda t, x, condition, y: _where(t, condition, x, y),
    **{"ones_like": _filled(1), "zeros_like": _filled(0), "new_ones": _filled(1), "new_zeros": _filled(0)},
    **{"full_like": _full, "new_full": _full, "new_tensor": lambda t, like, x, **kw: _filled(x)(t, like, (), **kw)},
    **{"any": lambda t, x: truth(t, x), "all": lambda t, x: truth(t, x), "size": lambda t, x: torch.Size(())},
    **{"dim": lambda t, x: 0, "numel": lambda t, x: 1, "__getitem__": lambda t, x, index: x[index]},
    **{"is_floating_point": lambda t, x: x.dtype.is_floating_point},
    **{"masked_fill": lambda t, x, hidden, value: _where(t, hidden, value, x)},
    **{"relu": _out_of_place(lambda t, x: _where(t, apply(t, "gt", x, 0), x, 0)), "softplus": _softplus},
    **{"silu": _out_of_place(lambda t, x: apply(t, "mul", x, apply(t, "sigmoid", x)))},
    **{"log_sigmoid": lambda t, x: apply(t, "neg", _softplus(t, apply(t, "neg", x)))},
    **{"reciprocal": lambda t, x: apply(t, "truediv", 1.0, x), "float_power": _float_power},
}
_METHOD_NAMES = {"where": "x.where"}  # x.where(condition, y) is torch.where(condition, x, y)
_METHODS = frozenset((*_NAMES, *_SAME, *_SHAPES, *_CASTS, *_CONCRETE, *_SPECIAL))


class CapturedTensors(TorchFunctionMode):
    """While a predicate runs, what it does with captured tensors alone.

    Their contents may change later, so a value computed from them now would silently go stale: reading sizes and
    taking views is fine, arithmetic on 0-dim tensors is recorded, everything else is refused, random numbers first.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _name_of(func)
        if name in _RANDOM:
            self.tracer.fail_draw(f"torch.{name}")
        if tracer_of(args, kwargs) is not None:
            return call(self.tracer, func, args, kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if name in _STOPPING and self.tracer.role.scores:
            _fail_stopped(self.tracer)
        if name == "__getitem__" and _is_element(*args):  # out of range, perhaps, on a path that is never taken
            return _look_up(self.tracer, *args)
        if name in _METADATA or name == "__get__":
            for tensor in tensors:
                self.tracer.reads_layout_of(tensor)
            found = func(*args, **kwargs)
            self.tracer.viewed(found, tensors)  # `.T`
            return found
        if name in _CONCRETE:
            self.tracer.fail("needs a concrete value", "Index the tensor with q or kv instead.")
        if name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
            self.tracer.fail("writes to a tensor", "A predicate may only read; prepare tensors before the call.")
        if tensors and name != "__getitem__" and all(tensor.ndim == 0 for tensor in tensors):
            wrapped = [symbol(self.tracer, value) if isinstance(value, Tensor) else value for value in args]
            return _dispatch(self.tracer, name, tuple(wrapped), kwargs)
        try:
            result = func(*args, **kwargs)
        except IndexError:
            if name == "__getitem__" and (partial_row := _out_of_range(self.tracer, *args)) is not None:
                return partial_row
            raise
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if all(_is_view(part, tensors) for part in parts):
            for part in parts:
                self.tracer.viewed(part, tensors)
            return result
        if not tensors and isinstance(result, Tensor) and result.ndim == 0:  # torch.tensor(5)
            return self._constant(result)
        self.tracer.fail(
            f"computes a new value (`{name}`) that would be frozen at this moment",
            "Compute it outside the predicate and index the result, or index first and compute on elements.",
        )

    def _constant(self, made: Tensor) -> Symbol:
        place = position(self.tracer, made.item(), 0)
        return Symbol(self.tracer, self.tracer.record("cast", place, dtype=made.dtype, weak=False))


def _is_element(tensor: Tensor, index: object) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return len(items) == tensor.ndim > 0 and all(isinstance(i, Integral) and not is_bool(i) for i in items)


def _out_of_range(tracer: Tracer, tensor: Tensor, index: object) -> Table | None:
    """A view at indices that its tensor does not have: a guard may keep every pair from it. None if it isn't one."""
    items = list(index) if isinstance(index, tuple) else [index]
    whole = slice(None)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [whole] * (tensor.ndim + 1 - len(items))
    items += [whole] * (tensor.ndim - len(items))
    fixed = [axis for axis, item in enumerate(items) if isinstance(item, Integral) and not is_bool(item)]
    free = [axis for axis, item in enumerate(items) if isinstance(item, slice) and item == whole]
    if sorted(fixed + free) != list(range(tensor.ndim)):
        return None
    order = fixed + free
    moved = tensor if order == sorted(order) else tensor.permute(order)
    tracer.viewed(moved, [tensor])
    row: Table = Table(tracer, tracer.table(moved), moved, ())[tuple(items[axis] for axis in fixed)]
    return row


def _is_view(value: object, tensors: list[Tensor]) -> bool:
    """Whether a result is a view of one of the tensors it came from, or says nothing of any tensor's contents."""
    if not isinstance(value, Tensor):
        return not tensors or not isinstance(value, (bool, int, float))
    storage = value.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == storage for tensor in tensors)
