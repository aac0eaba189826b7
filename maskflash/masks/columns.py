"""FlashMask's column vectors -> a mask: for every key, the rows that do not see it, as at most two intervals.

    hidden(i, j)  =  lts[j] <= i < lte[j]   or   uts[j] <= i < ute[j]   or, with causal, i < j - (kv_len - q_len)

i is a row of the query tensor, j a column. A missing lte means to the end, a missing uts from the start.
Source: Wang et al., FlashMask: Efficient and Rich Mask Extension of FlashAttention, 2024 (arXiv 2410.01359).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments, modes
from maskflash.masks.mask import Mask
from maskflash.trace.trace import Traced, trace

_SHIFT: Final = "kv_len - q_len"  # of an argument that the call implies: no identifier, so nobody can pass it
_VECTORS: Final = ("lts", "lte", "uts", "ute")
_LAYOUTS: Final[dict[tuple[bool, int], tuple[str, ...]]] = {
    (True, 1): ("lts",),
    (True, 2): ("lts", "lte"),
    (True, 4): _VECTORS,
    (False, 2): ("lts", "ute"),
    (False, 4): _VECTORS,
}


class ColumnIntervals(Mask):
    """FlashMask's vectors as a mask: it combines with & | ^ ~, is pickled, and can be moved with `to`.

        visible = not (lts <= q < lte or uts <= q < ute) and (q >= kv - (kv_len - q_len) if causal)

        ■ · · · · ·    lts=[3, 3, 3, 6, 6, 6], causal: two documents of three tokens
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        · · · ■ · ·
        · · · ■ ■ ·
        · · · ■ ■ ■

    Rows are the query tensor's own, so it takes no q_offset. Intervals are sets of rows: ends beyond the rows are
    clipped, an empty one (start >= end) hides nothing, and two may overlap.

    Attributes:
        lts: (kv_len,), (B, kv_len) or (B, Hm, kv_len) int32, first row of the lower interval. B or Hm of 1 serves all;
            otherwise Hm divides the query heads, and query head h reads mask head h // (heads / Hm).
        lte: likewise, one past its last row; None for the last row of all.
        uts: likewise, first row of the upper interval; None for the first row of all.
        ute: likewise, one past its last row; None where there is no upper interval.
        causal: also hide, aligned to the bottom right, what lies after each row.

    Raises:
        ArgumentTypeError: something that holds no integers.
        ArgumentError: shapes or devices that differ, a number beyond 32 bits, uts without ute.

    Example:
        >>> ColumnIntervals(torch.tensor([2, 2, 4, 4]), causal=True).dense(4, 4)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        lts: Tensor,
        lte: Tensor | None = None,
        uts: Tensor | None = None,
        ute: Tensor | None = None,
        causal: bool = False,
    ) -> None:
        causal = arguments.flag("ColumnIntervals", "causal", causal)
        given = {name: x for name, x in zip(_VECTORS, (lts, lte, uts, ute), strict=True) if x is not None}
        if "lts" not in given:
            raise ArgumentError("ColumnIntervals: lts is None; where nothing is hidden below, pass the number of rows")
        if uts is not None and ute is None:
            raise ArgumentError("ColumnIntervals: got uts without ute; pass where the upper interval ends")
        plain = modes.off if any(not isinstance(x, Tensor) for x in given.values()) else nullcontext  # of lists
        with plain():
            vectors = {name: _checked(name, x) for name, x in given.items()}
        first = vectors["lts"]
        for name, x in vectors.items():
            if x.shape != first.shape:
                raise ArgumentError(
                    f"ColumnIntervals: {name} has shape {_shape(given[name])}, expected that of lts, {_shape(lts)}"
                )
            if x.device != first.device:
                raise ArgumentError(f"ColumnIntervals: {name} is on {x.device}, expected {first.device} as lts is")
        heads = first.shape[1]
        implied = (*((_SHIFT,) if causal else ()), *((_group(heads),) if heads > 1 else ()))
        several = {"batch": len(first) > 1, "heads": heads > 1, "q_len": causal, "kv_len": True}
        sizes = tuple(size for size, matters in several.items() if matters)
        super().__init__(f"ColumnIntervals({', '.join(vectors)}{', causal' if causal else ''})", (), {}, implied, sizes)
        self.lts: Tensor = first
        self.lte: Tensor | None = vectors.get("lte")
        self.uts: Tensor | None = vectors.get("uts")
        self.ute: Tensor | None = vectors.get("ute")
        self.causal = causal
        self._form = _Form(tuple(vectors), self.causal, len(first) > 1, heads)
        with plain():
            self._tables = {name: self._form.squeezed(x) for name, x in vectors.items()}

    def __dir__(self) -> list[str]:
        """What users may use."""
        own = (*_VECTORS, "causal", "from_flashmask", "startend_row_indices", "vectors", "to")
        return sorted((*super().__dir__(), *own))

    @staticmethod
    def from_flashmask(startend_row_indices: Tensor, causal: bool) -> ColumnIntervals:
        """The mask of what `flashmask_attention` takes; the vectors stay views of it.

        Args:
            startend_row_indices: (B, Hm, kv_len, n) int32, the vectors side by side:
                causal: 1 (LTS), 2 (LTS, LTE) or 4 (LTS, LTE, UTS, UTE); else 2 (LTS, UTE) or 4.
            causal: whether what lies after a row is hidden besides.

        Raises:
            ArgumentTypeError: it holds no integers.
            ArgumentError: its shape, or n with this `causal`, means nothing.
        """
        name = "startend_row_indices"
        causal = arguments.flag("from_flashmask", "causal", causal)
        table = arguments.int_table("from_flashmask", name, startend_row_indices, (4,))
        n = table.shape[3]
        if (causal, n) not in _LAYOUTS:
            known = "; ".join(f"{len(v)} for {', '.join(v).upper()}" for (c, _), v in _LAYOUTS.items() if c == causal)
            raise ArgumentError(
                f"from_flashmask: {name} has {n} vectors in its last dimension with causal={causal}, expected {known}"
            )
        return ColumnIntervals(**dict(zip(_LAYOUTS[causal, n], table.unbind(3), strict=True)), causal=causal)

    @property
    def startend_row_indices(self) -> Tensor:
        """(B, Hm, kv_len, n) int32, what FlashMask takes, in the fewest vectors that say it; a copy."""
        held = self.vectors()
        for (causal, _), names in _LAYOUTS.items():
            if causal == self.causal and set(held) <= set(names):
                return torch.stack([held[name] if name in held else self._default(name) for name in names], dim=3)
        raise AssertionError("four vectors hold any of them")

    def vectors(self) -> dict[str, Tensor]:
        """The vectors there are, by name: (B, Hm, kv_len) int32 each."""
        named = zip(_VECTORS, (self.lts, self.lte, self.uts, self.ute), strict=True)
        return {name: x for name, x in named if x is not None}

    def to(self, device: torch.device | str) -> ColumnIntervals:
        """The same mask with its vectors on a device; itself if they are there."""
        on = arguments.device("ColumnIntervals.to", device, on_meta=True)
        moved = {name: x.to(on) for name, x in self.vectors().items()}
        return self if moved["lts"] is self.lts else ColumnIntervals(**moved, causal=self.causal)

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """How rows align with columns, and query heads with those of the vectors."""
        operation, (batch, heads, kv_len) = sizes.operation, self.lts.shape
        sizes.refuse_offsets(
            "column intervals count the rows and columns of the tensors themselves",
            "shift the vectors instead, or use to_flashmask(..., q_offset=...)",
        )
        if sizes.kv_len != kv_len:
            raise ArgumentError(
                f"{operation}: kv_len is {sizes.kv_len}, expected {kv_len}, a column for each entry of the vectors"
            )
        if batch not in (1, sizes.batch):
            raise ArgumentError(
                f"{operation}: batch is {sizes.batch}, expected {batch} as in the vectors; a batch of 1 serves all"
            )
        if sizes.heads % heads:
            raise ArgumentError(f"{operation}: {sizes.heads} query heads, expected a multiple of the vectors' {heads}")
        implied = {_SHIFT: sizes.kv_len - sizes.q_len} if self.causal else {}
        return implied if heads == 1 else {**implied, _group(heads): sizes.heads // heads}

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The comparisons with the vectors; those of one form are traced once, whatever the vectors."""
        traced = _trace(self._form, mask_args.get(_group(self._form.heads), 1))
        return replace(traced, tables=tuple(self._tables[name] for name in traced.names))

    def held(self) -> tuple[Tensor, ...]:
        """The vectors."""
        return tuple(self._tables.values())

    def __call__(self, b: Any, h: Any, q: Any, kv: Any, **mask_args: Any) -> Any:
        """Whether the pair is visible; what the call implies must be known."""
        if any(name not in mask_args for name in self.implied_names):
            raise ArgumentTypeError(
                "ColumnIntervals: a predicate can't call it, since it depends on the call's lengths and heads; "
                "combine the masks with & | ^ ~ instead"
            )
        return self._form.visible(b, h, q, kv, {**self._tables, **mask_args})

    def _default(self, name: str) -> Tensor:
        """A vector that changes nothing: an lte after all rows; otherwise an upper interval that is empty."""
        return torch.full_like(self.lts, torch.iinfo(torch.int32).max if name == "lte" else 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return ColumnIntervals, (self.lts, self.lte, self.uts, self.ute, self.causal)


class _Form(NamedTuple):
    """What their expression depends on; batch rows and heads are looked at only where there are several."""

    names: tuple[str, ...]
    causal: bool
    batched: bool
    heads: int

    def squeezed(self, vector: Tensor) -> Tensor:
        """A view of a vector (B, Hm, kv_len) without the dimensions that nothing looks at."""
        vector = vector if self.heads > 1 else vector[:, 0]
        return vector if self.batched else vector[0]

    def visible(self, b: Any, h: Any, q: Any, kv: Any, values: dict[str, Any]) -> Any:
        """The mask over vectors of `squeezed` shape and what the call implies."""
        place: tuple[Any, ...] = (kv,)
        if self.heads > 1:
            place = (h // values[_group(self.heads)], *place)
        if self.batched:
            place = (b, *place)
        hidden = q >= values["lts"][place]
        if "lte" in self.names:
            hidden = hidden & (q < values["lte"][place])
        if "ute" in self.names:
            above = q < values["ute"][place]
            if "uts" in self.names:
                above = (q >= values["uts"][place]) & above
            hidden = hidden | above
        if self.causal:
            hidden = hidden | (q + values[_SHIFT] < kv)
        return hidden ^ True


@lru_cache(maxsize=64)
def _trace(form: _Form, group: int) -> Traced:
    """The expression of all masks of a form; its tables are named as the vectors."""

    def visible(b: Any, h: Any, q: Any, kv: Any, **values: Any) -> Any:
        return form.visible(b, h, q, kv, values)

    implied = {**({_SHIFT: 0} if form.causal else {}), **({_group(form.heads): group} if form.heads > 1 else {})}
    anything = torch.zeros((1,) * (1 + form.batched + (form.heads > 1)), dtype=torch.int32)
    return trace(visible, {**dict.fromkeys(form.names, anything), **implied})


def _group(heads: int) -> str:
    return f"query heads / {heads}"


def _checked(name: str, value: Any) -> Tensor:
    """A vector as (B, Hm, kv_len) int32; the tensor itself, or a view of it, wherever its dtype allows."""
    table = arguments.int_table("ColumnIntervals", name, value, (1, 2, 3))
    if table.dtype != torch.int32:
        if arguments.without_data(table):
            raise ArgumentError(
                f"ColumnIntervals: {name} has dtype {table.dtype}, and no data to convert; expected torch.int32"
            )
        limits = torch.iinfo(torch.int32)
        beyond = (table < limits.min) | (table > limits.max)
        if beyond.any():
            wrong = beyond.nonzero()
            place = tuple(wrong[wrong[:, -1].argmin()].tolist())
            raise ArgumentError(
                f"ColumnIntervals: {name} is {int(table[place])} at column {place[-1]}, expected a 32-bit row number; "
                "clamp it to the number of rows"
            )
        table = table.int()
    if 0 in table.shape[:-1]:
        raise ArgumentError(
            f"ColumnIntervals: {name} has shape {_shape(value)}, expected batch and heads of at least 1"
        )
    missing = 3 - table.ndim
    return table[None, None] if missing == 2 else table[:, None] if missing else table


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(arguments.int_table("ColumnIntervals", "a vector", value, (1, 2, 3)).shape)
