"""A forward whose warps have roles, in Gluon -> compiled for sm_90: what the model of such kernels is held against.

    producer    one warp     two tensors, tile by tile, into rings of STAGES slots
    consumers   2 x 4 warps  64 rows each of what the program holds

The forward has the steps of FlashAttention-3 (Shah et al., 2024): algorithm 1, or with OVERLAP algorithm 2, where a
softmax runs beside the same warpgroup's last product. It has not been run.
"""

from __future__ import annotations

from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from maskflash.backends.triton.tiles import Tile

OWN: Final = gl.constexpr(64)  # of a consumer


def compile_specialised(kernel: Any, tile: Tile, dim: int, *, walked: int, **constants: Any) -> Any:
    """What Triton's compiler makes of one of the kernels below.

    Args:
        kernel: of this module.
        tile: its stages are those of each ring, its registers those of a consumer's thread.
        dim: head dim.
        walked: tokens of a step.
        constants: further ones that the kernel has.
    """
    names = kernel.arg_names
    values = {"BLOCK": walked, "D": dim, "STAGES": tile.stages, "REGISTERS": tile.registers, **constants}
    kinds = {name: "constexpr" if name in values else _KINDS.get(name, "*bf16") for name in names}
    kinds |= {
        "held": _descriptor(OWN.value, dim),
        "first": _descriptor(walked, dim),
        "second": _descriptor(walked, dim),
    }
    fixed = {(names.index(name),): value for name, value in values.items()}
    aligned = {(place,): [["tt.divisibility", 16]] for place, n in enumerate(names) if kinds[n].startswith("*")}
    source = GluonASTSource(kernel, kinds, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


_KINDS: Final = {"scale": "fp32", "count": "i32"}


def _descriptor(rows: int, dim: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, dim], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {dim}],{layout!r}>"


@gluon.jit
def produce(first, second, rings, barriers, count, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """Copy tiles of two tensors, each as soon as its slot is empty."""
    first_ring, second_ring = rings
    first_full, first_empty, second_full, second_empty = barriers
    for step in range(count):
        slot, parity = step % STAGES, step // STAGES & 1
        mbarrier.wait(first_empty.index(slot), parity ^ 1)
        mbarrier.expect(first_full.index(slot), first.block_type.nbytes)
        tma.async_copy_global_to_shared(first, [step * BLOCK, 0], first_full.index(slot), first_ring.index(slot))
        mbarrier.wait(second_empty.index(slot), parity ^ 1)
        mbarrier.expect(second_full.index(slot), second.block_type.nbytes)
        tma.async_copy_global_to_shared(second, [step * BLOCK, 0], second_full.index(slot), second_ring.index(slot))


@gluon.jit
def make_rings(first, second, STAGES: gl.constexpr):
    """Slots of both tensors, and for each a barrier that says that it is full, and one that it is empty."""
    first_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + first.block_type.shape, first.layout)  # noqa: RUF005 (Gluon unpacks nothing)
    second_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + second.block_type.shape, second.layout)  # noqa: RUF005
    first_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    first_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    second_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    second_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(first_full.index(slot), count=1)
        mbarrier.init(first_empty.index(slot), count=2)
        mbarrier.init(second_full.index(slot), count=1)
        mbarrier.init(second_empty.index(slot), count=2)
    return (first_ring, second_ring), (first_full, first_empty, second_full, second_empty)


@gluon.jit
def hold(held, ROWS: gl.constexpr, D: gl.constexpr):
    """The rows of both consumers, copied before anything else."""
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], held.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    mbarrier.expect(full, 2 * held.block_type.nbytes)
    for who in gl.static_range(2):
        tma.async_copy_global_to_shared(held, [(gl.program_id(0) * 2 + who) * ROWS, 0], full, tiles.index(who))
    mbarrier.wait(full, 0)
    return tiles


@gluon.jit
def store(out, acc, WHO: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, ACC: gl.constexpr):
    rows = (gl.program_id(0) * 2 + WHO) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    gl.store(out + rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, ACC))[None, :], acc.to(gl.bfloat16))


@gluon.jit
def _softmax(scores, m, total, scale, LEFT: gl.constexpr):
    """New maximum, factor of what there was, new sum, and probabilities as the operand of a product."""
    m_new = gl.maximum(m, gl.max(scores, 1) * scale)
    alpha, p = gl.exp2(m - m_new), gl.exp2(scores * scale - m_new[:, None])
    return m_new, alpha, total * alpha + gl.sum(p, 1), gl.convert_layout(p.to(gl.bfloat16), LEFT)


@gluon.jit
def _attend(
    q_tiles, rings, barriers, out, count, scale,
    WHO: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    q_tile = q_tiles.index(WHO)
    m = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc, zeros = gl.zeros([ROWS, D], gl.float32, ACC), gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    if OVERLAP:
        mbarrier.wait(k_full.index(0), 0)
        scores = warpgroup_mma(q_tile, k_ring.index(0).permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(0), count=1)
        m, alpha, total, p = _softmax(scores, m, total, scale, LEFT)
        mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=count > 1)
        for step in range(1, count):
            slot, before = step % STAGES, (step - 1) % STAGES
            scores = warpgroup_mma(q_tile, k_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_ring.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            mbarrier.arrive(k_empty.index(slot), count=1)
            m, alpha, total, after = _softmax(scores, m, total, scale, LEFT)
            # Waiting for the next keys here ends the basic block: ptxas moves the next wait up to its start.
            mbarrier.wait(k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=step + 1 < count)
            acc, p = warpgroup_mma_wait(0, [acc, p])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
            p = after
        slot = (count - 1) % STAGES
        mbarrier.wait(v_full.index(slot), (count - 1) // STAGES & 1)
        acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)])
    else:
        for step in range(count):
            slot, parity = step % STAGES, step // STAGES & 1
            mbarrier.wait(k_full.index(slot), parity)
            scores = warpgroup_mma(q_tile, k_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(k_empty.index(slot), count=1)
            m, alpha, total, p = _softmax(scores, m, total, scale, LEFT)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
            mbarrier.wait(v_full.index(slot), parity)
            acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)])
            mbarrier.arrive(v_empty.index(slot), count=1)
    store(out, acc / gl.convert_layout(total, gl.SliceLayout(1, ACC))[:, None], WHO, ROWS, D, ACC)


@gluon.jit
def forward(
    held, first, second, out, scale, count,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Outputs of 128 queries: `held` are queries, `first` keys, `second` values."""
    rings, barriers = make_rings(first, second, STAGES)
    tiles = hold(held, OWN, D)
    gl.warp_specialize(
        [
            (_attend, (tiles, rings, barriers, out, count, scale, 0, OWN, BLOCK, D, STAGES, OVERLAP)),
            (_attend, (tiles, rings, barriers, out, count, scale, 1, OWN, BLOCK, D, STAGES, OVERLAP)),
            (produce, (first, second, rings, barriers, count, BLOCK, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
