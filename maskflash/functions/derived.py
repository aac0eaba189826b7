"""A function -> another, of what it says: traced by what becomes of its trace, and it captures what that captures."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from maskflash.errors import ArgumentTypeError
from maskflash.functions.function import Function
from maskflash.functions.sizes import Sizes
from maskflash.functions.traces import Reading
from maskflash.trace.trace import Traced


class Derived(Function):
    """A function that is known by another one's trace.

    Attributes:
        of: the other one.
    """

    def __init__(self, name: str, of: Function, keywords: tuple[str, ...] = ()) -> None:
        super().__init__(name, (*of.keywords, *keywords), of.defaults, of.implied_names)
        self.of = of

    def __call__(self, *indices: Any, **mask_args: Any) -> NoReturn:
        """Nothing to call: it is known by a trace."""
        raise ArgumentTypeError(
            f"{self.name}: a function can't call it; combine masks with & | ^ ~, or give the score function to compile"
        )

    def trace_of(self, mask_args: dict[str, Any]) -> Traced:
        """The other one's trace, for its own among the arguments."""
        names = (*self.of.keywords, *self.of.implied_names)
        return self.of.slots({name: mask_args[name] for name in names if name in mask_args})[0].traced

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """See `Function.implied`."""
        return self.of.implied(sizes)

    @property
    def followed(self) -> bool:
        """See `Function.followed`."""
        return self.of.followed

    def look(self) -> int:
        """See `Function.look`."""
        return self.of.look()

    def reading(self) -> Reading:
        """See `Function.reading`."""
        return self.of.reading()

    def read(self) -> dict[str, Any]:
        """See `Function.read`."""
        return self.of.read()

    def held(self) -> tuple[Tensor, ...]:
        """See `Function.held`."""
        return self.of.held()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.of,)
