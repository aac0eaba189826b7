"""Loads, stores, copies and matrices move what they should, and what they must not do is a fault."""

import numpy as np
import pytest

from tests.ptx.faults import Fault, Unsupported
from tests.ptx.snippets import buffer, kernel, launch, value_of

WORDS = np.arange(64, dtype=np.uint32) * 0x01010101
START = ["ld.param.b64 %rd1, [p0];", "mov.u32 %r1, %tid.x;"]  # the first tensor's address; the thread's number
EACH = [*START, "mul.wide.u32 %rd2, %r1, 4;", "add.s64 %rd3, %rd1, %rd2;", "shl.b32 %r2, %r1, 2;"]  # 4 bytes each
SHARED = [*EACH, "mov.b32 %r3, global_smem;", "add.s32 %r3, %r3, %r2;"]


def fault(kind, lines, *arrays, **options):
    """The fault of this kind that a snippet ends with."""
    with pytest.raises(Fault) as caught:
        launch(lines, *arrays, **options)
    assert caught.value.kind == kind, caught.value
    assert "PTX line" in str(caught.value) or kind == "global unwritten"
    return str(caught.value)


# Global memory


def test_vectors_are_loaded_and_stored():
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    vectors = ["ld.param.b64 %rd4, [p1];", "mul.wide.u32 %rd2, %r1, 16;", "add.s64 %rd3, %rd1, %rd2;"]
    move = ["ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd3 + 0];", "add.s64 %rd4, %rd4, %rd2;"]
    store = ["st.global.v2.b32 [%rd4], {%r7, %r6};", "st.global.v2.b32 [%rd4 + 8], {%r5, %r4};"]
    launch([*START, *vectors, *move, *store], source, target)
    assert np.array_equal(target.reshape(-1, 4), source.reshape(-1, 4)[:, ::-1])


@pytest.mark.parametrize(("kind", "expected"), [("u8", 0xFE), ("s8", 0xFFFFFFFE), ("u16", 0xFFFE), ("b32", 0xFFFFFFFE)])
def test_small_numbers_are_extended(kind, expected):
    array, out = np.full(32, 0xFFFFFFFE, np.uint32), np.zeros(32, np.uint32)
    body = [f"ld.global.{kind} %r4, [%rd3];", "ld.param.b64 %rd5, [p1];", "add.s64 %rd5, %rd5, %rd2;"]
    launch([*EACH, *body, "st.global.b32 [%rd5], %r4;"], array, out)
    assert (out == expected).all()


def test_a_guard_keeps_threads_from_memory():
    array, out = np.arange(5, dtype=np.uint32), np.zeros(5, np.uint32)
    body = ["setp.lt.u32 %p1, %r1, 5;", "mov.u32 %r4, 9;", "@%p1 ld.global.b32 %r4, [%rd3];"]
    body += ["ld.param.b64 %rd5, [p1];", "add.s64 %rd5, %rd5, %rd2;", "@%p1 st.global.b32 [%rd5], %r4;"]
    launch([*EACH, *body], array, out)
    assert np.array_equal(out, array)


def test_a_parameter_may_be_read_in_part():
    out = np.zeros(1, np.uint32)
    run = kernel(["ld.param.b32 %r5, [p1+4];", *START, "st.global.b32 [%rd1], %r5;"], 2, 32)
    run.launch(1, [buffer("out", out), 7 << 32 | 3], 0)
    assert out[0] == 7


ADD = "atom.global.gpu.relaxed.add.u64 %rd9, [%rd1 + 0], %rd6;"
WIDE = [*START, "cvt.u64.u32 %rd6, %r1;"]


