"""A Python function of a pair's score -> a score function: traced like a mask, in the dtype that scores have.

score   b, h, q, kv        the scaled product of q and k, and the pair, offsets included
|                        float32, or float64 where q, k and v are
f(score, b, h, q, kv)      what the softmax is taken of, wherever the mask shows the pair
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, ClassVar, Final

import torch

from maskflash.errors import ArgumentTypeError
from maskflash.functions.function import Bound, Function
from maskflash.functions.sizes import Fits, Sizes
from maskflash.functions.slots import Slots
from maskflash.functions.written import Recorded, WrittenFunction
from maskflash.masks.mask import Mask
from maskflash.scores.lifting import remainder
from maskflash.trace.trace import Traced
from maskflash.trace.tracer import Role

TAKES: Final = ("score", "b", "h", "q", "kv")
ROLES: Final = {dtype: Role(TAKES, "a score function", dtype) for dtype in (torch.float32, torch.float64)}

ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any] | Callable[..., Any]
"""A score function, keywords or none. Type checkers take a lambda's parameters from the first form."""

ScoreLike = ScoreFunction | Sequence[ScoreFunction]
"""A score function, decorated or not, or several that are applied in turn."""


class RecordedScore(Recorded):
    """A score function that came out of a pickle without its function."""

    def at(self, dtype: torch.dtype) -> RecordedScore:
        """Itself: it was recorded in one dtype."""
        if dtype == torch.float64:
            raise ArgumentTypeError(
                f"{self.name}: it was pickled without its function, as float32 scores need it; define its function at "
                "the top level of a module, to use it with float64"
            )
        return self


class Parted(Function):
    """A function of a score, of which a call gets what is left without what of it is a mask: see `lifting`."""

    def plain(self, traced: Traced) -> Slots:
        """A trace as plain data, and what is left of it without what is a mask: see `lifting`."""
        return Slots.of(traced, remainder(traced))

    def bind(self, sizes: Sizes, given: dict[str, Any], stamp: int | None = None) -> Bound:
        """The function in a call, without what of it is a mask."""
        bound = super().bind(sizes, given, stamp)
        slots = bound.slots.rest
        if slots is None:
            return bound
        values = {**self.reading().slots, **self.defaults, **given, **self.implied(sizes)}
        return Bound(slots, *slots.filled(values, sizes.device))


class Score(Parted, WrittenFunction):
    """How strongly a query attends to a key that it sees: see `score`."""

    recorded: ClassVar[type[Recorded]] = RecordedScore

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        fits: Fits | None = None,
        *,
        parts: tuple[Score, ...] = (),
        dtype: torch.dtype = torch.float32,
        traced: bool = True,
    ) -> None:
        super().__init__(function, name, fits, role=ROLES[dtype], traced=False)
        self.parts: tuple[Score, ...] = parts  # what it applies in turn, if it is several
        self.implied_names: tuple[str, ...] = tuple(
            dict.fromkeys(name for part in parts for name in part.implied_names)
        )
        self.made: tuple[Callable[..., Score], tuple[Any, ...]] | None = None  # what makes a preset, and of what
        self.double: Score = self  # the same for float64 q, k and v
        if dtype == torch.float32:
            self.double = Score(function, name, fits, parts=parts, dtype=torch.float64, traced=False)
        if traced and not (self.keywords or self.implied_names):
            self.traced({})

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """What a call implies for any of the parts."""
        found = super().implied(sizes)
        for part in self.parts:
            found |= part.implied(sizes)
        return found

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Presets are made again; several that are applied in turn are pickled one by one where they have functions."""
        if self.made is not None:
            return self.made
        kinds = [part.__reduce__()[0] for part in self.parts]
        if self.parts and self.recorded not in kinds:
            return _chained, (self.parts,)
        return super().__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> WrittenFunction:
        if not self.parts:
            return super().__deepcopy__(memo)
        parts = copy.deepcopy(self.parts, memo)
        return self if parts is self.parts else _chained(parts)

    def __dir__(self) -> list[str]:
        """What users may use: what the package reads is not for them."""
        return ["at"]

    def at(self, dtype: torch.dtype) -> Score:
        """The function as calls with q, k and v of a dtype need it."""
        return self.double if dtype == torch.float64 else self


def score(function: ScoreLike) -> Score:
    """Make a score function of a plain function; also a decorator.

    Args:
        function: `f(score, b, h, q, kv, *, ...) -> float`, plain Python over a float and int64 indices; Python's and
            torch's functions, branches and look-ups as in masks, and also exp, log, tanh, sigmoid, pow and the like.
            Keyword-only parameters are run-time tensors or numbers. Several functions are applied in turn.

    Returns:
        What `compile` and `attention` take as `score=`; a score function is returned as it is. What floating-point
        tensors it looks up gets gradients.

    Raises:
        MaskTraceError: it does something that can't become an expression; the message says where.
        ArgumentError: it does not take (score, b, h, q, kv).

    Example:
        >>> import torch
        >>> import maskflash as mf
        >>> @score
        ... def capped(score, b, h, q, kv, *, cap):
        ...     return cap * torch.tanh(score / cap)
        >>> q, k, v = torch.randn(3, 1, 4, 512, 64).unbind()
        >>> mf.attention(q, k, v, mf.causal(), score=capped, cap=20.0).shape
        torch.Size([1, 4, 512, 64])
    """
    return as_score("score", function)


def as_score(operation: str, value: Any) -> Score:
    """What is given as a score function as one of ours."""
    if isinstance(value, (Score, RecordedScore)):
        return value  # type: ignore[return-value]
    if isinstance(value, (tuple, list)):
        parts = tuple(as_score(operation, part) for part in value)
        if not parts:
            raise ArgumentTypeError(f"{operation}: score is empty, expected a function or several; None is none")
        if torch.compiler.is_dynamo_compiling():
            return reduce(lambda first, then: first.pair(_then, then), parts)
        return parts[0] if len(parts) == 1 else _chained(parts)
    if isinstance(value, Mask) or not callable(value):
        fix = "; a mask is the first argument of compile, and the fourth of attention" * isinstance(value, Mask)
        raise ArgumentTypeError(
            f"{operation}: score is a {type(value).__name__}, expected a function f(score, b, h, q, kv){fix}"
        )
    if str(getattr(value, "__module__", "")) == "maskflash.scores.presets" and value.__qualname__.isidentifier():
        takes = [p.name for p in inspect.signature(value).parameters.values() if p.default is p.empty]
        raise ArgumentTypeError(
            f"{operation}: got {value.__name__}, which makes a score function; call it: "
            f"mf.scores.{value.__name__}({', '.join(takes)})"
        )
    return Score(value)


def _then(first: Score, then: Score) -> Score:
    return _chained((first, then))


def _chained(parts: tuple[Score, ...]) -> Score:
    """Score functions applied in turn, as one."""

    def chained(score: Any, b: Any, h: Any, q: Any, kv: Any, **given: Any) -> Any:
        for part in parts:
            names = part.keywords + part.implied_names
            score = part(score, b, h, q, kv, **{name: given[name] for name in names})
        return score

    keywords = {name: part.defaults.get(name, inspect.Parameter.empty) for part in parts for name in part.keywords}
    positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in TAKES]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=x) for name, x in keywords.items()]
    chained.__signature__ = inspect.Signature([*positional, *own])  # type: ignore[attr-defined]
    return Score(chained, ", ".join(part.name for part in parts), parts=parts)


def own_arguments(function: Function, given: dict[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments that a function takes."""
    return {name: given[name] for name in function.keywords if name in given}
