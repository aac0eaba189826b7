"""What every mask can be turned into for other engines: the methods of `Mask` that begin with `to_`.

Each is exact, or raises UnsupportedMask and names the first row, column or tile that has no such form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maskflash.ground.arguments import BlockSize

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from maskflash.forms.block_rows import BlockRows
    from maskflash.forms.block_sparse import BlockSparse
    from maskflash.forms.cute import CuteMask
    from maskflash.forms.packed_mask import PackedMask
    from maskflash.forms.prefix_ranges import PrefixRanges
    from maskflash.forms.row_intervals import RowIntervals
    from maskflash.forms.slices import Slices
    from maskflash.masks.columns import ColumnIntervals
    from maskflash.masks.sight import Sight


class Exports:
    """The forms of a mask; `Mask` says what it is at given lengths."""

    def at_call(self, operation: str, q_len: int, kv_len: int, call: dict[str, Any]) -> Sight:
        """The mask at the lengths of a call; see `Mask.at_call`."""
        raise NotImplementedError

    def to_flashmask(self, q_len: int, kv_len: int, *, causal: bool | None = None, **call: Any) -> ColumnIntervals:
        """FlashMask's vectors for this mask: found from its boundary, never from all pairs.

        They are for the rows of the query tensor itself, whatever the offsets, and have one batch row where the mask
        does not look at b; likewise with heads.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            causal: whether the vectors come with causal=True (aligned to the bottom right); None where the mask hides
                all that causal hides.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

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
        return self.at_call("Mask.to_flashmask", q_len, kv_len, call).to_flashmask(causal)

    def to_block_mask(self, q_len: int, kv_len: int, *, block_size: BlockSize = 128, **call: Any) -> BlockMask:
        """FlexAttention's BlockMask of this mask, at the cost of a block map: for its kernel, without its wait.

        Its lists have a number for each tile, skipped ones too: at a million tokens they are 2 GB in tiles of 128.

        Args:
            q_len: rows in tokens, at least 1.
            kv_len: columns in tokens, at least 1.
            block_size: tokens per tile, one number or (q_tokens, kv_tokens).
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

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
        return self.at_call("Mask.to_block_mask", q_len, kv_len, call).to_block_mask(block_size)

    def to_row_intervals(self, q_len: int, kv_len: int, **call: Any) -> RowIntervals:
        """What each query sees, as intervals of keys: found from the mask's boundary, never from all pairs.

        They have one batch row where the mask does not look at b; likewise with heads.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal, global_tokens, sliding_window
            >>> seen = (causal() & (global_tokens(1) | sliding_window(1))).to_row_intervals(4, 4)
            >>> [seen.row(q) for q in range(4)]
            [[(0, 1)], [(0, 2)], [(0, 3)], [(0, 1), (2, 4)]]
        """
        return self.at_call("Mask.to_row_intervals", q_len, kv_len, call).to_row_intervals()

    def to_slices(self, q_len: int, kv_len: int, **call: Any) -> Slices:
        """MagiAttention's slices of this mask, found from what its rows see: disjoint, and few.

        A document is one slice, whether causal or not; a causal window is two. Batch rows lie one after the other along
        queries and along keys, as in a packed call.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Returns:
            q_ranges and k_ranges, and a type for each slice.

        Raises:
            UnsupportedMask: heads that see different keys, with the first such row.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal, document, sliding_window
            >>> (causal() & document([300, 724])).to_slices(1024, 1024).k_ranges
            tensor([[   0,  300],
                    [ 300, 1024]], dtype=torch.int32)
            >>> sliding_window(100).to_slices(1024, 1024)
            Slices(1 causal, 1 bi-causal)
        """
        return self.at_call("Mask.to_slices", q_len, kv_len, call).to_slices()

    def as_arguments(self, library: str, q_len: int, kv_len: int, **call: Any) -> dict[str, Any]:
        """What a library's attention call takes for this mask, where its kernels have just this one.

        What rows see decides, so any mask that shows the same pairs has the same arguments, however it is written. They
        are for the rows of the tensors themselves, whatever the offsets, and the plainest that there are: a window that
        hides nothing is none.

        Args:
            library: a name that `from_arguments` knows, such as "flash_attn" or "transformers".
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Returns:
            The library's own arguments by name, tensors on the call's device. Those for packed sequences count tokens
            through the batch rows: for q and k of (B, S, H, D) they are those of `flatten(0, 1)`. Queries that see
            nothing, and keys that nobody sees, are sequences of queries or keys alone.

        Raises:
            UnsupportedMask: the library has no such arguments; the first pair that the nearest treat otherwise, and
                which kernels would take the mask.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal, document, mask
            >>> mask(lambda b, h, q, kv: q - 100 <= kv <= q).as_arguments("flash_attn", 4096, 4096)
            {'causal': True, 'window_size': (100, 0)}
            >>> packed = (causal() & document([300, 724])).as_arguments("flash_attn_varlen", 1024, 1024)
            >>> packed["cu_seqlens_q"].tolist(), packed["max_seqlen_q"], packed["causal"]
            ([0, 300, 1024], 724, True)
        """
        return self.at_call("Mask.as_arguments", q_len, kv_len, call).as_arguments(library)

    def to_block_sparse(self, q_len: int, kv_len: int, *, block_size: BlockSize = 128, **call: Any) -> BlockSparse:
        """FlashAttention 4's block-sparse tensors of this mask, at the cost of a block map.

        What a block may be depends on the kernel's tiles. Forward on Blackwell wants a multiple of 256 queries (of 128
        for at most 128 queries, all query heads of a key's head together, or values of 256 dimensions) and of 128 keys;
        on Hopper a multiple of 64 queries, and 128 keys up to a head dim of 128 (or fewer, in steps of 16). Backward
        wants a multiple of 128 queries and of 128 keys on Blackwell (an even one at a head dim of 192), of 128 queries
        and just 128 keys on Hopper up to a head dim of 128. So (256, 128) serves forward on Blackwell, and (128, 128)
        Hopper. Forward and backward may come from forms of different blocks. Other GPUs have no block-sparse kernels.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            block_size: tokens per block, one number or (q_tokens, kv_tokens).
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Returns:
            Counts and indices of partial and full blocks, `forward` and `backward`.

        Raises:
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal
            >>> form = causal().to_block_sparse(512, 512)
            >>> form.forward.mask_block_cnt.tolist(), form.forward.full_block_cnt.tolist()
            ([[[1, 1, 1, 1]]], [[[0, 1, 2, 3]]])
            >>> form.backward.full_block_idx[0, 0].tolist()
            [[1, 2, 3], [2, 3, 0], [3, 0, 0], [0, 0, 0]]
        """
        return self.at_call("Mask.to_block_sparse", q_len, kv_len, call).to_block_sparse(block_size)

    def to_cute(self, q_len: int, kv_len: int, **call: Any) -> CuteMask:
        """This mask as text of a mask_mod of FlashAttention 4, in CuTe's Python dialect, and what it reads.

        Its numbers, such as windows and offsets, are aux_scalars: others need no other text. Look-ups are clamped.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Raises:
            UnsupportedMask: an operation that has no exact counterpart in CuTe, by name and place.

        Example:
            >>> from maskflash import causal
            >>> print(causal().to_cute(512, 512).text)
            import cutlass
            import cutlass.cute as cute
            <BLANKLINE>
            <BLANKLINE>
            @cute.jit
            def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
                q = cutlass.Int32(m_idx[0])
                kv = cutlass.Int32(n_idx[0])
                x2 = q >= kv
                visible = cute.make_rmem_tensor(1, cutlass.Boolean)
                visible[0] = x2
                return visible.load()
            <BLANKLINE>
        """
        return self.at_call("Mask.to_cute", q_len, kv_len, call).to_cute()

    def to_block_rows(self, q_len: int, kv_len: int, *, block_size: BlockSize = 128, **call: Any) -> BlockRows:
        """FlashInfer's block-sparse rows of this mask: which blocks, and packed bits where a block is partial.

        Bits are of all pairs of the listed blocks, full ones too. They are set by what rows see, not by pairs.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            block_size: (R, C), queries and keys of a block, or one number for both.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Raises:
            UnsupportedMask: heads differ, or there are more than 2³¹ - 1 bytes of bits.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal
            >>> form = causal().to_block_rows(4, 4, block_size=2)
            >>> form.indptr.tolist(), form.indices.tolist(), [f"{byte:08b}" for byte in form.packed_mask.tolist()]
            ([0, 1, 3], [0, 0, 1], ['00001101', '11110111'])
        """
        return self.at_call("Mask.to_block_rows", q_len, kv_len, call).to_block_rows(block_size)

    def to_packed_mask(self, q_len: int, kv_len: int, **call: Any) -> PackedMask:
        """FlashInfer's packed custom mask of this mask: a bit for each pair, so N² bits by nature.

        They are set by what rows see, not by pairs. 65,536 x 65,536 pairs take 512 MiB.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Raises:
            UnsupportedMask: heads differ, or there are more than 2³¹ - 1 bytes.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import causal
            >>> [f"{byte:08b}" for byte in causal().to_packed_mask(3, 5).packed.tolist()]
            ['01100001', '00011100']
        """
        return self.at_call("Mask.to_packed_mask", q_len, kv_len, call).to_packed_mask()

    def to_prefix_ranges(self, q_len: int, kv_len: int, **call: Any) -> PrefixRanges:
        """This mask as a window and bidirectional ranges, as vLLM takes them for images: decided exactly.

        The ranges are of key positions, and the queries are the last ones, whatever the offsets.

        Args:
            q_len: rows in tokens.
            kv_len: columns in tokens.
            **call: batch, heads, q_offset, kv_offset, device and the mask's own arguments: see `at`.

        Raises:
            UnsupportedMask: no window and ranges show what a row sees, the first of them; or heads differ.
            MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

        Example:
            >>> from maskflash import mask, sliding_window
            >>> image = mask(lambda b, h, q, kv: 2 <= q < 6 and 2 <= kv < 6)
            >>> (sliding_window(2) | image).to_prefix_ranges(9, 9)
            PrefixRanges(sliding_window=3, mm_prefix_range=tensor([[[2, 5]]], dtype=torch.int32))
        """
        return self.at_call("Mask.to_prefix_ranges", q_len, kv_len, call).to_prefix_ranges()