def test_additions_to_one_place_are_all_counted_and_wrap():
    sums = np.array([2**64 - 5, 7], np.uint64)
    launch([*WIDE, "setp.lt.u32 %p1, %r1, 40;", f"@%p1 {ADD}"], sums, threads=64, grid=3)
    assert sums.tolist() == [3 * sum(range(40)) - 5, 7]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("global race", [*WIDE, ADD, "ld.global.b64 %rd7, [%rd1];"]),
        ("global race", [*WIDE, ADD, "st.global.b64 [%rd1], %rd6;"]),
        ("global race", [*WIDE, "mov.b64 %rd6, 1;", "st.global.b64 [%rd1], %rd6;", ADD]),
        ("global bounds", [*WIDE, ADD.replace("+ 0", "+ 16")]),
        ("global alignment", [*WIDE, ADD.replace("+ 0", "+ 4")]),
    ],
)
def test_what_is_added_to_is_neither_read_nor_written_meanwhile(kind, lines):
    fault(kind, lines, np.zeros(2, np.uint64))


def test_other_atomic_operations_are_refused():
    for other, message in (
        (".relaxed.max.u64", "max"),
        (".relaxed.add.f32", "atomic"),
        (".acq_rel.add.u64", "acq_rel"),
    ):
        with pytest.raises(Unsupported, match=message):
            launch([*WIDE, ADD.replace(".relaxed.add.u64", other)], np.zeros(1, np.uint64))


def test_memory_beyond_a_tensor():
    message = fault("global bounds", [*EACH, "ld.global.b32 %r4, [%rd3];"], np.zeros(31, np.uint32))
    assert "4 bytes at p0 + 124 of 124" in message
    assert "ld.global.b32 %r4, [%rd3]" in message  # the PTX's line
    assert "snippet.py:1" in message  # the kernel's line
    fault("global bounds", [*EACH, "ld.global.b32 %r4, [%rd3 + -4];"], np.zeros(32, np.uint32))
    fault("global bounds", ["mov.u64 %rd1, 64;", "ld.global.b32 %r4, [%rd1];"], np.zeros(32, np.uint32))
    fault("global bounds", [*EACH, "st.global.b32 [%rd3], %r1;"], np.zeros(31, np.uint32))


def test_memory_between_the_elements_of_a_tensor():
    rows = np.zeros((8, 8), np.uint32)[:, :4]
    fault("global foreign", [*EACH, "ld.global.b32 %r4, [%rd3];"], rows)
    fault("global foreign", [*EACH, "st.global.b32 [%rd3], %r1;"], rows)


def test_vectors_are_aligned():
    read = "ld.global.v2.b32 {%r4, %r5}, [%rd1 + 4];"
    assert "address 4 mod 8" in fault("global alignment", [*START, read], WORDS.view(np.uint64).copy())


def test_memory_that_nobody_wrote():
    array = np.zeros(32, np.uint32)
    run = kernel([*EACH, "ld.global.b32 %r4, [%rd3];"], 1, 32)
    with pytest.raises(Fault, match="global uninitialised: a load from 4 bytes at x"):
        run.launch(1, [buffer("x", array, empty=True)], 0)


def test_two_writers_of_one_place():
    fault("global double write", [*START, "st.global.b32 [%rd1], %r1;"], np.zeros(1, np.uint32))
    launch([*START, "mov.u32 %r5, 3;", "st.global.b32 [%rd1], %r5;"], out := np.zeros(1, np.uint32))
    assert out[0] == 3  # the same value may be written by all
    later = [*START, "mov.u32 %r5, %ctaid.x;", "st.global.b32 [%rd1], %r5;"]
    fault("global double write", later, np.zeros(1, np.uint32), grid=2)
    fault("global double write", later, np.zeros(1, np.uint32), grid=20)  # not all blocks at once


def test_memory_that_this_launch_has_written():
    fault("global race", [*EACH, "st.global.b32 [%rd3], %r1;", "ld.global.b32 %r4, [%rd3];"], np.zeros(32, np.uint32))


def test_a_result_of_which_a_part_is_missing():
    assert "4 bytes of p0" in fault("global unwritten", [*EACH, "st.global.b32 [%rd3], %r1;"], np.zeros(33, np.uint32))


# Shared memory


def test_shared_memory_hands_numbers_on():
    found = value_of(
        """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1;
        bar.sync 0;
        xor.b32 %r3, %r2, 124; ld.shared.b32 %r0, [%r3];""",
        shared=128,
    )
    assert np.array_equal(found, np.arange(32)[::-1])


