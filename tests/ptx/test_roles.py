"""Kernels whose warps have roles, as Gluon compiles them for sm_90: right in every order; when broken, noticed."""

import re

import pytest
import torch

from tests.ptx.driver import DEVICE
from tests.ptx.faults import Fault
from tests.ptx.orders import ORDERS

pytestmark = pytest.mark.skipif(DEVICE.arch != 90, reason="compiles, with MASKFLASH_TEST_DEVICE=sm_90")


def descriptor(tensor, box, swizzle=128):
    gl = pytest.importorskip("triton.experimental.gluon.language")
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * tensor.element_size(), rank=2)
    return TensorDescriptor.from_tensor(tensor, box, layout)


def recorded(kernel, grid, *args, **options):
    """A launch, to repeat and to break."""
    DEVICE.calls = []
    kernel[(grid,)](*args, **options)
    (call,), DEVICE.calls = DEVICE.calls, None
    return call


@pytest.fixture(scope="module")
def product():
    """c = a b, 250 rows in tiles of 64, 256 deep in steps of 64, through a ring of two."""
    from tests.ptx.roles import product as kernel

    torch.manual_seed(0)
    a, b = torch.randn(250, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    c = torch.empty(250, 64, dtype=torch.bfloat16)
    maps = descriptor(a, [64, 64]), descriptor(b, [64, 64]), descriptor(c, [64, 64])
    return recorded(kernel, 4, *maps, 256, 64, 2, num_warps=4), c, (a.double() @ b.double()).bfloat16()


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_a_product_of_two_roles(product, order):
    call, c, expected = product
    c.zero_()
    call.run(order=order)
    assert torch.equal(c, expected)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
def test_a_copy_through_a_ring(order, swizzle):
    from tests.ptx.roles import copy_ring

    source, box = torch.randn(100, 64).half(), [32, 64]
    target = torch.zeros_like(source)
    call = recorded(
        copy_ring, 1, descriptor(source, box, swizzle), descriptor(target, box, swizzle), 100, 2, num_warps=4
    )
    target.zero_()
    call.run(order=order)
    assert torch.equal(target, source)


def noticed(product, text=None, orders=ORDERS, **changed):
    """How a changed product ends in each order: the kind of a fault, "wrong", or "right"."""
    call, c, expected = product
    found = []
    for order in orders:
        c.zero_()
        try:
            call.run(text, order=order, **changed)
        except Fault as fault:
            found.append(fault.kind)
        else:
            found.append("right" if torch.equal(c, expected) else "wrong")
    return found


def lines_with(text, words):
    return [number for number, line in enumerate(text.splitlines()) if re.search(words, line)]


def edited(text, number, change):
    """PTX of which one line has become others, or none."""
    lines = text.splitlines()
    lines[number] = change(lines[number])
    return "\n".join(lines)


def other_parity(line):
    return re.sub(r"(mbarrier.*, )(%r\d+);", r"xor.b32 %r9999, \2, 1; \1%r9999;", line)


@pytest.mark.parametrize("number", [0, 1], ids=["products", "loads"])
def test_a_phase_that_is_off_by_one(product, number):
    text = product[0].text
    place = lines_with(text, "try_wait")[number]
    found = noticed(product, edited(text, place, other_parity))
    assert set(found) <= {"shared uninitialised", "shared in flight", "deadlock"}, found


@pytest.mark.parametrize("number", [0, 1], ids=["products", "loads"])
def test_a_wait_that_is_left_out(product, number):
    text = product[0].text
    place = lines_with(text, "try_wait")[number]
    found = noticed(product, edited(text, place, lambda line: "mov.pred complete, 1;"))
    assert set(found) <= {"shared uninitialised", "shared in flight", "shared race", "mbarrier arrivals"}, found


@pytest.mark.parametrize("number", [0, 1], ids=["products", "loads"])
def test_an_arrival_that_is_left_out_is_a_deadlock(product, number):
    text = product[0].text
    place = lines_with(text, r"mbarrier\.arrive")[number]
    assert set(noticed(product, edited(text, place, lambda line: ""))) == {"deadlock"}


@pytest.mark.parametrize("nbytes", [8192, 16368, 16400, 24576])
def test_other_bytes_are_expected_than_come(product, nbytes):
    text = product[0].text
    (place,) = lines_with(text, r"expect_tx.*, 16384;")
    found = noticed(product, edited(text, place, lambda line: line.replace("16384", str(nbytes))))
    assert set(found) <= {"shared in flight", "shared uninitialised", "mbarrier arrivals", "deadlock"}, found


def test_tensor_maps_with_another_swizzle(product):
    first, *others = product[0].maps
    assert set(noticed(product, maps=({**first, "swizzle": 0}, *others))) == {"wrong"}
    assert set(noticed(product, maps=({**first, "swizzle": 2}, *others))) == {"tensor map"}  # its lines are too long


def test_operands_with_another_swizzle(product):
    text = product[0].text
    constants = {int(one) for one in re.findall(r"or\.b64.*, (\d{19});", text)}
    for one in constants:
        text = text.replace(str(one), str(one ^ (3 << 62)))  # 64 bytes instead of 128
    assert set(noticed(product, text)) == {"wrong"}


@pytest.mark.parametrize(("number", "kind"), [(0, "mbarrier init"), (1, "shared proxy")], ids=["mbarriers", "results"])
def test_a_proxy_fence_that_is_left_out(product, number, kind):
    text = product[0].text
    places = lines_with(text, r"fence\.proxy")
    assert len(places) == 2
    assert set(noticed(product, edited(text, places[number], lambda line: ""))) == {kind}


def test_a_tile_that_is_released_before_its_product_has_been_waited_for(product):
    lines = product[0].text.splitlines()
    (wait,) = lines_with(product[0].text, r"wgmma\.wait_group")
    arrive = lines_with(product[0].text, r"mbarrier\.arrive\.shared")[0]
    lines.insert(arrive + 1, lines[wait])
    lines[wait] = ""
    assert set(noticed(product, "\n".join(lines))) <= {"shared race", "shared in flight"}


def test_results_that_are_not_waited_for(product):
    text = product[0].text
    (place,) = lines_with(text, r"cp\.async\.bulk\.wait_group")
    assert set(noticed(product, edited(text, place, lambda line: ""))) == {"copy not waited for"}


def test_barriers_that_are_left_out(product):
    """Three order nothing: before the wait for a tile, where all threads wait; around a store to memory that is new.

    Two more stand where warps go that have no role, of which there are none.
    """
    text = product[0].text
    places = lines_with(text, r"\bbar(rier)?\.sync")
    found = {place: noticed(product, edited(text, place, lambda line: ""), ORDERS[3:7:3]) for place in places}
    assert len(places) == 18
    assert sum("right" in kinds for kinds in found.values()) == 5, found


def test_what_is_not_broken_is_right(product):
    assert set(noticed(product)) == {"right"}
