"""A function whose value is a truth -> a mask: it joins others, and answers questions at any lengths (`sight`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.fingerprint import fingerprint
from maskflash.functions.function import Function
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.exports import Exports
from maskflash.masks.lines import Line
from maskflash.masks.sight import Sight
from maskflash.trace.sources import Argument

if TYPE_CHECKING:
    from maskflash.analysis.block_map import BlockMap
    from maskflash.masks.why import Why

MaskFunction = Callable[[Any, Any, Any, Any], Any] | Callable[..., Any]
"""A predicate `(b, h, q, kv)`, keywords or none. Type checkers take a lambda's parameters from the first form."""

Joinable = MaskFunction | Tensor
"""A mask, a predicate `(b, h, q, kv)`, or a tensor of bool."""

_INSIDE: Final = frozenset((*dir(Function), "at_call"))  # what the package reads of a mask
_OF_CALL: Final = ("batch", "heads", "q_offset", "kv_offset", "device")  # what `Mask.at` takes beside lengths


class Mask(Function, Exports):
    """Which query may see which key.

    Masks combine with one another, with predicates and with tensors of bool by `&`, `|`, `^` and `~`; keyword arguments
    of the same name are the same argument. A mask is itself a predicate `(b, h, q, kv)`, so another may call it.

    A mask is equal to itself alone: `equivalent` compares what masks show, `fingerprint` how they are written. It can
    be pickled and deep-copied: see docs/questions.md for what becomes of its function.
    """

    def __dir__(self) -> list[str]:
        """What users may use, whatever made the mask."""
        return [name for name in dir(Mask) if not name.startswith("_") and name not in _INSIDE]

    def at(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> Sight:
        """This mask at the lengths of a call: said once, for any number of questions.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            batch: batch rows.
            heads: query heads.
            q_offset: added to row numbers before the mask sees them; an int, or an int tensor (batch,).
            kv_offset: added to column numbers, likewise.
            device: where to evaluate, and where answers live; block maps and vectors are found on the CPU.
            **mask_args: the mask's own arguments.

        Returns:
            What has `dense()`, `block_map()`, `row(q)`, `column(kv)`, `why(q, kv)`, `to_flashmask()` and
            `to_block_mask()`. Each question may raise MaskIndexError: a look-up out of range, or a division by zero,
            that no guard excludes.

        Raises:
            ArgumentError: a size, an offset or a table that doesn't fit.
            ArgumentTypeError: an argument of a wrong type, or one that is missing.

        Example:
            >>> from maskflash import causal
            >>> sight = causal().at(2, 4, q_offset=2)
            >>> sight.dense()[0, 0].int()
            tensor([[1, 1, 1, 0],
                    [1, 1, 1, 1]], dtype=torch.int32)
            >>> sight.row(0), bool(sight.why(0, 3))
            ([(0, 3)], False)
        """
        sizes: dict[str, Any] = {"batch": batch, "heads": heads, "q_offset": q_offset, "kv_offset": kv_offset}
        return Sight.of(self, Sizes.checked("Mask.at", q_len, kv_len, **sizes, device=device), mask_args)

    def at_call(self, operation: str, q_len: int, kv_len: int, call: dict[str, Any]) -> Sight:
        """`at`, for an operation that messages call by another name; `call` has its arguments by name."""
        sizes, mask_args = _apart(call)
        return Sight.of(self, Sizes.checked(operation, q_len, kv_len, **sizes), mask_args)

    def _around(self, operation: str, index: dict[str, int], call: dict[str, Any]) -> Sight:
        """This mask at sizes that hold an index; see `Sizes.around`."""
        lengths = {name: call.pop(name, None) for name in ("batch", "heads", "q_len", "kv_len")}
        missing = [f"{name}=..." for name in self.sizes if lengths[name] is None]
        if missing:
            raise ArgumentError(
                f"{operation}: {self.name} depends on the sizes of a call; pass {', '.join(missing)} as well"
            )
        rest, mask_args = _apart(call)
        return Sight.of(self, Sizes.around(operation, index, lengths, **rest), mask_args)

    def dense(self, q_len: int, kv_len: int, **call: Any) -> Tensor:
        """Every pair of the mask: for people, and for whatever wants a dense mask.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Returns:
            (batch, heads, q_len, kv_len) bool, True where the pair is visible; may be an expanded view.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import mask
            >>> mask(lambda b, h, q, kv: q >= kv).dense(2, 3)[0, 0].int()
            tensor([[1, 0, 0],
                    [1, 1, 0]], dtype=torch.int32)
        """
        return self.at_call("Mask.dense", q_len, kv_len, call).dense()

    def block_map(self, q_len: int, kv_len: int, *, block_size: BlockSize = 128, **call: Any) -> BlockMap:
        """Which tiles are full, partial and skip: exactly what evaluating every pair would find.

        The map has one batch row where the mask does not look at b, and q_offset is one for all; likewise with heads.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            block_size: tokens per tile, one number or (q_tokens, kv_tokens).
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import mask
            >>> mask(lambda b, h, q, kv: q >= kv).block_map(512, 512).counts
            {'full': 6, 'partial': 4, 'skip': 6}
        """
        return self.at_call("Mask.block_map", q_len, kv_len, call).block_map(block_size)

    def row(self, q: int, kv_len: int, *, b: int = 0, h: int = 0, **call: Any) -> Line:
        """The keys that a query sees, as runs: the cost is that of one row, in parts of bounded size.

        Args:
            q: the row, from 0; the mask sees q + q_offset.
            kv_len: columns in tokens.
            b: batch row.
            h: query head.
            **call: q_len, batch and heads, needed only by masks that depend on them, such as `ColumnIntervals` with
                causal; q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Returns:
            (start, stop) of each run of visible keys, half open, ascending.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal, global_tokens, sliding_window
            >>> (causal() & (global_tokens(4) | sliding_window(100))).row(1000, 4096)
            [(0, 4), (900, 1001)]
        """
        sight = self._around("Mask.row", {"b": b, "h": h, "q": q}, {**call, "kv_len": kv_len})
        return sight.row(q, b=b, h=h)

    def column(self, kv: int, q_len: int, *, b: int = 0, h: int = 0, **call: Any) -> Line:
        """The queries that see a key, as runs (start, stop) of rows: see `row`.

        Example:
            >>> from maskflash import sliding_window
            >>> sliding_window(100).column(1000, 4096)
            [(1000, 1101)]
        """
        sight = self._around("Mask.column", {"b": b, "h": h, "kv": kv}, {**call, "q_len": q_len})
        return sight.column(kv, b=b, h=h)

    def why(self, q: int, kv: int, *, b: int = 0, h: int = 0, **call: Any) -> Why:
        """Why a query sees a key, or doesn't: the conditions that decide it, with their values and source lines.

        Args:
            q: the row, from 0; the mask sees q + q_offset.
            kv: the column.
            b: batch row.
            h: query head.
            **call: as in `row`; kv_len too is needed only by masks that depend on it.

        Returns:
            The answer: true where the query sees the key. str() for people, `reasons` for tools.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal, document
            >>> print((causal() & document([300, 724])).why(310, 290))
            causal() & document(2 documents): query 310 does not see key 290
              document(2 documents):
                doc[q] == doc[kv]: 1 != 0
        """
        return self._around("Mask.why", {"b": b, "h": h, "q": q, "kv": kv}, call).why(q, kv, b=b, h=h)

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

    def __and__(self, other: Joinable) -> Mask:
        return self._joined("bitand", other)

    def __or__(self, other: Joinable) -> Mask:
        return self._joined("bitor", other)

    def __xor__(self, other: Joinable) -> Mask:
        return self._joined("bitxor", other)

    def __rand__(self, other: Joinable) -> Mask:
        return self._joined("bitand", other, last=True)

    def __ror__(self, other: Joinable) -> Mask:
        return self._joined("bitor", other, last=True)

    def __rxor__(self, other: Joinable) -> Mask:
        return self._joined("bitxor", other, last=True)

    def __invert__(self) -> Mask:
        from maskflash.masks.combination import negated

        return self.twin(negated)

    def _joined(self, op: str, other: Joinable, *, last: bool = False) -> Mask:
        """This mask and another, or a predicate, joined by a connective."""
        from maskflash.masks.combination import SYMBOLS, joined
        from maskflash.masks.dense import dense_mask
        from maskflash.masks.predicate import mask

        if isinstance(other, Tensor):
            whole: Mask = dense_mask(f"{self.name} {SYMBOLS[op]} tensor", other)
        elif callable(other) or isinstance(other, str):  # masks are callable too
            whole = mask(other)
        else:
            return NotImplemented
        first, second = (whole, self) if last else (self, whole)
        return first.pair(joined, second, op)

    def __bool__(self) -> bool:
        raise ArgumentTypeError(
            f"{self.name}: a mask has no truth value; combine masks with & | ^ ~ instead of and, or, not"
        )

    def _repr_html_(self) -> str:
        from maskflash.visualize import notebook

        return notebook.of_mask(self)


def _apart(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call says of sizes, and the mask's own arguments."""
    sizes: dict[str, Any] = {name: call[name] for name in _OF_CALL if name in call}
    return sizes, {name: value for name, value in call.items() if name not in sizes}