def test_blocks_have_shared_memory_of_their_own():
    out = np.zeros(20 * 32, np.uint32)
    body = ["mov.u32 %r4, %ctaid.x;", "st.shared.b32 [%r3], %r4;", "bar.sync 0;", "ld.shared.b32 %r5, [%r3];"]
    place = ["mad.lo.s32 %r6, %r4, 32, %r1;", "mul.wide.u32 %rd4, %r6, 4;", "add.s64 %rd5, %rd1, %rd4;"]
    launch([*SHARED, *body, *place, "st.global.b32 [%rd5], %r5;"], out, shared=128, grid=20)
    assert np.array_equal(out, np.arange(20).repeat(32))


WRITE, READ, OTHER = "st.shared.b32 [%r3], %r1;", "ld.shared.b32 %r4, [%r3];", "ld.shared.b32 %r4, [%r5];"
TURNED = [*SHARED, "xor.b32 %r5, %r3, 128;"]  # %r5: the place of the same lane of the other warp


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("shared uninitialised", [READ]),
        ("shared race", [WRITE, OTHER]),
        ("shared race", [WRITE, "bar.sync 0;", OTHER, WRITE]),
        ("shared race", [WRITE, "st.shared.b32 [%r5], %r1;"]),
        ("shared race", ["mov.u32 %r6, 0;", "st.shared.b32 [%r6], %r1;"]),
        ("shared bounds", ["st.shared.b32 [%r3 + 4], %r1;"]),
        ("shared alignment", ["mov.u32 %r6, 4;", "st.shared.v2.b32 [%r6], {%r6, %r6};"]),
    ],
)
def test_what_warps_do_to_one_another_without_a_barrier(kind, lines):
    fault(kind, [*TURNED, *lines], np.zeros(64, np.uint32), threads=64, shared=256)


@pytest.mark.parametrize(
    "lines",
    [
        [WRITE, READ],
        [WRITE, "bar.sync 0;", OTHER],
        [WRITE, "bar.sync 0;", OTHER, "barrier.sync.aligned 0;", WRITE],
        ["mov.u32 %r6, 7;", "st.shared.b32 [%r3], %r6;", "st.shared.b32 [%r5], %r6;"],  # the same value
    ],
)
def test_what_warps_may_do(lines):
    launch([*TURNED, *lines], np.zeros(64, np.uint32), threads=64, shared=256)


# Copies


def copies(*after, size=4):
    return [*TURNED, f"cp.async.ca.shared.global [%r3], [%rd3], {size};", *after]


WAITED = ["cp.async.commit_group;", "cp.async.wait_group 0;"]
KEEP = ["ld.param.b64 %rd5, [p1];", "add.s64 %rd5, %rd5, %rd2;", "st.global.b32 [%rd5], %r4;"]


@pytest.mark.parametrize("wait", [WAITED, ["cp.async.wait_all;"]])
def test_copies_arrive(wait):
    out = np.zeros(64, np.uint32)
    launch(copies(*wait, "bar.sync 0;", OTHER, *KEEP), WORDS, out, threads=64, shared=256)
    assert np.array_equal(out, WORDS.reshape(2, 32)[::-1].reshape(-1))


def test_copies_may_fill_with_zeros():
    out = np.zeros(64, np.uint32)
    body = ["setp.lt.u32 %p1, %r1, 40;", "selp.b32 %r7, 4, 0, %p1;"]
    body += ["cp.async.ca.shared.global [%r3], [%rd3], 4, %r7;", *WAITED, READ, *KEEP]
    launch([*TURNED, *body], WORDS[:40].copy(), out, threads=64, shared=256)  # beyond 40 nothing is read
    assert np.array_equal(out, np.where(np.arange(64) < 40, WORDS, 0))


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("shared in flight", [READ]),
        ("shared in flight", ["cp.async.commit_group;", READ]),
        ("shared in flight", ["cp.async.commit_group;", "cp.async.wait_group 1;", READ]),
        ("shared in flight", ["cp.async.commit_group;", WRITE]),
        ("shared race", [*WAITED, OTHER]),  # others' copies need a barrier
        ("shared in flight", ["cp.async.commit_group;", "bar.sync 0;", OTHER]),  # a barrier is no wait
    ],
)
def test_copies_that_nobody_waited_for(kind, lines):
    fault(kind, copies(*lines), WORDS, threads=64, shared=256)


