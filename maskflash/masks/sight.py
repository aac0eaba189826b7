"""A mask at the lengths of a call -> its pairs, tiles, lines, vectors and reasons: what one may ask of every mask.

      kv            dense()       every pair
    ■ · · ·         block_map()   tiles that are full, partial or skip
q   ■ ■ · ·  <---   row(q)        [(0, 2)]: the keys that query 1 sees
    · · ■ ·         column(kv)    the queries that see a key
    · · ■ ■         why(q, kv)    what decides a pair
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.expr.evaluate import Inputs
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks import lines

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from maskflash.analysis.block_map import BlockMap
    from maskflash.forms.block_rows import BlockRows
    from maskflash.forms.block_sparse import BlockSparse
    from maskflash.forms.cute import CuteMask
    from maskflash.forms.packed_mask import PackedMask
    from maskflash.forms.prefix_ranges import PrefixRanges
    from maskflash.forms.row_intervals import RowIntervals
    from maskflash.forms.slices import Slices
    from maskflash.masks.columns import ColumnIntervals
    from maskflash.masks.mask import Mask
    from maskflash.masks.why import Why

_PAIRS_AT_ONCE: Final = 1 << 22  # of a dense mask: bounds what its evaluation holds beside the result


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """A mask at the lengths of a call, ready for questions: `mask.at(q_len, kv_len, ...)` makes it.

    What the mask captures and its arguments were looked up then; tensors among them are read at each question.

    Attributes:
        mask: the mask.
        sizes: of the call.
        mask_args: the mask's own arguments.
        problem: the mask as analysis takes it, in tiles of 128 tokens.

    Example:
        >>> from maskflash import causal, sliding_window
        >>> sight = (causal() & sliding_window(100)).at(4096, 4096)
        >>> sight.row(1000), sight.column(1000)
        ([(900, 1001)], [(1000, 1101)])
        >>> sight.block_map().counts
        {'full': 0, 'partial': 63, 'skip': 961}
    """

    mask: Mask
    sizes: Sizes
    mask_args: dict[str, Any]
    problem: Problem

    def __dir__(self) -> list[str]:
        """What users may use."""
        return [name for name in dir(Sight) if not name.startswith("_") and name not in ("of", "tiled")]

    @staticmethod
    def of(mask: Mask, sizes: Sizes, mask_args: dict[str, Any]) -> Sight:
        """A mask at checked sizes."""
        slots, params, tables = mask.bind(sizes, mask_args)
        problem = Problem(
            slots.expr,
            Inputs(slots.expr.decoded(params), tuple([table.to(sizes.device) for table in tables])),
            sizes.q_len,
            sizes.kv_len,
            sizes.batch,
            sizes.heads,
            q_offset=sizes.q_offset,
            device=sizes.device,
            names=slots.names,
            kv_offset=sizes.kv_offset,
        )
        return Sight(mask, sizes, mask_args, problem)

    def dense(self) -> Tensor:
        """Every pair: (batch, heads, q_len, kv_len) bool; see `Mask.dense`."""
        problem = self.problem
        rows, columns = problem.shape[:2]
        seen = torch.zeros(rows, columns, problem.q_len, problem.kv_len, dtype=torch.bool, device=problem.device)
        b, h, q, kv = (
            torch.arange(n, device=problem.device).view([-1 if axis == place else 1 for axis in range(4)])
            for place, n in enumerate(seen.shape)
        )
        if seen.numel():
            step = max(1, _PAIRS_AT_ONCE // (rows * columns * problem.kv_len))
            for start in range(0, problem.q_len, step):
                seen[:, :, start : start + step] = problem.visible(b, h, q[:, :, start : start + step], kv)
        return seen.expand(problem.batch, problem.heads, problem.q_len, problem.kv_len)

    def block_map(self, block_size: BlockSize = 128) -> BlockMap:
        """Which tiles are full, partial and skip; see `Mask.block_map`.

        Args:
            block_size: tokens per tile, one number or (q_tokens, kv_tokens).
        """
        from maskflash.analysis.classify import classify

        size = arguments.block_size(self.sizes.operation, block_size, attended=False)
        return classify(self.tiled(size)).block_map.to(self.problem.device)

    def row(self, q: int, *, b: int = 0, h: int = 0) -> lines.Line:
        """The keys that a query sees, as (start, stop) of each run; see `Mask.row`.

        Args:
            q: the row, from 0.
            b: batch row.
            h: query head.
        """
        self.sizes.check_index(b=b, h=h, q=q)
        return lines.row(self.problem, b, h, q)

    def column(self, kv: int, *, b: int = 0, h: int = 0) -> lines.Line:
        """The queries that see a key, as (start, stop) of each run; see `Mask.column`.

        Args:
            kv: the column, from 0.
            b: batch row.
            h: query head.
        """
        self.sizes.check_index(b=b, h=h, kv=kv)
        return lines.column(self.problem, b, h, kv)

    def why(self, q: int, kv: int, *, b: int = 0, h: int = 0) -> Why:
        """Why a query sees a key, or doesn't; see `Mask.why`.

        Args:
            q: the row, from 0.
            kv: the column, from 0.
            b: batch row.
            h: query head.
        """
        from maskflash.masks.why import why

        self.sizes.check_index(b=b, h=h, q=q, kv=kv)
        return why(self, (b, h, q, kv))

    def to_flashmask(self, causal: bool | None = None) -> ColumnIntervals:
        """FlashMask's vectors; see `Mask.to_flashmask`.

        Args:
            causal: whether the vectors come with causal=True; None where the mask hides all that causal hides.
        """
        from maskflash.forms.flashmask import to_columns

        chosen = None if causal is None else arguments.flag(self.sizes.operation, "causal", causal)
        return to_columns(self.problem, chosen)

    def to_block_mask(self, block_size: BlockSize = 128) -> BlockMask:
        """FlexAttention's BlockMask; see `Mask.to_block_mask`.

        Args:
            block_size: tokens per tile, one number or (q_tokens, kv_tokens).
        """
        from maskflash.forms.flex import to_block_mask

        operation = self.sizes.operation
        size = arguments.block_size(operation, block_size)
        for name, length in (("q_len", self.sizes.q_len), ("kv_len", self.sizes.kv_len)):
            arguments.integer(operation, name, length, low=1)
        return to_block_mask(self.tiled(size))

    def to_row_intervals(self) -> RowIntervals:
        """What each query sees, as intervals of keys; see `Mask.to_row_intervals`."""
        from maskflash.forms.row_intervals import find_row_intervals

        return find_row_intervals(self.problem)

    def to_slices(self) -> Slices:
        """MagiAttention's slices; see `Mask.to_slices`."""
        from maskflash.forms.slices import find_slices

        return find_slices(self.problem)

    def as_arguments(self, library: str) -> dict[str, Any]:
        """What a library's attention call takes for this mask; see `Mask.as_arguments`.

        Args:
            library: a name that `from_arguments` knows, such as "flash_attn" or "transformers".
        """
        from maskflash.forms.arguments import as_arguments

        return as_arguments(self.problem, library, self.mask.name)

    def to_block_sparse(self, block_size: BlockSize = 128) -> BlockSparse:
        """FlashAttention 4's block-sparse tensors; see `Mask.to_block_sparse`.

        Args:
            block_size: tokens per block, one number or (q_tokens, kv_tokens).
        """
        from maskflash.forms.block_sparse import to_block_sparse

        return to_block_sparse(self.tiled(arguments.block_size(self.sizes.operation, block_size)))

    def to_cute(self) -> CuteMask:
        """A mask_mod of FlashAttention 4, as text; see `Mask.to_cute`."""
        from maskflash.forms.cute import to_cute

        return to_cute(self.problem)

    def to_block_rows(self, block_size: BlockSize = 128) -> BlockRows:
        """FlashInfer's block-sparse rows; see `Mask.to_block_rows`.

        Args:
            block_size: (R, C), queries and keys of a block, or one number for both.
        """
        from maskflash.forms.block_rows import find_block_rows

        return find_block_rows(self.tiled(arguments.block_size(self.sizes.operation, block_size)))

    def to_packed_mask(self) -> PackedMask:
        """FlashInfer's packed custom mask; see `Mask.to_packed_mask`."""
        from maskflash.forms.packed_mask import find_packed_mask

        return find_packed_mask(self.problem)

    def to_prefix_ranges(self) -> PrefixRanges:
        """A window and bidirectional ranges, as vLLM takes them; see `Mask.to_prefix_ranges`."""
        from maskflash.forms.prefix_ranges import find_prefix_ranges

        return find_prefix_ranges(self.problem)

    def tiled(self, block_size: tuple[int, int]) -> Problem:
        """The problem in tiles of other sizes, which are checked already."""
        return replace(self.problem, block_size=block_size)

    def __repr__(self) -> str:
        return f"{self.mask.name} at {self.sizes.q_len} x {self.sizes.kv_len}"
