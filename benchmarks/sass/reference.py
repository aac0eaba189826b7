"""Kernels whose speed is known -> compiled for sm_90: what the model is held against.

They are written after what is published of each: the same steps in each turn of the loop, with the same tile. What
happens before and after the loop is left out as far as the compiler lets it. Figures are of bfloat16, head dim 128 and
8,192 tokens without a mask, on an H100 SXM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.sass.specialised import compile_specialised, forward
from maskflash.backends.triton.tiles import Tile

DIM: Final = 128


@dataclass(frozen=True, slots=True)
class Reference:
    """A kernel beside its known speed.

    Attributes:
        name: whose steps these are.
        known: TFLOP/s as published; None of a pass that was only timed together with others.
        kernel: the steps.
        tile: as published.
        tma: whether tiles come by bulk copies.
        overlap: of a kernel whose warps have roles, whether a softmax runs beside a product of the same warpgroup.
        use: what the figure was used for.
    """

    name: str
    known: int | None
    kernel: Any
    tile: Tile
    tma: bool = False
    overlap: bool | None = None
    use: str = "test"

    def compile(self) -> Any:
        """What Triton's compiler makes of it."""
        if self.overlap is not None:
            return compile_specialised(self.kernel, self.tile, DIM, walked=self.tile.block_n, OVERLAP=self.overlap)
        values = {"BLOCK_M": self.tile.block_m, "BLOCK_N": self.tile.block_n, "D": DIM}
        names = self.kernel.arg_names
        kinds = {name: _KINDS.get(name, "constexpr" if name in values else "*bf16") for name in names}
        constants = {(place,): values[name] for place, name in enumerate(names) if name in values}
        aligned = {(place,): [["tt.divisibility", 16]] for place, n in enumerate(names) if kinds[n] in _ALIGNED}
        source = ASTSource(self.kernel, kinds, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=self.tile.options)


_KINDS: Final = {"lse": "*fp32", "delta": "*fp32", "tiles": "*i32", "scale": "fp32", "length": "i32"}
_ALIGNED: Final = ("*bf16", "*fp32", "*i32", "i32")


@triton.jit
def _step(tiles, step, count, BLOCK: tl.constexpr):
    """FlexAttention's look-ups: from one step to the next, through tiles of 128 tokens."""
    steps: tl.constexpr = 128 // BLOCK
    tile = step // steps
    here, there = tl.load(tiles + tile), tl.load(tiles + tile + 1, mask=tile + 1 < count, other=0)
    return tl.where((step + 1) % steps == 0, (there - here) * 128 - (steps - 1) * BLOCK, BLOCK)


