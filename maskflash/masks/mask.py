"""A predicate, or masks joined by & | ^ ~, -> an object that can be traced, drawn densely and mapped to tiles."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash import arguments
from maskflash.arguments import BlockSize
from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.classify import classify
from maskflash.blocks.problem import TILE, Problem
from maskflash.errors import ArgumentTypeError
from maskflash.expr.combine import combine
from maskflash.expr.evaluate import Inputs
from maskflash.expr.trace import Traced, keyword_arguments, trace
from maskflash.expr.tracer import Argument
from maskflash.masks import slots, tables

if TYPE_CHECKING:
    from maskflash.masks.columns import ColumnIntervals

_PAIRS_AT_ONCE: Final = 1 << 22  # of a dense mask: bounds what its evaluation holds beside the result


class Call(NamedTuple):
    """What a mask may know of the call it serves, already checked.

    Attributes:
        operation: what messages call it.
        q_len: rows in tokens.
        kv_len: columns in tokens.
        batch: batch rows.
        heads: query heads.
        q_offset: added to row numbers, an int or an integer tensor (batch,).
        device: where it runs.
    """

    operation: str
    q_len: int
    kv_len: int
    batch: int
    heads: int
    q_offset: int | Tensor
    device: torch.device


class Mask:
    """Which query may see which key.

    Masks combine with `&`, `|`, `^` and `~`; keyword arguments of the same name are the same argument. A mask is
    itself a predicate `(b, h, q, kv)`, so another predicate may call it.

    Attributes:
        name: what messages call it.
        keywords: names of the arguments it takes at run time.
        defaults: values of those that may be left out.
        implied_names: arguments that follow from a call, by names that nobody can pass.
        known: its traces so far, as the op takes them.
    """

    def __init__(
        self, name: str, keywords: tuple[str, ...], defaults: dict[str, Any], implied_names: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.keywords = keywords
        self.defaults = defaults
        self.implied_names = implied_names
        self.known = slots.Known()

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """Whether the pair is visible, for numbers, tensors or the symbols of a trace."""
        raise NotImplementedError

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """The mask's expression for arguments like these (see `arguments.mask_args`); cached by their kinds."""
        raise NotImplementedError

    @slots.aside
    def specialised(self, kinds: tuple[slots.Kind, ...]) -> tuple[str, ...]:
        """The arguments whose values (or shapes) traces for these kinds are known to depend on."""
        return slots.specialised(self, kinds)

    @slots.aside
    def slots_name(self, kinds: tuple[slots.Kind, ...], exact: slots.Exact) -> str | None:
        """Where `known` has the slots for these kinds and values; None if a trace depends on further values."""
        return slots.slots_name(self, kinds, exact)

    def implied(self, call: Call) -> dict[str, int]:
        """The values of `implied_names` in a call.

        Raises:
            ArgumentError: the mask has sizes of its own, and the call doesn't fit them.
        """
        return {}

    def bound(self, call: Call, given: dict[str, Any]) -> tuple[Traced, Inputs]:
        """The expression, and its slots from a call's keyword arguments; captured tables on the call's device."""
        values = arguments.mask_args(call.operation, given, self.keywords, self.defaults) | self.implied(call)
        traced = self.traced(values)
        inputs = traced.bind(values)
        held = zip(traced.tables, inputs.tables, strict=True)
        return traced, Inputs(
            inputs.params,
            tuple(table if isinstance(slot, Argument) else tables.on(table, call.device) for slot, table in held),
        )

    def dense(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        q_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> Tensor:
        """Every pair of the mask: for people, and for whatever wants a dense mask.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            batch: batch rows.
            heads: query heads.
            q_offset: added to row numbers; an int, or an int tensor (batch,).
            device: where to evaluate.
            **mask_args: the mask's own arguments.

        Returns:
            (batch, heads, q_len, kv_len) bool, True where the pair is visible; may be an expanded view.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> mask(lambda b, h, q, kv: q >= kv).dense(2, 3)[0, 0].int()
            tensor([[1, 0, 0],
                    [1, 1, 0]], dtype=torch.int32)
        """
        problem = self.problem(
            "Mask.dense", q_len, kv_len, batch, heads, (1, 1), q_offset, torch.device(device), mask_args
        )
        rows, columns = problem.shape[:2]
        seen = torch.zeros(rows, columns, q_len, kv_len, dtype=torch.bool, device=device)
        b, h, q, kv = (
            torch.arange(n, device=device).view([-1 if axis == place else 1 for axis in range(4)])
            for place, n in enumerate(seen.shape)
        )
        if seen.numel():
            step = max(1, _PAIRS_AT_ONCE // (rows * columns * kv_len))
            for start in range(0, q_len, step):
                seen[:, :, start : start + step] = problem.visible(b, h, q[:, :, start : start + step], kv)
        return seen.expand(batch, heads, q_len, kv_len)

    def block_map(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: BlockSize = 128,
        q_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> BlockMap:
        """Which tiles are full, partial and skip: exactly what evaluating every pair would find.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            batch: batch rows; the map has one where the mask does not look at b.
            heads: query heads; likewise with h.
            block_size: tokens per tile, one number or (q_tokens, kv_tokens).
            q_offset: added to row numbers; an int, or an int tensor (batch,), which gives the map its batch rows.
            device: where to analyse, and where the map lives.
            **mask_args: the mask's own arguments.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> mask(lambda b, h, q, kv: q >= kv).block_map(512, 512).counts
            {'full': 6, 'partial': 4, 'skip': 6}
        """
        size = arguments.block_size("Mask.block_map", block_size)
        problem = self.problem(
            "Mask.block_map", q_len, kv_len, batch, heads, size, q_offset, torch.device(device), mask_args
        )
        return classify(problem).block_map

    def to_flashmask(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        causal: bool | None = None,
        q_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> ColumnIntervals:
        """FlashMask's vectors for this mask: found from its boundary, never from all pairs.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            batch: batch rows; the vectors have one where the mask does not look at b.
            heads: query heads; likewise with h.
            causal: whether the vectors come with causal=True (aligned to the bottom right); None where the mask hides
                all that causal hides.
            q_offset: added to row numbers; the vectors are for the rows of the query tensor itself.
            device: where to analyse, and where the vectors live.
            **mask_args: the mask's own arguments.

        Returns:
            The same mask as column intervals; its `startend_row_indices` is what FlashMask takes.

        Raises:
            UnsupportedMask: a column hides more than two runs of rows (three with causal); the first such column.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> mask(lambda b, h, q, kv: kv <= q < kv + 2).to_flashmask(4, 4).startend_row_indices[0, 0, :, 0]
            tensor([2, 3, 4, 4], dtype=torch.int32)
        """
        from maskflash.masks.convert import to_columns

        return to_columns(
            self.problem(
                "Mask.to_flashmask", q_len, kv_len, batch, heads, TILE, q_offset, torch.device(device), mask_args
            ),
            causal,
        )

    def problem(
        self,
        operation: str,
        q_len: int,
        kv_len: int,
        batch: int,
        heads: int,
        block_size: tuple[int, int],
        q_offset: int | Tensor,
        device: torch.device,
        mask_args: dict[str, Any],
    ) -> Problem:
        """This mask at these lengths, ready to be classified; checks what the caller passed."""
        lengths = {"q_len": q_len, "kv_len": kv_len}
        q_len, kv_len = (arguments.integer(operation, name, value) for name, value in lengths.items())
        batch, heads = (
            arguments.integer(operation, name, value) for name, value in {"batch": batch, "heads": heads}.items()
        )
        offset = arguments.q_offset(operation, q_offset, batch)
        call = Call(operation, q_len, kv_len, batch, heads, offset, device)
        traced, inputs = self.bound(call, mask_args)
        return Problem(
            traced.expr,
            Inputs(inputs.params, tuple(table.to(device) for table in inputs.tables)),
            q_len,
            kv_len,
            batch,
            heads,
            block_size,
            offset.to(device) if isinstance(offset, Tensor) else offset,
            device,
            traced.names,
        )

    def __and__(self, other: Mask) -> Mask:
        return Combination("bitand", self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Combination("bitor", self, other) if isinstance(other, Mask) else NotImplemented

    def __xor__(self, other: Mask) -> Mask:
        return Combination("bitxor", self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Combination("not", self)

    def __bool__(self) -> bool:
        raise ArgumentTypeError(
            f"{self.name}: a mask has no truth value; combine masks with & | ^ ~ instead of and, or, not"
        )

    def __repr__(self) -> str:
        return self.name


class Predicate(Mask):
    """A mask given by a function; traced at once unless it has arguments, whose kinds only a call tells."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        keywords = keyword_arguments(function)
        parameters = inspect.signature(function).parameters
        defaults = {k: p.default for k in keywords if (p := parameters[k]).default is not p.empty}
        name = name or str(getattr(function, "__name__", type(function).__name__))
        super().__init__(name, keywords, defaults)
        functools.update_wrapper(self, function, updated=())
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


_SYMBOLS = {"bitand": "&", "bitor": "|", "bitxor": "^"}


class Combination(Mask):
    """Masks joined by a connective; both sides are always reached, as under Python's `&`."""

    def __init__(self, op: str, *parts: Mask) -> None:
        self.op = op
        self.parts = parts
        self._traces = Traces()
        names = [f"({part})" if isinstance(part, Combination) and part.op != "not" else f"{part}" for part in parts]
        keywords = tuple(dict.fromkeys(name for part in parts for name in part.keywords))
        defaults: dict[str, Any] = {}
        for part in parts:
            for name, value in part.defaults.items():
                if all(name not in other.keywords or name in other.defaults for other in parts):
                    defaults.setdefault(name, value)
        name = f"~{names[0]}" if op == "not" else f" {_SYMBOLS[op]} ".join(names)
        implied = tuple(dict.fromkeys(name for part in parts for name in part.implied_names))
        super().__init__(name, keywords, defaults, implied)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """The parts' answers, joined."""
        x, *others = (part(b, h, q, kv, **_own(part, mask_args)) for part in self.parts)
        match self.op:
            case "not":
                return x ^ True
            case "bitand":
                return x & others[0]
            case "bitor":
                return x | others[0]
        return x ^ others[0]

    def implied(self, call: Call) -> dict[str, int]:
        """What any part's call implies."""
        return {name: value for part in self.parts for name, value in part.implied(call).items()}

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """The parts' expressions, joined."""
        return self._traces.get(
            mask_args,
            lambda: combine(self.op, tuple(part.traced(_own(part, mask_args)) for part in self.parts)),
        )


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
        >>> @mask
        ... def packed(b, h, q, kv, *, doc):
        ...     return q >= kv and doc[b, q] == doc[b, kv]
        >>> packed.dense(3, 3, doc=torch.tensor([[0, 0, 1]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    return function if isinstance(function, Mask) else Predicate(function)


class Traces:
    """Traces of one mask by the kinds of its arguments, and by the value of those a trace depends on."""

    def __init__(self) -> None:
        self._traces: dict[object, Traced] = {}
        self._specialised: dict[object, frozenset[str]] = {}

    def get(self, mask_args: dict[str, Any], make: Callable[[], Traced]) -> Traced:
        """The trace for arguments like these, made now or found."""
        kinds = tuple(map(_kind, mask_args.values()))
        traced = self._traces.get(self._key(kinds, mask_args))
        if traced is None:
            traced = make()
            self._specialised[kinds] = self._specialised.get(kinds, frozenset()) | traced.specialised
            self._traces[self._key(kinds, mask_args)] = traced
        return traced

    def _key(self, kinds: object, mask_args: dict[str, Any]) -> object:
        names = self._specialised.get(kinds, frozenset())
        return kinds, tuple(_value(value) for name, value in mask_args.items() if name in names)


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    return type(value) if isinstance(value, int) and not isinstance(value, bool) else (type(value), value)


def _value(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _own(part: Mask, mask_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that one of the joined masks takes."""
    return {name: mask_args[name] for name in (*part.keywords, *part.implied_names) if name in mask_args}
