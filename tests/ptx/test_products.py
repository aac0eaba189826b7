"""Products of warps and of warpgroups, from registers and swizzled shared memory; and what must come between them."""

import numpy as np
import pytest

from tests.ptx import values as on
from tests.ptx.eight_bits import e4m3_bits
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.snippets import launch, value_of

RNG = np.random.default_rng(0)


def whole(*shape):
    """Small whole numbers: every product and sum of them is exact."""
    return RNG.integers(-4, 5, shape).astype(np.float64)


def halves(matrix, kind):
    return e4m3_bits(matrix) if kind == "e4m3" else on.encode(matrix, kind)


def size_of(kind):
    return {"e4m3": 1, "tf32": 4}.get(kind, 2)


def fragments(matrix, kind):
    """(rows, columns) -> a register for each 8 rows of 16 bytes, columns after rows: (parts, 32 lanes)."""
    wide = 16 // size_of(kind)
    rows, columns = matrix.shape
    parts = matrix.reshape(rows // 8, 8, columns // wide, wide).transpose(2, 0, 1, 3)
    words = halves(parts, kind).copy().view(np.uint32) if kind != "tf32" else parts.astype(np.float32).view(np.uint32)
    return words.reshape(-1, 32)


def result(registers):
    """(registers, lanes) of sums -> (16 * warps, N)."""
    warps = registers.shape[1] // 32
    parts = registers.view(np.float32).reshape(-1, 2, 2, warps, 8, 4)  # column part, lower, one, warp, row, pair
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(16 * warps, -1)


@pytest.mark.parametrize(
    ("kind", "shape"), [("e4m3", "m16n8k32"), ("f16", "m16n8k16"), ("bf16", "m16n8k16"), ("tf32", "m16n8k8")]
)
def test_a_warp_multiplies_registers(kind, shape):
    depth = int(shape.rsplit("k", 1)[1])
    a, b, c = whole(16, depth), whole(8, depth), whole(16, 8)
    sums = c.astype(np.float32).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32).copy().view(np.uint32)
    out, given = np.zeros((4, 32), np.uint32), np.concatenate([fragments(a, kind), fragments(b, kind), sums])
    load = [f"ld.global.b32 %r{n + 1}, [%rd3 + {128 * n}];" for n in range(10)]
    name = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
    product = f"{name} {{%r20, %r21, %r22, %r23}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};"
    store = [f"st.global.b32 [%rd5 + {128 * n}], %r{20 + n};" for n in range(4)]
    start = ["ld.param.b64 %rd1, [p0];", "mov.u32 %r30, %tid.x;", "mul.wide.u32 %rd2, %r30, 4;"]
    start += ["add.s64 %rd3, %rd1, %rd2;", "ld.param.b64 %rd4, [p1];", "add.s64 %rd5, %rd4, %rd2;"]
    launch([*start, *load, product, *store], given, out)
    assert np.array_equal(result(out), a @ b.T + c)


