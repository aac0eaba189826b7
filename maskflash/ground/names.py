"""Names of arguments -> what takes them here: attention's own, which no mask may use, and those of other libraries."""

from __future__ import annotations

from typing import Any, Final

from maskflash.errors import ArgumentError, ArgumentTypeError

_QUESTIONS: Final = "Mask.dense and the other questions about a mask (a call has it from q and k)"
OWN: Final = {
    **dict.fromkeys(
        ("q", "k", "v", "q_offset", "kv_offset", "sinks", "dropout_p", "generator", "seed", "return_lse"),
        "mf.attention and of the compiled op's calls",
    ),
    **dict.fromkeys(
        ("mask", "score", "scale", "block_size", "backend", "deterministic"), "mf.compile and mf.attention"
    ),
    **dict.fromkeys(("check", "tune", "splits", "kernels", "precision"), "mf.compile"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "mf.varlen_attention"),
    **dict.fromkeys(("k_pages", "v_pages", "pages", "layout", "k_scale", "v_scale"), "Attention.paged"),
    "pass_name": "Attention.source",
    **dict.fromkeys(("q_len", "kv_len", "batch", "heads", "device"), _QUESTIONS),
    **dict.fromkeys(("b", "h", "kv"), "Mask.row, Mask.column and Mask.why"),
    "causal": "Mask.to_flashmask",
    "library": "Mask.as_arguments",
    "self": "Python's methods",
}
"""Arguments of ours, by what takes them: a mask's own arguments have other names."""

_MASK: Final = "the mask is the fourth argument"
_CAUSAL: Final = f"{_MASK}: mf.causal()"
_WINDOW: Final = f"{_MASK}: mf.sliding_window(left, right)"
_DOCUMENTS: Final = f"{_MASK}: mf.document(cu_seqlens=...)"
_PADDED: Final = f"{_MASK}: mf.padding(lengths)"
_VECTORS: Final = f"{_MASK}: mf.ColumnIntervals.from_flashmask(indices, causal); or call mf.flashmask_attention"
_NEIGHBORS: Final = f"{_MASK}: mf.presets.neighborhood(shape, kernel_size, stride, dilation, is_causal)"
_NEEDLESS: Final = "leave it out"
_DROPOUT: Final = "dropout_p="
_SCORE: Final = "score=, a function f(score, b, h, q, kv)"
_SINKS: Final = "sinks=, a number for each query head; for sinks that are tokens join a mask of kv < n"
_PAGES: Final = "mf.compile(mask).paged(q, k_pages, v_pages, mf.PageTable(block_table, lengths, page_size))"
_IN_8_BITS: Final = "pools of pages in float8_e4m3fn have k_scale= and v_scale=, in Attention.paged"
_LSE: Final = "return_lse=True gives the lse; probabilities are never stored"
_OFFSET: Final = "q_offset=cache_seqlens, after writing into the cache yourself"
_BEFORE: Final = "apply it to q and k before the call"

PEERS: Final = {
    # torch's scaled_dot_product_attention and MultiheadAttention
    "attn_mask": _MASK,
    "is_causal": _CAUSAL,
    "dropout_p": "it is an argument of each call: attn(q, k, v, dropout_p=...)",
    "enable_gqa": f"{_NEEDLESS}: fewer heads of k and v are grouped by themselves",
    "key_padding_mask": f"{_PADDED}, or mf.mask(lambda b, h, q, kv: not hidden[b, kv])",
    "need_weights": _LSE,
    "average_attn_weights": _LSE,
    # FlexAttention
    "score_mod": f"{_SCORE}, a score_mod as it is",
    "mask_mod": f"{_MASK}, a mask_mod as it is",
    "block_mask": f"{_MASK}: mf.from_flex(block_mask), or its mask_mod",
    "kernel_options": f"{_NEEDLESS}; block_size= and mf.compile(..., tune=True) choose tiles",
    "return_aux": "return_lse=True",
    # flash-attention
    "causal": _CAUSAL,
    "window_size": _WINDOW,
    "softmax_scale": "scale=",
    "softcap": "score=mf.scores.softcap(cap)",
    "alibi_slopes": "score=mf.scores.alibi(slopes, symmetric=True)",
    "return_attn_probs": _LSE,
    "return_softmax_lse": "return_lse=True",
    "cu_seqlens": _DOCUMENTS,
    **dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_q", "cu_seq_k"),
        "mf.varlen_attention takes them, and (tokens, heads, head_dim)",
    ),
    **dict.fromkeys(
        ("max_seqlen", "max_seqlen_q", "max_seqlen_k", "max_length_q", "max_length_k", "max_q", "max_k"),
        f"{_NEEDLESS}: lengths are read off the mask",
    ),
    **dict.fromkeys(("seqused_q", "seqused_k", "seqlens_k"), _PADDED),
    "cache_seqlens": _OFFSET,
    "k_cache": f"it is k; {_OFFSET}",
    "v_cache": f"it is v; {_OFFSET}",
    **dict.fromkeys(("block_table", "block_tables", "page_table", "cache_batch_idx"), _PAGES),
    **dict.fromkeys(("k_scale", "v_scale"), _IN_8_BITS),
    **dict.fromkeys(
        ("k_descale", "v_descale"), f"{_IN_8_BITS}, of which each head, or each token and head, may have one"
    ),
    "cache_leftpad": "join a mask of kv >= cache_leftpad[b]",
    **dict.fromkeys(("rotary_cos", "rotary_sin", "rotary_interleaved"), _BEFORE),
    **dict.fromkeys(("num_splits", "pack_gqa", "sm_margin"), _NEEDLESS),
    **dict.fromkeys(("s_aux", "learnable_sink", "attention_sinks"), _SINKS),
    # xFormers
    "attn_bias": f"{_MASK}: mf.causal(), mf.document(lengths=...); biases are score=mf.scores.bias(x)",
    "p": _DROPOUT,
    "op": "backend=",
    "output_dtype": f"{_NEEDLESS}: out has q's dtype",
    # FlashMask
    "startend_row_indices": _VECTORS,
    "training": f"{_DROPOUT}, 0 where nothing is trained",
    **dict.fromkeys(("fixed_seed_offset", "rng_name", "return_seed_offset"), "seed= or generator="),
    # Transformers
    "attention_mask": f"{_MASK}: {_PADDED.rpartition(': ')[2]}, or the boolean tensor",
    "scaling": "scale=",
    "dropout": _DROPOUT,
    "sliding_window": f"{_MASK}: mf.sliding_window(n - 1), which counts the tokens before each one",
    "position_ids": f"{_MASK}: mf.document(ids=...)",
    "position_bias": "score=mf.scores.bias(position_bias), or mf.scores.relative_bias(table)",
    "head_mask": f"multiply the heads of out by it: {_NEEDLESS}",
    "output_attentions": _LSE,
    # NATTEN
    "kernel_size": _NEIGHBORS,
    "stride": _NEIGHBORS,
    "dilation": f"{_MASK}: mf.dilated_window(window, dilation); or mf.presets.neighborhood's",
    "attention_chunk_size": f"{_MASK}: mf.presets.chunked(size)",
    "block_sequence_ids": f"{_MASK}: mf.presets.image_blocks(ids=...)",
    "score": "it is an argument of mf.compile and mf.attention",
    **dict.fromkeys(("generator", "seed"), "it is an argument of each call: attn(q, k, v, seed=...)"),
    "dtype": f"{_NEEDLESS}: cast q, k and v, or use autocast",
}
"""What other attentions call their arguments -> what to write here."""

