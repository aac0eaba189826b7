"""Kernels whose warps have roles, as Gluon compiles them for sm_90: right in every order; when broken, noticed."""

import pytest
import torch

from tests.ptx.driver import DEVICE
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