def swizzled(matrix, kind, line):
    """Rows in lines of `line` bytes, in parts of 8 lines; 16 bytes of a line stand at their number xor the line's."""
    size = size_of(kind)
    bits = halves(matrix, kind) if kind != "tf32" else matrix.astype(np.float32).view(np.uint32)
    rows, columns = matrix.shape
    wide, out = line // size, np.zeros(rows * columns * size, np.uint8)
    for row in range(rows):
        for column in range(0, columns, 16 // size):
            panel, inside = divmod(column, wide)
            start = panel * rows * line + row * line + inside * size
            start ^= (start // 128 & (line // 16 - 1)) << 4
            out[start : start + 16] = bits[row, column : column + 16 // size].copy().view(np.uint8)
    return out


def descriptor(start, leading, stride, line):
    mode = {128: 1, 64: 2, 32: 3}[line]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


FENCED = ["bar.sync 0;", "fence.proxy.async.shared::cta;", "wgmma.fence.sync.aligned;"]
DONE = ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]


def product(kind, columns, a, b, keep=0, turns=(0, 0)):
    """One wgmma on 64 rows into %r100 on."""
    depth = 32 // size_of(kind)
    sums = ", ".join(f"%r{100 + n}" for n in range(columns // 2))
    flags = "" if kind in ("e4m3", "tf32") else f", {turns[1]}" if a.startswith("{") else f", {turns[0]}, {turns[1]}"
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"
    return f"{name} {{{sums}}}, {a}, {b}, {keep}, 1, 1{flags};"


def multiplied(image, columns, lines, registers=()):
    """Run lines after `image` has been put into shared memory; 128 threads, sums in %r100 on -> (64, columns)."""
    image = np.concatenate([image, np.zeros(-len(image) % 2048, np.uint8)]).view(np.uint32)
    out, given = np.zeros((columns // 2, 128), np.uint32), np.array([*registers, np.zeros(128, np.uint32)])
    body = ["ld.param.b64 %rd1, [p0];", "mov.u32 %r1, %tid.x;", "mul.wide.u32 %rd2, %r1, 4;"]
    body += [
        "add.s64 %rd3, %rd1, %rd2;",
        "ld.param.b64 %rd4, [p1];",
        "add.s64 %rd5, %rd4, %rd2;",
        "shl.b32 %r2, %r1, 2;",
    ]
    body += ["ld.param.b64 %rd6, [p2];", "add.s64 %rd7, %rd6, %rd2;"]
    for n in range(len(image) // 128):
        body += [f"ld.global.b32 %r3, [%rd3 + {512 * n}];", f"st.shared.b32 [%r2 + {512 * n}], %r3;"]
    body += [f"ld.global.b32 %r{10 + n}, [%rd7 + {512 * n}];" for n in range(len(registers))]
    body += [f"mov.b32 %r{100 + n}, 0;" for n in range(columns // 2)]
    store = [f"st.global.b32 [%rd5 + {512 * n}], %r{100 + n};" for n in range(columns // 2)]
    launch([*body, *lines, *store], image, out, given, threads=128, shared=image.nbytes)
    return result(out)


@pytest.mark.parametrize(
    ("kind", "line"),
    [("f16", 128), ("bf16", 128), ("bf16", 64), ("f16", 32), ("tf32", 128), ("e4m3", 128), ("e4m3", 64)],
)
def test_a_warpgroup_multiplies_what_lies_in_shared_memory(kind, line):
    depth, columns = 32 // size_of(kind), 24
    wide = line // size_of(kind)
    a, b = whole(64, wide), whole(columns, wide)
    image = np.concatenate([swizzled(a, kind, line), swizzled(b, kind, line)])
    lines = list(FENCED)
    for step in range(wide // depth):
        first, second = (descriptor(at + 32 * step, 16, 8 * line, line) for at in (0, 64 * line))
        lines += [f"mov.b64 %rd10, {first};", f"mov.b64 %rd11, {second};", product(kind, columns, "%rd10", "%rd11", 1)]
    assert np.array_equal(multiplied(image, columns, [*lines, *DONE]), a @ b.T)


def test_operands_may_be_turned():
    """a as (k, rows), b as (k, columns): panels of 64 elements, 16 lines each."""
    a, b = whole(16, 64), whole(16, 128)
    image = np.concatenate([swizzled(a, "bf16", 128), swizzled(b, "bf16", 128)])
    first, second = descriptor(0, 2048, 1024, 128), descriptor(2048, 2048, 1024, 128)
    lines = [f"mov.b64 %rd10, {first};", f"mov.b64 %rd11, {second};", *FENCED]
    found = multiplied(image, 128, [*lines, product("bf16", 128, "%rd10", "%rd11", 0, (1, 1)), *DONE])
    assert np.array_equal(found, a.T @ b)


A, B = whole(64, 16), whole(8, 64)
IMAGE = swizzled(B, "f16", 128)
HELD = "{%r10, %r11, %r12, %r13}"  # a, in registers
SECOND = [f"mov.b64 %rd11, {descriptor(0, 16, 1024, 128)};"]
INPUTS = np.concatenate([fragments(A[16 * w : 16 * w + 16], "f16") for w in range(4)], 1)
ONE = product("f16", 8, HELD, "%rd11", 0)
MORE = product("f16", 8, HELD, "%rd11", 1)


def test_the_left_operand_may_be_in_registers():
    assert np.array_equal(multiplied(IMAGE, 8, [*SECOND, *FENCED, ONE, *DONE], INPUTS), A @ B[:, :16].T)
    found = multiplied(IMAGE, 8, [*SECOND, *FENCED, ONE, MORE, MORE, *DONE], INPUTS)
    assert np.array_equal(found, 3 * A @ B[:, :16].T)


BARRIER, PROXY, FENCE = FENCED
COMMIT, WAIT = DONE
USE = "add.f32 %r100, %r100, %r100;"
STORE = "st.shared.b32 [%r2], %r1;"


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("shared race", [PROXY, FENCE, ONE, *DONE]),
        ("shared proxy", [BARRIER, FENCE, ONE, *DONE]),
        ("wgmma fence", [BARRIER, PROXY, ONE, *DONE]),
        ("wgmma fence", [*FENCED, ONE, *DONE, USE, ONE, *DONE]),
        ("wgmma fence", [*FENCED, "add.s32 %r10, %r10, 1;", ONE, *DONE]),
        ("wgmma registers", [*FENCED, ONE, USE]),
        ("wgmma registers", [*FENCED, ONE, COMMIT, USE]),
        ("wgmma registers", [*FENCED, ONE, WAIT, USE]),  # not committed
        ("wgmma registers", [*FENCED, ONE, COMMIT, "wgmma.wait_group.sync.aligned 1;", USE]),
        ("wgmma registers", [*FENCED, ONE, COMMIT, "mov.b32 %r10, 0;"]),
        ("shared in flight", [*FENCED, ONE, COMMIT, STORE]),
        ("shared race", [*FENCED, ONE, *DONE, STORE]),
        ("wgmma descriptor", ["cvt.u64.u32 %rd11, %r1;", *FENCED, ONE]),
        ("shared bounds", [f"mov.b64 %rd11, {descriptor(1 << 14, 16, 1024, 128)};", *FENCED, ONE]),
    ],
)
def test_what_must_come_between(kind, lines):
    with pytest.raises(Fault) as caught:
        multiplied(IMAGE[:1024], 8, [*SECOND, *lines], INPUTS)
    assert caught.value.kind == kind


def test_what_comes_between_is_enough():
    again = [*FENCED, ONE, COMMIT, "wgmma.wait_group.sync.aligned 0;", USE, FENCE, ONE, *DONE, BARRIER, STORE]
    assert np.array_equal(multiplied(IMAGE, 8, [*SECOND, *again], INPUTS), A @ B[:, :16].T)


@pytest.mark.parametrize(
    "line",
    [
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0}, {%r1}, {%r2}, {%r3};",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e5m2 {%r0}, %rd1, %rd2, 0, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r0,%r1,%r2,%r3}, %rd1, %rd2, 0, -1, 1, 0, 0;",
    ],
)
def test_what_is_unknown_is_named(line):
    with pytest.raises(Unsupported, match=line.split()[0].replace(".", r"\.")):
        value_of(line)
