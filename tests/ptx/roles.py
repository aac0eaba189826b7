"""Small kernels in Gluon whose warps have roles: a product, and a copy, whose tiles come and go by the copy engine.

loads     | wait empty 0 | expect, copy to 0 | wait empty 1 | expect, copy to 1 | wait empty 0 | ...
                                 |  full 0                       |  full 1         ^
products                         v wait full 0 | product of 0 |  v wait full 1 |   | arrive empty 0
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load_role(a_desc, b_desc, a_tiles, b_tiles, full, empty, depth, off_m, STEP: gl.constexpr, SLOTS: gl.constexpr):
    slot, phase = 0, 1
    for k in range(0, depth, STEP):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(a_desc, [off_m, k], full.index(slot), a_tiles.index(slot))
        tma.async_copy_global_to_shared(b_desc, [k, 0], full.index(slot), b_tiles.index(slot))
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1


@gluon.jit
def _product_role(c_desc, a_tiles, b_tiles, full, empty, depth, off_m, STEP: gl.constexpr, SLOTS: gl.constexpr):
    M: gl.constexpr = c_desc.block_type.shape[0]
    N: gl.constexpr = c_desc.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    sums = gl.zeros([M, N], gl.float32, layout)
    slot, phase = 0, 0
    for _ in range(0, depth, STEP):
        mbarrier.wait(full.index(slot), phase)
        sums = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index(slot), count=1)
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1
    out = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)
    out.store(sums.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [off_m, 0], out)
    tma.store_wait(0)


@gluon.jit
def product(a_desc, b_desc, c_desc, depth, STEP: gl.constexpr, SLOTS: gl.constexpr):
    """c = a b: a (M, depth), b (depth, N); a block for each tile of rows, one role that loads, one that multiplies."""
    M: gl.constexpr = c_desc.block_type.shape[0]
    N: gl.constexpr = c_desc.block_type.shape[1]
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [SLOTS, M, STEP], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [SLOTS, STEP, N], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    off_m = gl.program_id(0) * M
    gl.warp_specialize(
        [
            (_product_role, (c_desc, a_tiles, b_tiles, full, empty, depth, off_m, STEP, SLOTS)),
            (_load_role, (a_desc, b_desc, a_tiles, b_tiles, full, empty, depth, off_m, STEP, SLOTS)),
        ],
        [1],
        [24],
    )


@gluon.jit
def copy_ring(source, target, rows, SLOTS: gl.constexpr):
    """target = source, tile after tile through a ring in shared memory: one role, which loads some tiles ahead."""
    M: gl.constexpr = source.block_type.shape[0]
    tiles = gl.allocate_shared_memory(source.dtype, [SLOTS, M, source.block_type.shape[1]], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    for slot in gl.static_range(SLOTS):
        mbarrier.expect(full.index(slot), source.block_type.nbytes)
        tma.async_copy_global_to_shared(source, [slot * M, 0], full.index(slot), tiles.index(slot))
    slot, phase = 0, 0
    for row in range(0, rows, M):
        mbarrier.wait(full.index(slot), phase)
        tma.async_copy_shared_to_global(target, [row, 0], tiles.index(slot))
        tma.store_wait(0)
        mbarrier.expect(full.index(slot), source.block_type.nbytes)
        tma.async_copy_global_to_shared(source, [row + SLOTS * M, 0], full.index(slot), tiles.index(slot))
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1
    for _ in gl.static_range(SLOTS):  # loads from beyond the last row, of zeros: a block may not end before them
        mbarrier.wait(full.index(slot), phase)
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1
    for slot in gl.static_range(SLOTS):
        mbarrier.invalidate(full.index(slot))
