"""A mask, lengths and arguments -> its pairs, tiles, lines, vectors and reasons: what one may ask of every mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from maskflash.analysis.problem import TILE
from maskflash.functions.function import Bindable
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks import lines

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from maskflash.analysis.block_map import BlockMap
    from maskflash.masks.columns import ColumnIntervals
    from maskflash.masks.why import Why

Joinable = Callable[..., Any] | Tensor
"""A mask, a predicate `(b, h, q, kv)`, or a tensor of bool."""

_PAIRS_AT_ONCE: Final = 1 << 22  # of a dense mask: bounds what its evaluation holds beside the result


class Mask(Bindable):
    """Which query may see which key.

    Masks combine with one another, with predicates and with tensors of bool by `&`, `|`, `^` and `~`; keyword arguments
    of the same name are the same argument. A mask is itself a predicate `(b, h, q, kv)`, so another may call it.

    A mask is equal to itself alone: `equivalent` compares what masks show, `fingerprint` how they are written. It can
    be pickled and deep-copied: see docs/questions.md for what becomes of its function.
    """

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
            >>> from maskflash import mask
            >>> mask(lambda b, h, q, kv: q >= kv).dense(2, 3)[0, 0].int()
            tensor([[1, 0, 0],
                    [1, 1, 0]], dtype=torch.int32)
        """
        problem = self.problem("Mask.dense", q_len, kv_len, batch, heads, (1, 1), q_offset, device, mask_args)
        rows, columns = problem.shape[:2]
        seen = torch.zeros(rows, columns, q_len, kv_len, dtype=torch.bool, device=problem.device)
        b, h, q, kv = (
            torch.arange(n, device=problem.device).view([-1 if axis == place else 1 for axis in range(4)])
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
            device: where the map lives; the analysis runs on the CPU.
            **mask_args: the mask's own arguments.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import mask
            >>> mask(lambda b, h, q, kv: q >= kv).block_map(512, 512).counts
            {'full': 6, 'partial': 4, 'skip': 6}
        """
        from maskflash.analysis.classify import classify

        size = arguments.block_size("Mask.block_map", block_size, attended=False)
        problem = self.problem("Mask.block_map", q_len, kv_len, batch, heads, size, q_offset, device, mask_args)
        return classify(problem).block_map.to(problem.device)

    def row(
        self,
        q: int,
        kv_len: int,
        *,
        b: int = 0,
        h: int = 0,
        q_len: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        q_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> list[tuple[int, int]]:
        """The keys that a query sees, as runs: the cost is that of one row, in parts of bounded size.

        Args:
            q: the row, from 0; the mask sees q + q_offset.
            kv_len: columns in tokens.
            b: batch row.
            h: query head.
            q_len: rows in tokens; needed only by masks that depend on it, such as `ColumnIntervals` with causal.
            batch: batch rows; likewise.
            heads: query heads; likewise.
            q_offset: added to row numbers; an int, or an int tensor (batch,).
            device: where to evaluate.
            **mask_args: the mask's own arguments.

        Returns:
            (start, stop) of each run of visible keys, half open, ascending.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal, global_tokens, sliding_window
            >>> (causal() & (global_tokens(4) | sliding_window(100))).row(1000, 4096)
            [(0, 4), (900, 1001)]
        """
        sizes = {"batch": batch, "heads": heads, "q_len": q_len, "kv_len": kv_len}
        problem = self.problem_at("Mask.row", {"b": b, "h": h, "q": q}, sizes, q_offset, device, mask_args)
        return lines.row(problem, b, h, q)

    def column(
        self,
        kv: int,
        q_len: int,
        *,
        b: int = 0,
        h: int = 0,
        kv_len: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        q_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> list[tuple[int, int]]:
        """The queries that see a key, as runs (start, stop) of rows: see `row`.

        Example:
            >>> from maskflash import sliding_window
            >>> sliding_window(100).column(1000, 4096)
            [(1000, 1101)]
        """
        sizes = {"batch": batch, "heads": heads, "q_len": q_len, "kv_len": kv_len}
        problem = self.problem_at("Mask.column", {"b": b, "h": h, "kv": kv}, sizes, q_offset, device, mask_args)
        return lines.column(problem, b, h, kv)

    def why(
        self,
        q: int,
        kv: int,
        *,
        b: int = 0,
        h: int = 0,
        q_len: int | None = None,
        kv_len: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        q_offset: int | Tensor = 0,
        device: torch.device | str = "cpu",
        **mask_args: Any,
    ) -> Why:
        """Why a query sees a key, or doesn't: the conditions that decide it, with their values and source lines.

        Args:
            q: the row, from 0; the mask sees q + q_offset.
            kv: the column.
            b: batch row.
            h: query head.
            q_len: rows in tokens; needed only by masks that depend on it, such as `ColumnIntervals`.
            kv_len: columns in tokens; likewise.
            batch: batch rows; likewise.
            heads: query heads; likewise.
            q_offset: added to row numbers; an int, or an int tensor (batch,).
            device: where to evaluate.
            **mask_args: the mask's own arguments.

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
        from maskflash.masks.why import why

        sizes = {"batch": batch, "heads": heads, "q_len": q_len, "kv_len": kv_len}
        return why(self, {"b": b, "h": h, "q": q, "kv": kv}, sizes, q_offset, device, mask_args)

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
            device: where the vectors live; the analysis runs on the CPU.
            **mask_args: the mask's own arguments.

        Returns:
            The same mask as column intervals; its `startend_row_indices` is what FlashMask takes.

        Raises:
            UnsupportedMask: a column hides more than two runs of rows (three with causal); the first such column.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import mask
            >>> mask(lambda b, h, q, kv: kv <= q < kv + 2).to_flashmask(4, 4).startend_row_indices[0, 0, :, 0]
            tensor([2, 3, 4, 4], dtype=torch.int32)
        """
        from maskflash.masks.convert import to_columns

        operation = "Mask.to_flashmask"
        chosen = None if causal is None else arguments.flag(operation, "causal", causal)
        problem = self.problem(operation, q_len, kv_len, batch, heads, TILE, q_offset, device, mask_args)
        return to_columns(problem, chosen)

    def to_block_mask(
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
    ) -> BlockMask:
        """FlexAttention's BlockMask of this mask, at the cost of a block map: for its kernel, without its wait.

        Args:
            q_len: rows in tokens, at least 1.
            kv_len: columns in tokens, at least 1.
            batch: batch rows; the BlockMask has one where the mask does not look at b.
            heads: query heads; likewise with h.
            block_size: tokens per tile, one number or (q_tokens, kv_tokens).
            q_offset: added to row numbers; an int, or an int tensor (batch,).
            device: where the BlockMask lives.
            **mask_args: the mask's own arguments.

        Returns:
            What `create_block_mask` would make: the same full and partial tiles, and a mask_mod for the latter.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import mask
            >>> flex = mask(lambda b, h, q, kv: q >= kv).to_block_mask(512, 512)
            >>> flex.kv_num_blocks.tolist(), flex.full_kv_num_blocks.tolist()
            ([[[1, 1, 1, 1]]], [[[0, 1, 2, 3]]])
        """
        from maskflash.masks.flex import to_block_mask

        operation = "Mask.to_block_mask"
        size = arguments.block_size(operation, block_size)
        for name, length in (("q_len", q_len), ("kv_len", kv_len)):
            arguments.integer(operation, name, length, low=1)
        return to_block_mask(self.problem(operation, q_len, kv_len, batch, heads, size, q_offset, device, mask_args))

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
        from maskflash.masks.combination import Combination

        return Combination("not", self)

    def _joined(self, op: str, other: Joinable, *, last: bool = False) -> Mask:
        """This mask and another, or a predicate, joined by a connective."""
        from maskflash.masks.combination import SYMBOLS, Combination
        from maskflash.masks.dense import dense_mask
        from maskflash.masks.predicate import mask

        if isinstance(other, Tensor):
            whole: Mask = dense_mask(f"{self.name} {SYMBOLS[op]} tensor", other)
        elif callable(other) or isinstance(other, str):  # masks are callable too
            whole = mask(other)
        else:
            return NotImplemented
        return Combination(op, *((whole, self) if last else (self, whole)))