_CAUSAL_MASK: Final = "mf.causal()"
_BOTTOM: Final = "q_offset=kv_len - q_len"
_LENGTHS: Final = "mf.document(lengths=..., kv_lengths=...)"

MASKS: Final = {
    "BlockMask": "mf.from_flex(block_mask)",
    "CausalBias": f"{_CAUSAL_MASK}, with {_BOTTOM} if it is aligned to the lower right",
    "LowerTriangularMask": _CAUSAL_MASK,
    "LowerTriangularMaskWithTensorBias": f"{_CAUSAL_MASK}, and its bias as score=mf.scores.bias(x)",
    "LowerTriangularFromBottomRightMask": f"{_CAUSAL_MASK} with {_BOTTOM}",
    "LowerTriangularFromBottomRightLocalAttentionMask": f"mf.sliding_window(left) with {_BOTTOM}",
    "LocalAttentionFromBottomRightMask": f"mf.sliding_window(left, right) with {_BOTTOM}",
    "BlockDiagonalMask": _LENGTHS,
    "BlockDiagonalCausalMask": f"{_CAUSAL_MASK} & {_LENGTHS}",
    "BlockDiagonalCausalLocalAttentionMask": f"mf.sliding_window(left) & {_LENGTHS}",
    "BlockMap": "the mask that it is the map of: a map has tiles, not pairs",
    "ndarray": "torch.from_numpy(mask), if it holds truth values",
    "list": "torch.tensor(mask), if it holds truth values",
    "tuple": "torch.tensor(mask), if it holds truth values",
    "bool": "mf.causal(), if that is what it is about",
    "int": "a mask such as mf.causal(); all else, such as scale=, goes by name",
    "float": "a mask such as mf.causal(); all else, such as scale=, goes by name",
    "NoneType": "mf.full(), if everything is visible",
}
"""What others have for masks, by the name of its type -> what to write here."""


def unexpected(operation: str, name: str, known: tuple[str, ...] | None) -> ArgumentTypeError:
    """The error for an argument that nothing takes.

    Args:
        operation: what messages call it.
        name: the argument.
        known: what the mask takes; None where masks' arguments aren't passed.
    """
    if name in PEERS:
        answer = PEERS[name]
    elif name in OWN:
        answer = f"it is an argument of {OWN[name]}"
    elif known is None:
        answer = "a mask's own arguments are passed in each call: attn(q, k, v, name=...)"
    else:
        answer = f"the mask's own arguments are: {', '.join(known) or 'none'}"
    return ArgumentTypeError(f"{operation}: unexpected argument {name!r}; {answer}")


def surplus(operation: str, more: tuple[Any, ...], takes: tuple[str, ...], names: tuple[str, ...]) -> ArgumentTypeError:
    """The error for arguments by position beyond those that go so.

    Args:
        operation: what messages call it.
        more: what is beyond.
        takes: what goes by position.
        names: what goes by name; the first of them is the example.
    """
    *first, last = takes
    expected = f"{', '.join(first)} and {last}" if first else last
    return ArgumentTypeError(
        f"{operation}: got {len(takes) + len(more)} arguments by position, expected {expected}; pass all else by name, "
        f"as in {names[0]}=..."
    )


def check_free(mask: str, keywords: tuple[str, ...]) -> None:
    """Check that a mask's arguments can be passed to it: that none has a name of ours.

    Raises:
        ArgumentError: one has.
    """
    for name in keywords:
        if name in OWN:
            raise ArgumentError(
                f"{mask}: its argument {name!r} would never reach it, since that is one of {OWN[name]}; "
                f"give it another name, such as mask_{name}"
            )


def instead_of(value: Any) -> str:
    """What to write instead of another library's mask, or of a value that is none: "; write ...", or nothing."""
    found = [MASKS[kind.__name__] for kind in type(value).__mro__ if kind.__name__ in MASKS]
    return f"; write {found[0]}" if found else ""
