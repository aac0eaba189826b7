"""Backward kernels whose warps have roles, in Gluon -> compiled for sm_90, to see what such a backward would gain.

    dkdv    a program holds 128 keys and values; queries and dOut come through the rings
    dq      a program holds 128 queries and dOut; keys and values come through the rings

The steps are those of FlashAttention-2 (Dao, 2023, algorithm 2), without a mask. None of them has been run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from benchmarks.sass.specialised import OWN, hold, make_rings, produce, store


@gluon.jit
def _of_keys(
    tensors, rings, barriers, numbers,
    WHO: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_tiles, v_tiles, lse, delta, dk, dv = tensors
    count, scale = numbers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    q_ring, dout_ring = rings
    q_full, q_empty, dout_full, dout_empty = barriers
    k_tile, v_tile = k_tiles.index(WHO), v_tiles.index(WHO)
    acc_k, acc_v = gl.zeros([ROWS, D], gl.float32, ACC), gl.zeros([ROWS, D], gl.float32, ACC)
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    rows = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    for step in range(count):
        slot, parity = step % STAGES, step // STAGES & 1
        row_lse, row_delta = gl.load(lse + step * BLOCK + rows), gl.load(delta + step * BLOCK + rows)
        mbarrier.wait(q_full.index(slot), parity)
        scores = warpgroup_mma(k_tile, q_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
        mbarrier.wait(dout_full.index(slot), parity)
        dp = warpgroup_mma(v_tile, dout_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        p = gl.exp2(scores * scale - row_lse[None, :])
        weights = gl.convert_layout(p.to(gl.bfloat16), LEFT)
        acc_v = warpgroup_mma(weights, dout_ring.index(slot), acc_v, is_async=True)
        dp = warpgroup_mma_wait(1, [dp])
        ds = gl.convert_layout((p * (dp - row_delta[None, :])).to(gl.bfloat16), LEFT)
        acc_k = warpgroup_mma(ds, q_ring.index(slot), acc_k, is_async=True)
        acc_v, weights = warpgroup_mma_wait(1, [acc_v, weights])
        mbarrier.arrive(dout_empty.index(slot), count=1)
        acc_k, ds = warpgroup_mma_wait(0, [acc_k, ds])
        mbarrier.arrive(q_empty.index(slot), count=1)
    store(dk, acc_k * scale, WHO, ROWS, D, ACC)
    store(dv, acc_v, WHO, ROWS, D, ACC)


@gluon.jit
def dkdv(
    held, held_too, first, second, lse, delta, dk, dv, scale, count,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of 128 keys and their values: `held` are keys, `held_too` values, `first` queries, `second` dOut."""
    rings, barriers = make_rings(first, second, STAGES)
    k_tiles, v_tiles = hold(held, OWN, D), hold(held_too, OWN, D)
    tensors, numbers = (k_tiles, v_tiles, lse, delta, dk, dv), (count, scale)
    gl.warp_specialize(
        [
            (_of_keys, (tensors, rings, barriers, numbers, 0, OWN, BLOCK, D, STAGES)),
            (_of_keys, (tensors, rings, barriers, numbers, 1, OWN, BLOCK, D, STAGES)),
            (produce, (first, second, rings, barriers, count, BLOCK, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _of_queries(
    tensors, rings, barriers, numbers,
    WHO: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles, dout_tiles, lse, delta, dq = tensors
    count, scale = numbers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    q_tile, dout_tile = q_tiles.index(WHO), dout_tiles.index(WHO)
    acc, zeros = gl.zeros([ROWS, D], gl.float32, ACC), gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    rows = (gl.program_id(0) * 2 + WHO) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    row_lse, row_delta = gl.load(lse + rows), gl.load(delta + rows)
    for step in range(count):
        slot, parity = step % STAGES, step // STAGES & 1
        mbarrier.wait(k_full.index(slot), parity)
        scores = warpgroup_mma(q_tile, k_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(slot), parity)
        dp = warpgroup_mma(dout_tile, v_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        p = gl.exp2(scores * scale - row_lse[:, None])
        dp = warpgroup_mma_wait(0, [dp])
        mbarrier.arrive(v_empty.index(slot), count=1)
        ds = gl.convert_layout((p * (dp - row_delta[:, None])).to(gl.bfloat16), LEFT)
        acc = warpgroup_mma_wait(0, [warpgroup_mma(ds, k_ring.index(slot), acc, is_async=True)])
        mbarrier.arrive(k_empty.index(slot), count=1)
    store(dq, acc * scale, WHO, ROWS, D, ACC)


@gluon.jit
def dq(
    held, held_too, first, second, lse, delta, dq, scale, count,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of 128 queries: `held` are queries, `held_too` dOut, `first` keys, `second` values."""
    rings, barriers = make_rings(first, second, STAGES)
    q_tiles, dout_tiles = hold(held, OWN, D), hold(held_too, OWN, D)
    tensors, numbers = (q_tiles, dout_tiles, lse, delta, dq), (count, scale)
    gl.warp_specialize(
        [
            (_of_queries, (tensors, rings, barriers, numbers, 0, OWN, BLOCK, D, STAGES)),
            (_of_queries, (tensors, rings, barriers, numbers, 1, OWN, BLOCK, D, STAGES)),
            (produce, (first, second, rings, barriers, count, BLOCK, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
