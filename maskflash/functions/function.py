"""What a call passes -> a mask's expression with its slots filled: what every kind of mask has to say of itself."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import Any, ClassVar, Final, NamedTuple, NoReturn

import torch
from torch import Tensor

from maskflash.analysis.problem import TILE, Problem
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.expr.evaluate import Inputs
from maskflash.expr.format import format_expr
from maskflash.functions import slots
from maskflash.functions.fingerprint import fingerprint
from maskflash.ground import arguments, copies, html, transfer
from maskflash.trace.trace import Traced
from maskflash.trace.tracer import Argument

_numbers = count()
_SIZES: Final = {"b": "batch", "h": "heads", "q": "q_len", "kv": "kv_len"}  # of a call, by what they bound


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
        partial: whether sizes that nobody gave reach just so far as the index that was asked about.
    """

    operation: str
    q_len: int
    kv_len: int
    batch: int
    heads: int
    q_offset: int | Tensor
    device: torch.device
    partial: bool = False


class Fits(NamedTuple):
    """What a mask's tables are made for; None where any will do.

    Attributes:
        batch: batch rows.
        heads: query heads.
        q_total: tokens of the queries' documents.
        kv_total: tokens of the keys' documents.
    """

    batch: int | None = None
    heads: int | None = None
    q_total: int | None = None
    kv_total: int | None = None

    def check(self, name: str, call: Call) -> None:
        """Refuse a call that the tables weren't made for.

        Documents may end before the sequence does. They may go on after it only where an offset says that the call is a
        part of something longer.
        """
        for what, held, size in (("batch", self.batch, call.batch), ("heads", self.heads, call.heads)):
            if held is not None and (held < size if call.partial else held != size):
                raise ArgumentError(
                    f"{call.operation}: {what} is {size}, expected {held} as in the tables of {name}; one that is to "
                    "serve all has size 1 there"
                )
        if self.q_total is None or call.partial or isinstance(call.q_offset, Tensor) or call.q_offset != 0:
            return
        if self.kv_total is None:
            if self.q_total > call.q_len and self.q_total > call.kv_len:
                _refuse_total(name, call, "", self.q_total, f"{call.q_len} queries and {call.kv_len} keys")
        elif self.q_total > call.q_len:
            _refuse_total(name, call, " of the queries", self.q_total, f"{call.q_len} queries")
        elif self.kv_total > call.kv_len:
            _refuse_total(name, call, " of the keys", self.kv_total, f"{call.kv_len} keys")


def _refuse_total(name: str, call: Call, whose: str, total: int, there: str) -> NoReturn:
    raise ArgumentError(
        f"{call.operation}: the documents{whose} of {name} add up to {total} tokens, expected at most what the call "
        f"has, {there}; check the lengths: where tokens' ids or starts are meant, pass them by these names. "
        "If the rest is still to come, give k and v room for it"
    )


