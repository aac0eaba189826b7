"""Hopper's own backward, compiled for sm_90 and emulated: equal to dense float64, the same in every order of its warps,
and noticed when broken.
"""

import math
from dataclasses import replace

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import kernel_choice, launch, tile_choice
from maskflash.testing import Shape
from tests.ptx.driver import DEVICE
from tests.ptx.faults import Fault
from tests.ptx.orders import ORDERS, TEXT
from tests.ptx.test_hopper import MASKS, SLOPES, columns, dropped, later, neighbours

pytestmark = pytest.mark.skipif(DEVICE.arch != 90, reason="compiles, with MASKFLASH_TEST_DEVICE=sm_90")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """Calls of the triton backend go to Hopper's own kernels, which must have nothing against them."""
    chosen, choose = [], kernel_choice.choose_backward
    monkeypatch.setenv(kernel_choice.VARIABLE, "hopper")
    monkeypatch.setattr(kernel_choice, "choose_backward", lambda *call: chosen.append(choose(*call)) or chosen[-1])
    yield
    assert all(choice.own for choice in chosen), chosen


def assert_matches(mask, shape, dtype=torch.bfloat16, **given):
    """Gradients are as near to float64 as twice a plain computation in their dtype."""
    mf.testing.assert_matches_dense(mask, shape, dtype=dtype, backend="triton", **given)


@pytest.mark.parametrize("name", MASKS)
def test_gradients_match(name):
    assert_matches(*MASKS[name])


def test_a_wide_head_dim_and_another_of_values_in_float16():
    assert_matches(mf.causal(), Shape(1, 2, 2, 300, 420, 128, 72), torch.float16)


def test_values_wider_than_keys():
    assert_matches(mf.causal(), Shape(1, 1, 1, 200, 200, 16, 128))


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 1)])
def test_heads_that_share_a_key_head(heads):
    """One program sums over all of a group, or the parts of several are added: that depends on how many there are."""
    assert_matches(mf.sliding_window(100), Shape(1, *heads, 260, 200, 64, 64))


def test_a_group_whose_heads_have_masks_of_their_own():
    assert_matches(later, Shape(2, 4, 2, 290, 290, 64, 64))


@pytest.mark.parametrize("mask", [neighbours, columns(300)], ids=["neighbours", "flashmask"])
def test_masks_with_gaps(mask):
    length = 256 if mask is neighbours else 300
    assert_matches(mask, Shape(1, 2, 1, length, length, 64, 64))


@pytest.mark.parametrize("given", [{"q_offset": 90}, {"q_offset": torch.tensor([90, 3]), "kv_offset": 20}], ids=str)
@pytest.mark.parametrize("mask", [mf.causal(), lambda b, h, q, kv: (q - kv) % 7 < 4], ids=["interval", "expression"])
def test_numbers_with_offsets(mask, given):
    assert_matches(mask, Shape(2, 2, 1, 150, 200, 64, 64), **given)


def test_sinks():
    assert_matches(later, Shape(1, 2, 1, 290, 290, 64, 64), sinks=torch.tensor([0.5, -math.inf]))


@pytest.mark.parametrize(
    "score", [mf.scores.softcap(3.0), mf.scores.alibi(SLOPES.clone().requires_grad_())], ids=["soft-cap", "alibi"]
)
def test_scores(score):
    """Also one whose table learns, which is another kernel's business."""
    assert_matches(mf.sliding_window(200), Shape(1, 2, 1, 280, 280, 64, 64), score=score)
    assert_matches(later, Shape(1, 2, 1, 290, 290, 64, 64), score=score)


def test_dropout():
    assert_matches(mf.causal(), Shape(1, 2, 1, 280, 280, 64, 64), dropout_p=0.25)


def gradients(q, k, v, mask, dout, **given):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(mf.attention(q, k, v, mask, backend="triton", **given), (q, k, v), dout)


def test_strides_of_any_kind():
    """Heads beside tokens, an expanded batch, a gradient that is."""
    q, k, v = Shape(2, 2, 2, 200, 200, 64, 64).tensors(torch.bfloat16)
    k, dout = k[:1].expand(2, -1, -1, -1), torch.ones((), dtype=q.dtype).expand(q.shape)
    wanted = gradients(q, k.contiguous(), v, mf.causal(), dout.contiguous())
    found = gradients(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mf.causal(), dout)
    assert all(map(torch.equal, found, wanted))


def test_tokens_that_nobody_sees_may_hold_anything():
    q, k, v = (x.detach() for x in Shape(1, 1, 1, 200, 200, 64, 64).tensors(torch.bfloat16))
    dout = torch.randn_like(q)

    def hidden(b, h, q, kv):
        return (kv <= q) & (kv != 130) & (q != 40)

    wanted = gradients(q, k, v, hidden, dout)
    k[:, :, 130], v[:, :, 130], q[:, :, 40], dout[:, :, 40] = math.nan, math.inf, math.inf, math.nan
    assert all(map(torch.equal, gradients(q, k, v, hidden, dout), wanted))


