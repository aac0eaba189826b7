"""A predicate -> a mask: traced once, and again for arguments of other kinds."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from torch import Tensor

from maskflash.errors import ArgumentTypeError
from maskflash.expr.lower import python_code
from maskflash.expr.trace import Traced, keyword_arguments, trace
from maskflash.masks.base import Mask
from maskflash.masks.call import Call, Fits
from maskflash.masks.combination import Combination
from maskflash.masks.traces import Traces

_MAKERS: Final = ("maskflash.presets.", "maskflash.masks.columns")  # modules whose functions make masks

__all__ = ["Call", "Combination", "Fits", "Mask", "Predicate", "Recorded", "mask"]


class Predicate(Mask):
    """A mask given by a function; traced at once unless it has arguments, whose kinds only a call tells."""

    def __init__(self, function: Callable[..., Any], name: str | None = None, fits: Fits | None = None) -> None:
        keywords = keyword_arguments(function)
        parameters = inspect.signature(function).parameters
        defaults = {k: p.default for k in keywords if (p := parameters[k]).default is not p.empty}
        name = name or str(getattr(function, "__name__", type(function).__name__))
        super().__init__(name, keywords, defaults, fits=fits)
        functools.update_wrapper(self, function, updated=())
        self._place = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        self.function = function
        self._traces = Traces()
        if not keywords:
            self.traced({})

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The function itself."""
        return self.function(b, h, q, kv, **mask_args)

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """The function, run once on symbols."""
        return self._traces.get(mask_args, lambda: trace(self.function, mask_args))

    def known(self) -> Traced | None:
        """The latest; a mask without arguments has but one."""
        return self._traces.latest()

    def __reduce__(self) -> str | tuple[Any, ...]:
        """By reference where its module has it by name; otherwise what was recorded of the function."""
        found = self._importable()
        if found is self:
            return self._place[1]
        return (
            (Predicate, (self.function, self.name, self.fits))
            if found is self.function
            else (Recorded, self._recorded())
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        """Itself where its function is found by name or captures no tensors; else recorded, with copies of those."""
        captures = self._traces.captures() if self.known() else _captures(self.function)
        if self._importable() is not None or not captures:
            return self
        return Recorded(*copy.deepcopy(self._recorded(), memo))

    def _recorded(self) -> tuple[str, tuple[str, ...], dict[str, Any], Traces, Fits | None]:
        if self.known() is None:
            raise ArgumentTypeError(
                f"{self.name}: it can't be pickled, or copied with the tensors it captures, before a call has shown "
                f"the kinds of its arguments ({', '.join(self.keywords)}), since its function is a lambda or local. "
                "Define it with `def` at the top level of a module, or pass the tensors as arguments"
            )
        return self.name, self.keywords, self.defaults, self._traces, self.fits

    def _importable(self) -> object:
        """The mask or its function, whichever its module has by name; None where it has neither."""
        try:
            found = operator.attrgetter(self._place[1])(sys.modules[self._place[0]])
        except (AttributeError, KeyError):
            return None
        return found if found is self or found is self.function else None


class Recorded(Mask):
    """A mask that came out of a pickle without its function: it serves arguments of the kinds that were recorded."""

    def __init__(
        self,
        name: str,
        keywords: tuple[str, ...],
        defaults: dict[str, Any],
        traces: Traces,
        fits: Fits | None = None,
    ) -> None:
        super().__init__(name, keywords, defaults, fits=fits)
        self._traces = traces

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> NoReturn:
        """Nothing to call."""
        raise ArgumentTypeError(
            f"{self.name}: a predicate can't call it, since it was pickled without its function; combine the masks "
            "with & | ^ ~, or define its function at the top level of a module"
        )

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """What was recorded for arguments like these."""

        def unknown() -> NoReturn:
            kinds = ", ".join(f"{name} {_kind(value)}" for name, value in mask_args.items())
            raise ArgumentTypeError(
                f"{self.name}: got {kinds}, but it was pickled without its function, after calls with arguments of "
                "other kinds; pass those, or define its function at the top level of a module"
            )

        return self._traces.get(mask_args, unknown)

    def known(self) -> Traced | None:
        """The latest."""
        return self._traces.latest()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorded, (self.name, self.keywords, self.defaults, self._traces, self.fits)


def mask(function: Callable[..., Any] | Mask) -> Mask:
    """Make a mask of a predicate; also a decorator.

    Ints, floats and names that the predicate uses are read now (if it has keyword-only parameters, when it is first
    called with arguments of a new kind); tensors are kept by reference, so their contents may change.

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
    _refuse_maker(function)
    return Predicate(function)


def _refuse_maker(value: Any) -> None:
    """An error for what stands for a mask by mistake: the name of a preset, or a preset that wasn't called."""
    if isinstance(value, str):
        raise ArgumentTypeError(
            f"mask: got the text {value!r}, expected a predicate f(b, h, q, kv) or a mask; presets are functions, and "
            "called: mf.causal()"
        )
    if not inspect.isroutine(value) and not inspect.isclass(value):
        return
    if str(getattr(value, "__module__", "")).startswith(_MAKERS):
        takes = [p.name for p in inspect.signature(value).parameters.values() if p.default is p.empty]
        raise ArgumentTypeError(
            f"mask: got {value.__name__}, which makes a mask; call it: {value.__name__}({', '.join(takes)})"
        )


def _captures(function: Callable[..., Any]) -> bool:
    """Whether a function's closure holds tensors."""
    code = python_code(function)
    for cell in (code and code.__closure__) or ():
        with contextlib.suppress(ValueError):  # an empty one
            if isinstance(cell.cell_contents, Tensor):
                return True
    return False


def _kind(value: Any) -> str:
    return f"{value.dtype} of {value.ndim} dimensions" if isinstance(value, Tensor) else type(value).__name__
