"""Stand-ins for other libraries' attention: they record what they are called with, and compute it densely.

Each has the library's own parameters, in order, and reads the mask's form by its own definition, with plain loops. Rows
that see nothing come out as NaN, which is the worst that a library may do.
"""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

NAN = float("nan")


def dense(q, k, v, visible, scale):
    """(B, H, S, D) under (B, H, S, Skv); differentiable in all, lse too."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.float() @ k.float().mT * scale).masked_fill(~visible, -math.inf)
    seen = visible.any(-1)
    scores = scores.masked_fill(~seen[..., None], 0.0)
    out, lse = scores.softmax(-1) @ v.float(), scores.logsumexp(-1)
    return out.masked_fill(~seen[..., None], NAN).to(q.dtype), lse.masked_fill(~seen, NAN)


def turned(x):
    return x.transpose(1, 2)


class Calls(list):
    """What was called, in order: (name, arguments by name)."""

    def of(self, name):
        return [arguments for called, arguments in self if called == name]


def cudnn(calls):
    """cudnn.flex_attention of nvidia-cudnn-frontend 1.32."""

    def create_mask_plan(
        mask_func,
        q,
        k,
        v,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        pack_gqa=None,
        build_backward=None,
    ):
        calls.append(("create_mask_plan", {"mask_func": mask_func, "q": q, "k": k, "build_backward": build_backward}))
        batch, q_len, heads, _ = q.shape
        kv_len = k.shape[1]
        assert mask_func.dtype == torch.int32 and mask_func.is_contiguous()
        assert mask_func.shape[0] in (1, heads) and mask_func.shape[1] % 2 == 1
        assert mask_func.shape[2] == batch * q_len
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        visible = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                for row in range(q_len):
                    ends = [0, *mask_func[h if mask_func.shape[0] > 1 else 0, :, b * q_len + row].tolist()]
                    for start, stop in zip(ends[::2], ends[1::2], strict=True):
                        visible[b, h, row, start : max(start, stop)] = True
        return SimpleNamespace(visible=visible, backward=build_backward, shapes=(q.shape, k.shape, v.shape, q.dtype))

    def flex_attn_func(
        q, k, v, *, mask_plan, softmax_scale=None, deterministic=False, return_lse=False, return_max_logit=False
    ):
        calls.append(("flex_attn_func", {"scale": softmax_scale, "deterministic": deterministic, "lse": return_lse}))
        assert mask_plan.shapes == (q.shape, k.shape, v.shape, q.dtype)
        assert mask_plan.backward or not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        out, lse = dense(turned(q), turned(k), turned(v), mask_plan.visible, softmax_scale)
        return turned(out), lse

    return {"cudnn": {}, "cudnn.flex_attention": locals()}


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def tiles(lists, shape, along_rows):
    """The pairs in partial tiles and in full ones: (B, H, S, Skv) each."""
    batch, heads = shape[:2]
    found = []
    rows, columns = lists.block_size
    for count, index in (
        (lists.mask_block_cnt, lists.mask_block_idx),
        (lists.full_block_cnt, lists.full_block_idx),
    ):
        assert count.dtype == index.dtype == torch.int32
        pairs = torch.zeros(shape, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                own = min(b, count.shape[0] - 1), min(h, count.shape[1] - 1)
                for line in range(count.shape[2]):
                    for other in index[own][line, : count[own][line]].tolist():
                        i, j = (line, other) if along_rows else (other, line)
                        pairs[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
        found.append(pairs)
    return found


def fa4(calls):
    """flash_attn.cute of flash-attn-4 4.0.0b36; the function is a plain one of this process: see `stand_in_cute`."""

    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        calls.append(
            (
                "flash_attn_func",
                {
                    "scale": softmax_scale,
                    "causal": causal,
                    "window": window_size,
                    "deterministic": deterministic,
                    "lse": return_lse,
                    "forward": block_sparse_tensors,
                    "backward": block_sparse_tensors_bwd,
                    "aux_tensors": aux_tensors,
                    "aux_scalars": aux_scalars,
                },
            )
        )
        shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        b, h, row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        mask = mask_mod(b, h, row, column, aux_tensors, aux_scalars)
        partial, full = tiles(block_sparse_tensors, shape, True)
        visible = full | (partial & mask)
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        assert learning == (block_sparse_tensors_bwd is not None)
        if learning:
            partial, full = tiles(block_sparse_tensors_bwd, shape, False)
            assert torch.equal(full | (partial & mask), visible)
        out, lse = dense(turned(q), turned(k), turned(v), visible, softmax_scale)
        return turned(out), lse

    return {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
    }


def magi(calls):
    """magi_attention.functional.flex_flash_attn of MagiAttention 1.1."""

    class WithoutLse(torch.autograd.Function):
        """lse, whose gradient goes nowhere."""

        @staticmethod
        def forward(ctx, lse):
            return lse.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    def flex_flash_attn_func(
        q,
        k,
        v,
        q_ranges=None,
        k_ranges=None,
        attn_type_map=None,
        *,
        sink=None,
        softmax_scale=None,
        softcap=0.0,
        deterministic=False,
    ):
        calls.append(
            (
                "flex_flash_attn_func",
                {
                    "q_ranges": q_ranges,
                    "k_ranges": k_ranges,
                    "types": attn_type_map,
                    "scale": softmax_scale,
                    "deterministic": deterministic,
                },
            )
        )
        assert q_ranges.dtype == k_ranges.dtype == attn_type_map.dtype == torch.int32
        count = torch.zeros(len(q), len(k), dtype=torch.int64)
        for (q0, q1), (k0, k1), kind in zip(q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True):
            for i in range(q0, q1):
                for j in range(k0, k1):
                    causal = kind not in (1, 3) or k1 - j >= q1 - i
                    inverse = kind not in (2, 3) or j - k0 >= i - q0
                    count[i, j] += causal and inverse
        assert bool((count <= 1).all())
        visible = (count > 0).expand(1, q.shape[1], -1, -1)
        out, lse = dense(*(turned(x[None]) for x in (q, k, v)), visible, softmax_scale)
        return turned(out)[0], SimpleNamespace(lse=WithoutLse.apply(lse[0].mT), max_logits=None)

    name = "magi_attention.functional"
    return {"magi_attention": {}, name: {}, f"{name}.flex_flash_attn": {"flex_flash_attn_func": flex_flash_attn_func}}


def flashinfer(calls):
    """flashinfer 0.7.4: its block-sparse wrapper."""

    class BlockSparseAttentionWrapper:
        def __init__(self, float_workspace_buffer, backend="auto"):
            calls.append(("wrapper", {"workspace": float_workspace_buffer, "backend": backend}))

        def plan(
            self,
            indptr,
            indices,
            M,
            N,
            R,
            C,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            mask=None,
            packed_mask=None,
            causal=False,
            pos_encoding_mode="NONE",
            use_fp16_qk_reduction=False,
            logits_soft_cap=None,
            sm_scale=None,
            rope_scale=None,
            rope_theta=None,
            q_data_type="float16",
            kv_data_type=None,
            o_data_type="float16",
            non_blocking=True,
        ):
            calls.append(
                (
                    "plan",
                    {
                        "indptr": indptr,
                        "indices": indices,
                        "sizes": (M, N, R, C, num_qo_heads, num_kv_heads, head_dim),
                        "dtypes": (q_data_type, kv_data_type, o_data_type),
                        "scale": sm_scale,
                        "mask": mask,
                    },
                )
            )
            assert N % C == 0
            self.sizes, self.scale = (M, N, num_qo_heads, num_kv_heads, head_dim), sm_scale
            self.visible = torch.zeros(M, N, dtype=torch.bool)
            for line in range(len(indptr) - 1):
                for place in range(int(indptr[line]), int(indptr[line + 1])):
                    rows = min(R, M - line * R)
                    block = torch.ones(R, C, dtype=torch.bool) if mask is None else mask[place]
                    j = int(indices[place])
                    self.visible[line * R : line * R + rows, j * C : (j + 1) * C] = block[:rows]

        def run(self, q, k, v, *, return_lse=False):
            calls.append(("run", {"lse": return_lse}))
            M, N, heads, kv_heads, dim = self.sizes
            assert q.shape == (M, heads, dim) and k.shape == v.shape == (N, kv_heads, dim)
            visible = self.visible.expand(1, heads, M, N)
            out, lse = dense(*(turned(x[None]) for x in (q, k, v)), visible, self.scale)
            return turned(out)[0], lse[0].mT / math.log(2)

    return {"flashinfer": {"BlockSparseAttentionWrapper": BlockSparseAttentionWrapper}}


FAKES = {"cudnn": cudnn, "fa4": fa4, "magi": magi, "flashinfer": flashinfer}


def install(name, patch):
    """Put an engine's library where imports find it; what it is called with."""
    calls = Calls()
    for path, contents in FAKES[name](calls).items():
        module = ModuleType(path)
        module.__spec__ = ModuleSpec(path, None, is_package=True)
        module.__path__ = []
        for key, value in contents.items():
            setattr(module, key, value)
        patch.setitem(sys.modules, path, module)
    return calls
