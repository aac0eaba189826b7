"""Boxes of tensors that the copy engine moves: where elements land, what fills them, and what must come between."""

import numpy as np
import pytest

from tests.ptx.faults import Fault, Unsupported
from tests.ptx.orders import ORDERS, TEXT, Order
from tests.ptx.snippets import buffer, kernel
from tests.ptx.tensor_maps import TensorMap

LATE = Order("late", "text", "late")
START = [
    "mov.u32 %r99, %tid.x;",
    "setp.eq.u32 %p1, %r99, 0;",
    "@%p1 mbarrier.init.shared::cta.b64 [0], 1;",
    "fence.proxy.async.shared::cta;",
    "bar.sync 0;",
    "mov.b64 %rd1, p0;",
    "cvta.param.u64 %rd1, %rd1;",
]
AT = 1024  # a whole pattern of any swizzle


def tensor_map(array, box, swizzle=0, name="p0"):
    return TensorMap(buffer(name, array), array.shape, array.strides, box, array.itemsize, swizzle)


def expect(nbytes):
    return f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], {nbytes};"


def load(coordinates, at=AT):
    """A copy of the box that begins there: coordinates as the instruction has them, innermost first."""
    form = f"cp.async.bulk.tensor.{len(coordinates)}d.shared::cta.global.mbarrier::complete_tx::bytes"
    return f"@%p1 {form} [{at}], [%rd1, {{{', '.join(map(str, coordinates))}}}], [0];"


def wait(parity=0, name="again"):
    return [f"${name}:", f"mbarrier.try_wait.parity.shared::cta.b64 %p3, [0], {parity};", f"@!%p3 bra ${name};"]


def words_out(count, threads=32):
    """Store `count` words of shared memory, from AT on, to parameter 1."""
    out = [
        "ld.param.b64 %rd5, [p1];",
        "mul.wide.u32 %rd6, %r99, 4;",
        "add.s64 %rd5, %rd5, %rd6;",
        "shl.b32 %r98, %r99, 2;",
    ]
    for n in range(0, count, threads):
        out += [f"ld.shared.b32 %r5, [%r98 + {AT + 4 * n}];", f"st.global.b32 [%rd5 + {4 * n}], %r5;"]
    return out


def run(lines, *params, order=TEXT, shared=AT + 4096, threads=32):
    kernel([*START, *lines], len(params), threads).launch(1, params, shared, order)


