"""Values and scales are as near to a tensor as e4m3 allows, for any numbers; incoherent processing keeps products."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from maskflash.backends import incoherence as module
from maskflash.backends.incoherence import Quantised, dequantise, incoherence, quantise, spread
from maskflash.errors import BackendError
from maskflash.ground.eight_bits import FORMAT, LARGEST

NORMAL, SUBNORMAL = 2.0**-6, 2.0**-9  # e4m3's least normal number, and its least one
SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 70), st.sampled_from([1, 8, 20, 64]))
BLOCKS = st.sampled_from([1, 16, 32, 128])
EXPONENTS = st.integers(-40, 40)  # of a block's size, to the base 10; float32 has 1e-45 to 1e38


def drawn(sizes, seed, exponent=0, dtype=torch.float32):
    """Normal numbers of very different sizes from token to token, in reach of the dtype."""
    draw = torch.Generator().manual_seed(seed)
    powers = torch.randint(-6, 7, (*sizes[:3], 1), generator=draw, dtype=torch.float64)
    return (torch.randn(sizes, generator=draw, dtype=torch.float64) * 2**powers * 10.0**exponent).to(dtype)


def step(scaled):
    """Half the distance of e4m3's numbers around a number: what rounding may move it."""
    exponent = torch.floor(torch.log2(scaled.abs().clamp_min(NORMAL)))
    return 2.0 ** (exponent - 4)


