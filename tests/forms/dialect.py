"""CuTe's Python dialect, as far as mask functions use it, on torch's tensors: an element for each pair.

Its rules are those measured of nvidia-cutlass-dsl 4.8.1 on a CPU: `//` rounds down, types of fewer bits keep the low
ones, and an operation wants both operands of one type. `%` is C's and an i1 is signed, so that neither may be used.
"""

import sys
from contextlib import contextmanager
from types import ModuleType

import torch


class Value:
    """A number of one type; operations of two types, which the dialect promotes by rules of its own, are errors."""

    def __init__(self, data):
        self.data = data

    def _two(self, other, compute):
        other = typed(self.data.dtype)(other) if isinstance(other, int) else other  # Python's numbers are of any type
        assert other.data.dtype == self.data.dtype, "operands of one type"
        return Value(compute(self.data, other.data))

    def _ordered(self, other, compute):
        assert self.data.dtype != torch.bool, "True is -1 in comparisons"
        return self._two(other, compute)

    def __invert__(self):
        return Value(~self.data)

    def __neg__(self):
        return Value(-self.data)


for name, compute in {
    **{"add": torch.add, "sub": torch.sub, "mul": torch.mul, "lshift": torch.bitwise_left_shift},
    **{"rshift": torch.bitwise_right_shift, "floordiv": torch.floor_divide},
    **{"and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor},
}.items():
    setattr(Value, f"__{name}__", lambda x, y, compute=compute: x._two(y, compute))
for compute in (torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge):
    setattr(Value, f"__{compute.__name__}__", lambda x, y, compute=compute: x._ordered(y, compute))


def typed(dtype):
    """A type: what makes numbers of it."""
    return lambda x: Value(x.data.to(dtype) if isinstance(x, Value) else torch.tensor(x).to(dtype))


class Table:
    """A tensor in memory, or in registers."""

    def __init__(self, data):
        self.data, self.shape = data, data.shape

    def __getitem__(self, places):
        places = places if isinstance(places, tuple) else (places,)
        return Value(self.data[tuple(place.data if isinstance(place, Value) else place for place in places)])


class Register:
    """What a mask function returns its value in."""

    def __setitem__(self, place, value):
        self.value = value

    def __getitem__(self, place):
        return self.value

    def load(self):
        return self


@contextmanager
def installed():
    """The dialect under the package's name."""
    cutlass, cute = ModuleType("cutlass"), ModuleType("cutlass.cute")
    kinds = {f"Int{n}": getattr(torch, f"int{n}") for n in (8, 16, 32, 64)}
    kinds |= {f"Float{n}": getattr(torch, f"float{n}") for n in (16, 32, 64)}
    for name, dtype in {**kinds, "Uint8": torch.uint8, "BFloat16": torch.bfloat16, "Boolean": torch.bool}.items():
        setattr(cutlass, name, typed(dtype))
    cutlass.select_ = lambda c, x, y: x._two(y, lambda a, b: torch.where(c.data, a, b))
    cutlass.min = lambda x, y: x._two(y, torch.minimum)
    cutlass.max = lambda x, y: x._two(y, torch.maximum)
    cutlass.cute = cute
    cute.jit = lambda function: function
    cute.make_rmem_tensor = lambda size, kind: Register()
    before = {name: sys.modules.get(name) for name in ("cutlass", "cutlass.cute")}
    sys.modules |= {"cutlass": cutlass, "cutlass.cute": cute}
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def shown(form, shape):
    """(B, H, q_len, kv_len) bool: what a form's function says of every pair."""
    with installed():
        b, h, q, kv = (
            (Value(x.int()),) for x in torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
        )
        more = [form.aux_scalars()] if form.scalars else []
        found = form.function()(b, h, q, kv, None, [Table(table) for table in form.aux_tensors], *more)
        return found[0].data.expand(shape)