def landed(array, box, swizzle, coordinates, order=TEXT):
    """A box of a tensor as it lies in shared memory: bytes."""
    nbytes = int(np.prod(box)) * array.itemsize
    out = np.zeros(nbytes // 4, np.uint32)
    lines = [expect(nbytes), load(coordinates), *wait(), *words_out(nbytes // 4)]
    run(lines, tensor_map(array, box, swizzle), buffer("p1", out), order=order)
    return out.view(np.uint8)


def swizzled(rows, line):
    """Bytes of rows of `line` bytes: 16 of them stand at their number xor the row's, as far as there are so many."""
    parts = rows.reshape(-1, line // 16, 16)
    # 8 rows of 128 bytes, or as many bytes of shorter ones, are one pattern.
    row = np.arange(len(parts)) * line // 128 % 8 & (line // 16 - 1)
    return np.take_along_axis(parts, (np.arange(line // 16) ^ row[:, None])[:, :, None], 1).ravel()


@pytest.mark.parametrize("swizzle", [128, 64, 32])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_box_lands_line_by_line_swizzled(swizzle, dtype):
    wide = swizzle // np.dtype(dtype).itemsize
    array = (np.arange(40 * 2 * wide).reshape(40, 2 * wide) % 251).astype(dtype)
    found = landed(array, (16, wide), swizzle, [wide, 5])
    inside = np.ascontiguousarray(array[5:21, wide:]).view(np.uint8)
    assert np.array_equal(found, swizzled(inside, swizzle))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_what_is_outside_is_zero(order):
    array = np.arange(1, 10 * 24 + 1, dtype=np.uint16).reshape(10, 24)
    found = landed(array, (8, 16), 0, [-4, 6], order).view(np.uint16).reshape(8, 16)
    expected = np.zeros((8, 16), np.uint16)
    expected[:4, 4:] = array[6:, :12]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_boxes_of_other_ranks(rank):
    shape, box, first = (3, 2, 4, 6, 80)[-rank:], (1, 1, 2, 2, 64)[-rank:], (2, 0, 3, 5, 24)[-rank:]
    array = np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape)
    inside = np.zeros([size + more for size, more in zip(shape, box, strict=True)], np.uint16)
    inside[tuple(slice(size) for size in shape)] = array
    place = tuple(slice(at, at + size) for at, size in zip(first, box, strict=True))
    assert np.array_equal(landed(array, box, 0, first[::-1]).view(np.uint16), inside[place].ravel())


STORED = ["cp.async.bulk.commit_group;", "cp.async.bulk.wait_group.read 0;"]


def store(coordinates, parameter=0, at=AT):
    form = f"cp.async.bulk.tensor.{len(coordinates)}d.global.shared::cta.bulk_group"
    return f"@%p1 {form} [%rd1, {{{', '.join(map(str, coordinates))}}}], [{at}];"


FILL = ["shl.b32 %r98, %r99, 2;", f"st.shared.b32 [%r98 + {AT}], %r99;"]  # a word of each thread
FENCED = ["fence.proxy.async.shared::cta;", "bar.sync 0;"]


def test_a_box_is_stored_as_far_as_it_is_the_tensors():
    out = np.zeros((6, 8), np.uint32)
    run([*FILL, *FENCED, store([0, -1]), *STORED], tensor_map(out[2:4, :4], (4, 8)))
    expected = np.zeros((6, 8), np.uint32)
    expected[2:4, :4] = np.arange(32).reshape(4, 8)[1:3, :4]
    assert np.array_equal(out, expected)


def ends(lines, *params, **options):
    """The kind of the fault in which these lines end."""
    with pytest.raises(Fault) as caught:
        run(lines, *params, **options)
    return caught.value.kind


GIVEN = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
BOX, NBYTES = (4, 8), 128
READ = f"ld.shared.b32 %r5, [{AT}];"
WRITE = f"st.shared.b32 [{AT}], %r99;"


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("shared in flight", [expect(NBYTES), load([0, 0]), READ]),
        ("shared in flight", [expect(NBYTES), load([0, 0]), *wait(1), READ]),  # of the phase before: none
        ("shared in flight", [expect(NBYTES), load([0, 0]), WRITE]),
        ("shared in flight", [expect(2 * NBYTES), load([0, 0]), load([0, 4])]),  # to one place
        ("copy not waited for", [expect(NBYTES), load([0, 0])]),
        ("deadlock", [expect(NBYTES + 16), load([0, 0]), *wait()]),
        ("deadlock", [load([0, 0]), *wait()]),
        (
            "shared in flight",
            [expect(NBYTES), load([0, 0]), load([0, 4], AT + NBYTES), *wait(), READ.replace("1024", "1152")],
        ),
        ("shared alignment", [expect(NBYTES), load([0, 0], AT + 64)]),
        ("shared bounds", [expect(NBYTES), load([0, 0], AT + 4096)]),
        ("mbarrier", [expect(NBYTES), load([0, 0]).replace(", [0];", ", [8];")]),
        ("tensor map", ["add.s64 %rd1, %rd1, 64;", load([0, 0])]),
        ("tensor map", [load([0, 0, 0])]),
        ("shared proxy", [WRITE.replace("%r99", "7"), "bar.sync 0;", expect(NBYTES), load([0, 0])]),
    ],
)
def test_how_loads_go_wrong(kind, lines):
    assert ends(lines, tensor_map(GIVEN, BOX), order=LATE) == kind


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("shared uninitialised", [store([0, 0]), *STORED]),
        ("shared proxy", [*FILL, "bar.sync 0;", store([0, 0]), *STORED]),
        ("shared in flight", [*FILL, *FENCED, store([0, 0]), WRITE]),
        ("shared in flight", [*FILL, *FENCED, store([0, 0]), STORED[0], "cp.async.bulk.wait_group.read 1;", WRITE]),
        ("copy not waited for", [*FILL, *FENCED, store([0, 0]), STORED[0]]),
        ("copy not waited for", [*FILL, *FENCED, store([0, 0]), STORED[1]]),  # not committed
    ],
)
def test_how_stores_go_wrong(kind, lines):
    out = np.zeros((4, 8), np.float32)
    assert ends(lines, tensor_map(out, BOX), order=LATE) == kind


def test_stores_of_two_warps_without_an_order():
    out = np.zeros((8, 8), np.float32)
    lines = [*FILL, "fence.proxy.async.shared::cta;", store([0, 0]), *STORED]
    assert ends(lines, tensor_map(out, (8, 8)), threads=64) in ("shared uninitialised", "shared race")


@pytest.mark.parametrize("fence", ["fence.proxy.async.shared::cta;", "fence.mbarrier_init.release.cluster;", ""])
def test_an_mbarrier_is_fenced_before_a_copy_uses_it(fence):
    lines = [fence if "fence" in line else line for line in START]
    lines += [expect(NBYTES), load([0, 0]), *wait()]
    one = kernel([line for line in lines if line], 1, 32)
    if fence:
        one.launch(1, [tensor_map(GIVEN, BOX)], AT + 4096)
        return
    with pytest.raises(Fault, match="mbarrier init: a copy uses it"):
        one.launch(1, [tensor_map(GIVEN, BOX)], AT + 4096)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("a box of 1 to 256", {"box": (257, 8)}),
        ("multiples of 16 bytes", {"box": (4, 3)}),
        ("no longer than its swizzle", {"box": (4, 16), "swizzle": 32}),
        ("a swizzle of", {"box": BOX, "swizzle": 96}),
        ("1 to 5 dimensions", {"box": (8,)}),
    ],
)
def test_tensor_maps_that_cannot_be(what, options):
    with pytest.raises(Fault, match=f"tensor map: p0 wants .*{what}"):
        tensor_map(GIVEN, **options)


def test_tensors_that_no_map_can_have():
    with pytest.raises(Fault, match="an address that is a multiple of 16"):
        tensor_map(GIVEN[:, 1:5], (4, 4))
    with pytest.raises(Fault, match="strides of 16 bytes"):
        tensor_map(np.zeros((8, 5), np.float32), (4, 4))
    with pytest.raises(Fault, match="elements side by side"):
        tensor_map(np.zeros((8, 8), np.float32)[:, ::2], (4, 4))


@pytest.mark.parametrize(
    "line",
    [
        "cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd2, {%r3, %r4}], [%r5];",
        "TO.tile::gather4.mbarrier::complete_tx::bytes [0], [%rd1, {0, 0}], [0];",
        "TO.mbarrier::complete_tx::bytes.multicast::cluster [0], [%rd1, {0, 0}], [0], %rs1;",
        "TO.mbarrier::complete_tx::bytes [0], [%rd1, {0}], [0];",
        "cp.async.bulk.wait_group.write 0;",
    ],
)
def test_what_is_unknown_is_named(line):
    line = line.replace("TO", "cp.async.bulk.tensor.2d.shared::cta.global")
    with pytest.raises(Unsupported, match=line.split()[0].replace(".", r"\.")):
        run([line], tensor_map(GIVEN, BOX))
