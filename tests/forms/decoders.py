"""Arguments of kernels with fixed masks -> every pair, by each library's own rules."""

import math

import torch


def flash(rows, columns, causal, window, longest):
    """What flash-attention's kernels show of one sequence: flash_api.cpp's treatment of the window, then its mask."""
    left, right = window
    if causal:
        right = 0
    if left >= longest:
        left = -1
    if right >= longest:
        right = -1
    if left >= 0 and right < 0:
        right = longest
    pairs = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            at = i + columns - rows
            pairs[i, j] = (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
    return pairs


def placed(rows, columns, blocks):
    """Blocks of pairs where they begin, in a batch row of all tokens."""
    pairs = torch.zeros(rows, columns, dtype=torch.bool)
    for row, column, block in blocks:
        pairs[row : row + block.shape[0], column : column + block.shape[1]] = block
    return pairs


def flash_attn(sizes, causal=False, window_size=(-1, -1)):
    batch, q_len, kv_len = sizes
    return flash(q_len, kv_len, causal, window_size, kv_len).expand(batch, -1, -1)


def flash_attn_varlen(
    sizes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(-1, -1), seqused=None
):
    batch, q_len, kv_len = sizes
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(q) == len(k)
    assert (q[0], k[0], q[-1], k[-1]) == (0, 0, batch * q_len, batch * kv_len)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    blocks = []
    for n in range(len(q) - 1):
        rows, columns = q[n + 1] - q[n], k[n + 1] - k[n]
        assert 0 <= rows <= max_seqlen_q
        assert 0 <= columns <= max_seqlen_k
        kept = columns if seqused is None else seqused[n]
        blocks.append((q[n], k[n], flash(rows, kept, causal, window_size, max_seqlen_k)))
    whole = placed(batch * q_len, batch * kv_len, blocks)
    parts = [whole[b * q_len : (b + 1) * q_len, b * kv_len : (b + 1) * kv_len] for b in range(batch)]
    assert sum(int(part.sum()) for part in parts) == int(whole.sum()), "no sequence crosses batch rows"
    return torch.stack(parts)


def torch_varlen(sizes, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, -1), seqused_k=None):
    causal = window_size == (-1, 0)
    return flash_attn_varlen(sizes, cu_seq_q, cu_seq_k, max_q, max_k, causal, window_size, seqused_k)


def sdpa(sizes, is_causal=False, attn_mask=None):
    batch, q_len, kv_len = sizes
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool) if attn_mask is None else attn_mask._materialize()
    return (pairs.tril() if is_causal else pairs).expand(batch, -1, -1)


def corner(rows, columns, shift, left=math.inf, right=math.inf):
    pairs = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            pairs[i, j] = i + shift - left <= j <= i + shift + right
    return pairs


def xformers(sizes, attn_bias, **args):
    """`materialize` of the class, and what it refuses when it is made."""
    batch, q_len, kv_len = sizes
    top_left = attn_bias in (
        *("LowerTriangularMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalLocalAttentionMask"),
    )
    left, right = args.get("window_left", math.inf), args.get("window_right", math.inf)
    if "window_size" in args:
        left, right = args["window_size"] - 1, 0
    elif attn_bias and ("Causal" in attn_bias or "LowerTriangular" in attn_bias):
        right = 0
    assert left >= 0
    assert right >= 0

    def block(rows, columns):
        return corner(rows, columns, 0 if top_left else columns - rows, left, right)

    if "q_seqlen" not in args:
        return block(q_len, kv_len).expand(batch, -1, -1)
    q, k = args["q_seqlen"], args["kv_seqlen"]
    assert len(q) == len(k) > 0
    if "kv_padding" in args:
        assert all(n <= args["kv_padding"] for n in k)
        starts = [n * args["kv_padding"] for n in range(len(k) + 1)]
    elif "kv_seqstarts" in args:
        starts = args["kv_seqstarts"]
        assert len(starts) == len(k) + 1
    else:
        starts = [sum(k[:n]) for n in range(len(k) + 1)]
    assert sum(q) == batch * q_len
    assert starts[-1] == batch * kv_len
    if attn_bias in ("BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalCausalLocalAttentionFromBottomRightMask"):
        assert all(keys >= queries for queries, keys in zip(q, k, strict=True))
    if attn_bias == "BlockDiagonalCausalLocalAttentionMask":
        assert all(queries - args["window_size"] < keys for queries, keys in zip(q, k, strict=True))
    whole = placed(batch * q_len, batch * kv_len, [(sum(q[:n]), starts[n], block(q[n], k[n])) for n in range(len(q))])
    return torch.stack([whole[b * q_len : (b + 1) * q_len, b * kv_len : (b + 1) * kv_len] for b in range(batch)])


DECODERS = {
    "flash_attn": flash_attn,
    "flash_attn_varlen": flash_attn_varlen,
    "torch_varlen": torch_varlen,
    "sdpa": sdpa,
    "xformers": xformers,
}