@triton.jit
def _scaled_twice(q, k, v, out, tiles, scale, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """FlexAttention's forward: scores times scale and times log2(e), guards of -inf, look-ups of the next tile."""
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q_tile = tl.load(q + rows[:, None] * D + dims[None, :])
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    columns = tl.load(tiles) * 128 + tl.arange(0, BLOCK_N)
    count = tl.load(tiles + tl.program_id(0))
    for step in range(count * (128 // BLOCK_N)):
        k_tile = tl.load(k + columns[None, :] * D + dims[:, None])
        scores = tl.dot(q_tile, k_tile) * scale * 1.4426950408889634
        m_new = tl.maximum(m, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, p = tl.exp2(m - m_safe), tl.exp2(scores - m_safe[:, None])
        total, acc, m = total * alpha + tl.sum(p, 1), acc * alpha[:, None], m_new
        v_tile = tl.load(v + columns[:, None] * D + dims[None, :])
        acc = tl.dot(p.to(tl.bfloat16), v_tile, acc)
        columns += _step(tiles, step, count, BLOCK_N)
    tl.store(out + rows[:, None] * D + dims[None, :], (acc / total[:, None]).to(tl.bfloat16))


@triton.jit
def _bulk_copies(q, k, v, out, scale, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """The forward of Triton's tutorial on Hopper: tensor descriptors, one multiply, no guards."""
    keys = tl.make_tensor_descriptor(k, [length, D], [D, 1], [BLOCK_N, D])
    values = tl.make_tensor_descriptor(v, [length, D], [D, 1], [BLOCK_N, D])
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q_tile = tl.load(q + rows[:, None] * D + dims[None, :])
    m, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    scale = scale * 1.4426950408889634
    for first in range(0, length, BLOCK_N):
        scores = tl.dot(q_tile, keys.load([first, 0]).T)
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        p, alpha = tl.exp2(scores * scale - m_new[:, None]), tl.exp2(m - m_new)
        total, acc, m = total * alpha + tl.sum(p, 1), acc * alpha[:, None], m_new
        acc = tl.dot(p.to(tl.bfloat16), values.load([first, 0]), acc)
    tl.store(out + rows[:, None] * D + dims[None, :], (acc / total[:, None]).to(tl.bfloat16))


@triton.jit
def _for_keys(
    q, k, v, dout, dk, dv, lse, delta, tiles, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr
):
    """FlexAttention's dK and dV."""
    columns, dims = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    at = columns[:, None] * D + dims[None, :]
    k_tile, v_tile = tl.load(k + at), tl.load(v + at)
    acc_k, acc_v = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)
    rows = tl.load(tiles) * 128 + tl.arange(0, BLOCK_M)
    count = tl.load(tiles + tl.program_id(0))
    for step in range(count * (128 // BLOCK_M)):
        q_tile = tl.load(q + rows[:, None] * D + dims[None, :])
        p = tl.exp2(tl.dot(k_tile, q_tile.T) * scale - tl.load(lse + rows)[None, :])
        dout_tile = tl.load(dout + rows[:, None] * D + dims[None, :])
        acc_v = tl.dot(p.to(tl.bfloat16), dout_tile, acc_v)
        ds = p * (tl.dot(v_tile, dout_tile.T) - tl.load(delta + rows)[None, :])
        acc_k = tl.dot(ds.to(tl.bfloat16), q_tile, acc_k)
        rows += _step(tiles, step, count, BLOCK_M)
    tl.store(dk + at, (acc_k * scale).to(tl.bfloat16))
    tl.store(dv + at, acc_v.to(tl.bfloat16))


@triton.jit
def _for_queries(
    q, k, v, dout, dq, lse, delta, tiles, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr
):
    """FlexAttention's dQ."""
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    at = rows[:, None] * D + dims[None, :]
    q_tile, dout_tile = tl.load(q + at), tl.load(dout + at)
    row_lse, row_delta = tl.load(lse + rows), tl.load(delta + rows)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    columns = tl.load(tiles) * 128 + tl.arange(0, BLOCK_N)
    count = tl.load(tiles + tl.program_id(0))
    for step in range(count * (128 // BLOCK_N)):
        k_tile = tl.load(k + columns[:, None] * D + dims[None, :])
        v_tile = tl.load(v + columns[:, None] * D + dims[None, :])
        p = tl.exp2(tl.dot(q_tile, k_tile.T) * scale - row_lse[:, None])
        ds = p * (tl.dot(dout_tile, v_tile.T) - row_delta[:, None])
        acc = tl.dot(ds.to(tl.bfloat16), k_tile, acc)
        columns += _step(tiles, step, count, BLOCK_N)
    tl.store(dq + at, (acc * scale).to(tl.bfloat16))


ROLES: Final = Tile(128, 128, 12, 2, 240, 2)
# Published: FlexAttention's 384 forward and 283 backward, its tiles; the tutorial's 464, its best tile; in table 2 of
# FlashAttention-3, at 8,448 tokens in float16 and with steps of 176 keys, 582 without the overlap and 661 with it.
REFERENCES: Final = (
    Reference("FlexAttention, forward", 384, _scaled_twice, Tile(128, 64, 8, 3)),
    Reference(
        "Triton's tutorial, forward",
        464,
        _bulk_copies,
        Tile(128, 64, 4, 2),
        tma=True,
        use="copies' latency and bandwidth",
    ),
    Reference("FlexAttention, dK and dV", None, _for_keys, Tile(64, 128, 8, 3)),
    Reference("FlexAttention, dQ", None, _for_queries, Tile(128, 64, 8, 3)),
    Reference("FlashAttention-3's steps, one after another", 582, forward, ROLES, tma=True, overlap=False),
    Reference(
        "FlashAttention-3's steps, overlapped",
        661,
        forward,
        ROLES,
        tma=True,
        overlap=True,
        use="how early products queue",
    ),
)
BACKWARD: Final = 283  # of the last two together, which compute 14 products' worth for 10 that count