# Steps of both kinds in both kernels, up to five in a program: rings of two slots go round more than twice.
LONG = (lambda b, h, q, kv: abs(q - kv) <= 300), Shape(1, 1, 1, 600, 600, 16, 16)
KERNELS = ("hopper_dkdv", "hopper_dq")
BOTH = pytest.mark.parametrize("recorded", KERNELS, indirect=True, ids=["of keys", "of queries"])


@pytest.fixture
def recorded(on_hopper, request):
    """A launch; what it wrote, and copies of that."""
    mask, shape = LONG
    q, k, v = shape.tensors(torch.bfloat16)
    out = mf.attention(q, k, v, mask, backend="triton")
    DEVICE.calls = []
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype))
    calls, DEVICE.calls = DEVICE.calls, None
    (call,) = (call for call in calls if call.name == request.param)
    written = [call.values[name] for name in ("dk_ptr", "dv_ptr") if name in call.values] or [
        call.values["dq_desc"].base
    ]
    return call, written, [x.clone() for x in written]


@BOTH
def test_every_order_gives_the_same_bits(recorded):
    call, written, wanted = recorded
    for order in ORDERS:
        for x in written:
            x.zero_()
        call.run(order=order)
        assert all(map(torch.equal, written, wanted)), order


def noticed(call, written, wanted, text):
    """How a broken kernel ends in the first order that notices it."""
    for order in (TEXT, *ORDERS[2:5]):
        try:
            call.run(text, order=order)
        except Fault as found:
            return found.kind
        if not all(map(torch.equal, written, wanted)):
            return "other results"
    return None


BREAKS = (
    *("mbarrier.arrive.shared", "mbarrier.arrive.expect_tx", "mbarrier.init", "cp.async.bulk.tensor"),
    *("fence.proxy.async", "wgmma.wait_group", "bar.sync"),
)
# Barriers that Triton puts in front of each wait for an mbarrier, and behind the last copy: they order nothing.
REDUNDANT = {("hopper_dkdv", "bar.sync"): 4, ("hopper_dq", "bar.sync"): 8}


@pytest.mark.parametrize("start", BREAKS)
@BOTH
def test_what_is_dropped_is_noticed(recorded, start):
    call, written, wanted = recorded
    ends = {line: noticed(call, written, wanted, text) for line, text in dropped(call.text, start)}
    print(f"{call.name}, {start}:", ends)
    assert any(ends.values())
    assert sum(end is None for end in ends.values()) <= REDUNDANT.get((call.name, start), 0), ends


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_rings_of_any_number_of_slots(monkeypatch, stages):
    find = tile_choice.find

    def found(case):
        choice = find(case)
        return replace(choice, tile=replace(choice.tile, stages=stages)) if case.pass_name in KERNELS else choice

    monkeypatch.setattr(tile_choice, "find", found)
    assert_matches(*LONG)


SABOTAGE = {
    "a producer that waits for the wrong phase": ("phase = 1  #", "phase = 0  #"),
    "a phase that never turns": ("phase = tl.where(slot == STAGES, phase ^ 1, phase)", "phase = phase + 0"),
    "a step that is left out": ("range(0, steps)", "range(1, steps)"),
    "a mask that is left out": ("p = tl.where(visible, p, 0.0)", "p = tl.where(visible, p, p)"),
    "rows of the step before": ("row_delta = delta_ring.index(slot)", "row_delta = delta_ring.index(slot ^ 1)"),
    "a slot that is left too soon": (
        "acc_k, acc_v = warpgroup_mma_wait(0, deps=[acc_k, acc_v])\n            mbarrier.arrive(empty.index(slot))\n",
        "mbarrier.arrive(empty.index(slot))\n            acc_k, acc_v = warpgroup_mma_wait(0, deps=[acc_k, acc_v])\n",
    ),
    "a head that is left out": ("for nth in range(0, part):", "for nth in range(1, part):"),
    "bytes that never come": ("mbarrier.expect(held, 2 *", "mbarrier.expect(held, 3 *"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_broken_text_is_noticed(monkeypatch, name):
    sound, broken = SABOTAGE[name]
    render, changed = launch.render, []

    def spoilt(special, pass_name):
        text = render(special, pass_name)
        if pass_name not in KERNELS or sound not in text:
            return text
        changed.append(pass_name)
        return text.replace(sound, broken)

    monkeypatch.setattr(launch, "render", spoilt)
    launch.kernel.cache_clear()
    try:
        with pytest.raises((Fault, AssertionError)) as caught:
            assert_matches(*LONG)
        assert changed
        print(name, "->", str(caught.value)[:100])
    finally:
        launch.kernel.cache_clear()