@given(SIZES, BLOCKS, EXPONENTS, st.integers(0, 999))
def test_each_number_is_off_by_half_a_step_at_most(sizes, block, exponent, seed):
    x = drawn(sizes, seed, exponent)
    values, scales = quantise(x, block)
    assert values.dtype == FORMAT
    assert values.shape == x.shape
    assert scales.shape == (*sizes[:2], -(-sizes[2] // block))
    assert scales.dtype == torch.float32
    assert bool((scales > 0).all() and scales.isfinite().all())
    each = spread(scales, block, sizes[2]).double()[..., None]
    finite = torch.where(x.isfinite(), x, 0.0).double()
    off = (values.double().nan_to_num() * each - finite).abs()
    assert bool((off <= step(finite / each) * each * (1 + 1e-6)).all())


@given(SIZES, BLOCKS, st.integers(0, 999))
def test_the_largest_number_of_a_block_is_448(sizes, block, seed):
    x = drawn(sizes, seed)
    values, _ = quantise(x, block)
    for first in range(0, sizes[2], block):
        part, whole = values[:, :, first : first + block].float(), x[:, :, first : first + block]
        at_largest = part.abs().flatten(2).gather(2, whole.abs().flatten(2).argmax(2, keepdim=True))
        assert bool((at_largest == LARGEST).all())


@given(SIZES, BLOCKS, st.integers(0, 999), st.integers(-100, 100))
def test_a_power_of_two_goes_to_the_scales_alone(sizes, block, seed, power):
    x = drawn(sizes, seed)
    once, again = quantise(x, block), quantise(x * 2.0**power, block)
    assert torch.equal(once.values.float(), again.values.float())
    assert torch.equal(once.scales * 2.0**power, again.scales) or x.numel() == 0


@given(SIZES, BLOCKS, st.booleans())
def test_zeros_are_zeros(sizes, block, incoherent):
    values, scales = quantise(torch.zeros(sizes), block, incoherent=incoherent)
    assert not values.float().any()
    assert bool((scales > 0).all() and scales.isfinite().all())


def test_a_block_of_zeros_beside_others_has_a_scale_in_reach_of_theirs():
    x = torch.zeros(1, 1, 96, 8)
    x[:, :, :32] = torch.randn(1, 1, 32, 8)
    values, scales = quantise(x, 32)
    assert not values[:, :, 32:].float().any()
    assert bool((scales >= scales.amax() * 2.0**-60).all() and (scales > 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(SIZES.filter(lambda sizes: sizes[2] > 0), BLOCKS, st.integers(0, 999), st.data())
def test_what_is_not_finite_is_nan_and_changes_nothing_else(bad, sizes, block, seed, data):
    x = drawn(sizes, seed)
    place = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    broken = x.clone()
    broken[place] = bad
    without = x.clone()
    without[place] = 0.0
    values, scales = quantise(broken, block)
    expected = quantise(without, block)
    assert torch.equal(scales, expected.scales)
    found = values.float()
    assert found[place].isnan()
    found[place] = 0.0
    assert torch.equal(found, expected.values.float())
    turned = quantise(broken, block, incoherent=True)
    assert turned.scales.isfinite().all()
    assert turned.values.float()[place[:3]].isnan().all()
    assert turned.values.float().isnan().any(3).sum() == 1


@given(st.sampled_from([1, 8, 16, 40, 64, 80, 96, 128, 192, 256]))
def test_m_is_orthogonal_and_of_signs(dim):
    m = incoherence(dim, torch.device("cpu")).double()
    width = m.shape[1]
    assert width >= max(dim, 32)
    assert width & (width - 1) == 0
    assert width < 2 * max(dim, 32)
    assert bool((m.abs() == 1).all())
    assert torch.equal(m @ m.T / width, torch.eye(dim, dtype=torch.float64))
    if dim == width:
        assert torch.equal(m.T @ m / width, torch.eye(dim, dtype=torch.float64))


def test_m_is_the_same_for_good():
    assert incoherence(8, torch.device("cpu"))[:, 0].tolist() == [-1, -1, 1, 1, -1, 1, -1, 1]


@given(SIZES, st.integers(0, 999))
@example((1, 1, 8, 64), 0)
def test_products_of_q_and_k_stay_what_they_are(sizes, seed):
    """But for what e4m3 rounds: with one scale a token, a sixteenth of each factor."""
    q, k = drawn(sizes, seed), drawn(sizes, seed + 1000)
    found = dequantise(quantise(q, 1, incoherent=True), 1) @ dequantise(quantise(k, 1, incoherent=True), 1).mT
    bound = q.norm(dim=3)[..., None] * k.norm(dim=3)[..., None, :]
    assert bool(((found - q @ k.mT).abs() <= bound * (1.0625**2 - 1 + 0.01)).all())


def test_constant_vectors_become_no_single_number():
    turned, _ = quantise(torch.ones(1, 1, 1, 128), 1, incoherent=True)
    assert turned.float().count_nonzero() > 60


def test_outliers_are_spread():
    x = torch.zeros(1, 1, 1, 64)
    x[..., 5] = 30.0
    values, scales = quantise(x, 16, incoherent=True)
    assert bool((values.float().abs() == LARGEST).all())
    torch.testing.assert_close(scales, torch.full((1, 1, 1), 30.0 / 8 / LARGEST))


@given(SIZES, BLOCKS, st.integers(0, 999))
def test_rounding_twice_is_rounding_once(sizes, block, seed):
    once = quantise(drawn(sizes, seed), block)
    again = quantise(dequantise(once, block), block)
    assert torch.equal(dequantise(once, block), dequantise(Quantised(*again), block))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides_change_nothing(dtype):
    x = torch.randn(2, 40, 3, 16).to(dtype)
    packed = x.transpose(1, 2)
    found, expected = quantise(packed, 32), quantise(packed.float().contiguous(), 32)
    assert torch.equal(found.values.float(), expected.values.float())
    assert torch.equal(found.scales, expected.scales)


@contextmanager
def in_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [in_bfloat16, torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")])
def test_what_the_caller_is_in_does_not_reach_m(mode):
    """It outlives the call that made it."""
    x = torch.randn(1, 1, 4, 24)
    expected = quantise(x, 2, incoherent=True)
    incoherence.cache_clear()
    with mode():
        made = incoherence(24, torch.device("cpu"))
    assert type(made) is torch.Tensor
    assert (made.dtype, made.device.type, made.is_inference()) == (torch.float32, "cpu", False)
    found = quantise(x, 2, incoherent=True)
    assert torch.equal(found.values.float(), expected.values.float())
    assert torch.equal(found.scales, expected.scales)


def test_autocast_changes_no_bit():
    x = torch.randn(1, 2, 40, 64)
    expected = quantise(x, 32, incoherent=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantise(x, 32, incoherent=True)
    assert torch.equal(found.values.float(), expected.values.float())
    assert torch.equal(found.scales, expected.scales)


def test_m_is_not_copied_while_a_cuda_graph_is_captured(monkeypatch):
    device = torch.device("cpu")
    incoherence.cache_clear()
    with monkeypatch.context() as captured:
        captured.setattr(module, "capturing", lambda device: True)
        with pytest.raises(BackendError, match="head dim 24 has run on its device yet; run the same call once before"):
            incoherence(24, device)
    made = incoherence(24, device)
    monkeypatch.setattr(module, "capturing", lambda device: True)
    assert incoherence(24, device) is made


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-36, 1e-35])
@pytest.mark.parametrize("incoherent", [False, True])
@pytest.mark.parametrize("dim", [24, 256])
def test_scales_of_tiny_numbers_are_normal(size, incoherent, dim):
    _, scales = quantise(torch.full((1, 1, 3, dim), size), 2, incoherent=incoherent)
    assert bool((scales >= torch.finfo(torch.float32).tiny).all())