def test_waiting_for_all_but_the_last_group():
    out = np.zeros(64, np.uint32)
    second = ["cp.async.ca.shared.global [%r3 + 256], [%rd3], 4;", "cp.async.commit_group;", "cp.async.wait_group 1;"]
    launch(copies("cp.async.commit_group;", *second, READ, *KEEP), WORDS, out, threads=64, shared=512)
    assert np.array_equal(out, WORDS)
    late = "ld.shared.b32 %r4, [%r3 + 256];"
    fault("shared in flight", copies("cp.async.commit_group;", *second, late), WORDS, threads=64, shared=512)


# Matrices


HALVES = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
ROWS = [
    "shl.b32 %r3, %r1, 4; mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd1, %rd4;",
    "    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd5]; st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7};",
]
OUT = ["ld.param.b64 %rd6, [p1];", "add.s64 %rd6, %rd6, %rd4;", "st.global.v4.b32 [%rd6], {%r8, %r9, %r10, %r11};"]


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_are_loaded_as_products_want_them(turned):
    out = np.zeros((32, 4), np.uint32)
    name = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if turned else ''}.shared.b16"
    launch([*START, *ROWS, f"{name} {{%r8, %r9, %r10, %r11}}, [%r3];", *OUT], HALVES, out, shared=512)
    expected = HALVES.swapaxes(1, 2) if turned else HALVES
    lanes = out.view(np.uint16).reshape(8, 4, 4, 2)  # row, pair of columns, matrix, half
    assert np.array_equal(lanes.transpose(2, 0, 1, 3).reshape(4, 8, 8), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_that_are_stored_can_be_loaded(turned):
    out, trans = np.zeros((32, 4), np.uint32), ".trans" if turned else ""
    load = "ldmatrix.sync.aligned.m8n8.x2{}.shared.b16 {{{}}}, [%r3 + {}];"
    store = "stmatrix.sync.aligned.m8n8.x2{}.shared.b16 [%r3 + {}], {{{}}};"
    lines = [load.format("", "%r8, %r9", 0), load.format("", "%r10, %r11", 256)]
    lines += [store.format(trans, 512, "%r8, %r9"), store.format(trans, 768, "%r10, %r11"), "bar.sync 0;"]
    lines += [load.format(trans, "%r8, %r9", 512), load.format(trans, "%r10, %r11", 768)]
    launch([*START, *ROWS, *lines, *OUT], HALVES, out, shared=1024)
    lanes = out.view(np.uint16).reshape(8, 4, 4, 2)
    assert np.array_equal(lanes.transpose(2, 0, 1, 3).reshape(4, 8, 8), HALVES)


@pytest.mark.parametrize(
    "line",
    [
        "ld.local.b32 %r1, [%r2];",
        "ld.b32 %r1, [%rd2];",
        "ld.global.L1::evict_last.b32 %r1, [%rd2];",
        "ld.global.v2.b32 {%r1}, [%rd2];",
        "ld.global.b32 %r1, [%rd2 + %r3];",
        "ld.param.b32 %r1, [q0];",
        "st.relaxed.global.b32 [%rd2], %r1;",
        "red.global.add.u32 [%rd2], %r3;",
        "cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd2, {%r3, %r4}], [%r5];",
        "cp.async.cg.shared.global [%r1], [%rd2], 4;",
        "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r1}, [%r2];",
        "@%p1 cp.async.commit_group;",
    ],
)
def test_what_is_unknown_is_named(line):
    with pytest.raises(Unsupported, match=line.split("%p1 ")[-1].split()[0].rstrip(";").replace(".", r"\.")):
        value_of(line)