class Bindable:
    """What a mask has to say of itself.

    Attributes:
        name: what messages call it.
        keywords: names of the arguments it takes at run time.
        defaults: values of those that may be left out.
        implied_names: arguments that follow from a call, by names that nobody can pass.
        sizes: which of a call's "q_len", "kv_len", "batch" and "heads" it depends on, rather than just its pairs.
        fits: what its tables are made for.
        forms: its traces so far, as the op takes them.
        number: another for each mask of this process.
        reachable: attributes that its `__call__` reads, which a predicate that calls it captures with it.
    """

    reachable: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        name: str,
        keywords: tuple[str, ...],
        defaults: dict[str, Any],
        implied_names: tuple[str, ...] = (),
        sizes: tuple[str, ...] = (),
        fits: Fits | None = None,
    ) -> None:
        self.name = name
        self.keywords = keywords
        self.defaults = defaults
        self.implied_names = implied_names
        self.sizes = sizes
        self.fits = fits
        self.forms = slots.Known()
        self.number = next(_numbers)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """Whether the pair is visible, for numbers, tensors or the symbols of a trace."""
        raise NotImplementedError

    def template(self, mask_args: dict[str, Any]) -> Traced:
        """The mask's expression for arguments like these (see `arguments.mask_args`); cached by their kinds.

        What it captures comes into its slots by name, as arguments do: see `captured`.
        """
        raise NotImplementedError

    def traced(self, mask_args: dict[str, Any]) -> Traced:
        """The same with what is captured now in its slots."""
        template = self.template(mask_args)
        return template.filled(self.captured())

    def look(self) -> int:
        """Read again what the mask captures; another number if something else is there now."""
        return 0

    def captured(self) -> dict[str, Any]:
        """Numbers and tensors that fill captured slots, as `look` found them."""
        return {}

    def read(self) -> dict[str, Any]:
        """The same, read now and in dynamo's sight: it makes them inputs, or guards, of what it compiles."""
        return {}

    def structure(self) -> Hashable:
        """What traces depend on of all else that is captured."""
        return ()

    @property
    def followed(self) -> bool:
        """Whether `look` sees all that is captured; else the mask is traced at each call."""
        return True

    def held(self) -> tuple[Tensor, ...]:
        """Tensors that the mask looks up, besides its arguments."""
        return tuple(value for value in self.captured().values() if isinstance(value, Tensor))

    @slots.aside
    def structure_name(self) -> int:
        """A number that stands for `shape`."""
        return slots.structure_name(self)

    @slots.aside
    def specialised(self, kinds: tuple[slots.Kind, ...]) -> tuple[str, ...]:
        """The arguments whose values (or shapes) traces for these kinds are known to depend on."""
        return slots.specialised(self, kinds)

    @slots.aside
    def slots_name(self, kinds: tuple[slots.Kind, ...], exact: slots.Exact) -> str | None:
        """Where `forms` has the slots for these kinds and values; None if a trace depends on further values."""
        return slots.slots_name(self, kinds, exact)

    def implied(self, call: Call) -> dict[str, int]:
        """The values of `implied_names` in a call.

        Raises:
            ArgumentError: the mask has sizes of its own, and the call doesn't fit them.
        """
        if self.fits is not None:
            self.fits.check(self.name, call)
        return {}

    def bound(self, call: Call, given: dict[str, Any]) -> tuple[Traced, Inputs]:
        """The expression, and its slots from a call's keyword arguments; captured tables on the call's device."""
        values = arguments.mask_args(call.operation, given, self.keywords, self.defaults) | self.implied(call)
        traced = self.traced(values)
        inputs = traced.bind(values)
        held = zip(traced.tables, inputs.tables, strict=True)
        return traced, Inputs(
            inputs.params,
            tuple(table if isinstance(slot, Argument) else copies.on(table, call.device) for slot, table in held),
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
        device: torch.device | str,
        mask_args: dict[str, Any],
        partial: bool = False,
    ) -> Problem:
        """This mask at these lengths, ready to be classified; checks what the caller passed."""
        sizes = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads}
        q_len, kv_len, batch, heads = (arguments.length(operation, name, value) for name, value in sizes.items())
        offset = arguments.q_offset(operation, q_offset, batch)
        if isinstance(offset, Tensor):
            arguments.offsets_in_range(operation, offset)
        on = transfer.numbered(arguments.device(operation, device))
        call = Call(operation, q_len, kv_len, batch, heads, offset, on, partial)
        traced, inputs = self.bound(call, mask_args)
        return Problem(
            expr=traced.expr,
            inputs=Inputs(inputs.params, tuple(table.to(on) for table in inputs.tables)),
            q_len=q_len,
            kv_len=kv_len,
            batch=batch,
            heads=heads,
            block_size=block_size,
            q_offset=offset.to(on) if isinstance(offset, Tensor) else offset,
            device=on,
            names=traced.names,
        )

    def problem_at(
        self,
        operation: str,
        index: dict[str, int],
        sizes: dict[str, int | None],
        q_offset: int | Tensor,
        device: torch.device | str,
        mask_args: dict[str, Any],
    ) -> Problem:
        """This mask at sizes that hold an index; those that nobody gave reach just so far.

        Args:
            operation: what messages call it.
            index: of some of b, h, q, kv.
            sizes: batch, heads, q_len, kv_len.
            q_offset: added to row numbers.
            device: where to look at it.
            mask_args: the mask's own arguments.
        """
        missing = [f"{name}=..." for name in self.sizes if sizes[name] is None]
        if missing:
            raise ArgumentError(
                f"{operation}: {self.name} depends on the sizes of a call; pass {', '.join(missing)} as well"
            )
        if isinstance(q_offset, Tensor) and sizes["batch"] is None and q_offset.numel() > 1:
            sizes = {**sizes, "batch": q_offset.numel()}
        found = {}
        for name, size in _SIZES.items():
            at = arguments.integer(operation, name, index[name]) if name in index else 0
            length = sizes[size]
            found[size] = at + 1 if length is None else arguments.length(operation, size, length)
            if name in index and at >= found[size]:
                raise ArgumentError(f"{operation}: {name} is {at}, expected less than {size}, {found[size]}")
        return self.problem(
            operation,
            found["q_len"],
            found["kv_len"],
            found["batch"],
            found["heads"],
            TILE,
            q_offset,
            device,
            mask_args,
            partial=None in sizes.values(),
        )

    def fingerprint(self, **mask_args: Any) -> str:
        """A hash of what the mask is: the same in every process, and for every mask of the same structure.

        It covers the expression, its numbers and its tables' contents, but neither names nor lengths. Masks may be
        `equivalent` and yet differ in it; those that share it are the same.

        Args:
            **mask_args: the mask's own arguments; they are hashed by value.

        Example:
            >>> from maskflash import causal, mask, sliding_window
            >>> causal().fingerprint() == mask(lambda b, h, q, kv: q >= kv).fingerprint()
            True
            >>> sliding_window(100).fingerprint() == sliding_window(101).fingerprint()
            False
        """
        given = arguments.mask_args("Mask.fingerprint", mask_args, self.keywords, self.defaults)
        values = given | dict.fromkeys(self.implied_names, 1)
        traced = self.traced(values)
        implied = [isinstance(value, Argument) and value in self.implied_names for value in traced.params]
        bound = traced.bind(values)
        coded = traced.expr.coded(bound.params)
        params = tuple(name if by_call else x for name, x, by_call in zip(traced.params, coded, implied, strict=True))
        return fingerprint(traced.expr, params, bound.tables)

    def known(self) -> Traced | None:
        """An expression of the mask: the only one, or the latest; None for a mask whose arguments nobody gave yet."""
        return None if self.keywords else self.traced(dict.fromkeys(self.implied_names, 1))

    def _repr_html_(self) -> str:
        traced = self.known()
        names = [f"{name}={self.defaults[name]!r}" if name in self.defaults else name for name in self.keywords]
        rows = {
            "visible": format_expr(traced.expr, traced.params, traced.names) if traced else "",
            "arguments": ", ".join(names),
        }
        return html.facts(self.name, {label: text for label, text in rows.items() if text})

    def __bool__(self) -> bool:
        raise ArgumentTypeError(
            f"{self.name}: a mask has no truth value; combine masks with & | ^ ~ instead of and, or, not"
        )

    def __repr__(self) -> str:
        return self.name
