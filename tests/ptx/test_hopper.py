"""Hopper's own forward, compiled for sm_90 and emulated: equal to dense float64, the same in every order of its warps,
and noticed when broken.
"""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import maskflash as mf
from maskflash.backends.reference import error_budget, reference
from maskflash.backends.triton import kernel_choice, launch, tile_choice
from maskflash.backends.triton.tiles import choose
from maskflash.testing import Shape, dropout_keep
from tests.ptx.driver import DEVICE
from tests.ptx.faults import Fault
from tests.ptx.orders import ORDERS, TEXT

pytestmark = pytest.mark.skipif(DEVICE.arch != 90, reason="compiles, with MASKFLASH_TEST_DEVICE=sm_90")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """Calls of the triton backend go to Hopper's own kernel, which must have nothing against them."""
    choose = kernel_choice.choose

    def chosen(problem, q, k, v, strength):
        return choose(problem, q, k, v, replace(strength, kernels="hopper"))

    monkeypatch.setattr(kernel_choice, "choose", chosen)


def assert_forward_matches(
    mask, shape, dtype=torch.bfloat16, sinks=None, score=None, weigh=None, dropout_p=0.0, block_size=128
):
    """out is as near to float64 as twice a plain computation in its dtype, lse as one in float32.

    Args:
        score: as in `compile`.
        weigh: the same of scaled products (B, H, Sq, Skv).
    """
    dense = mf.mask(mask).at(shape.q_len, shape.kv_len, batch=shape.batch, heads=shape.heads).dense()
    q, k, v = (x.detach() for x in shape.tensors(dtype))
    given = {"sinks": sinks, "score": score, "dropout_p": dropout_p, "seed": 7 if dropout_p else None}
    given["block_size"] = block_size
    out, lse = mf.attention(q, k, v, mask, backend="triton", return_lse=True, **given)
    lengths = shape.batch, shape.heads, shape.q_len, shape.kv_len
    kept = dropout_keep(7, dropout_p, *lengths) / (1 - dropout_p) if dropout_p else None

    def dense_in(kind):
        own = None if kept is None else kept.to(kind)
        return reference(q.to(kind), k.to(kind), v.to(kind), dense, shape.head_dim**-0.5, sinks, weigh, own)

    exact_out, exact_lse = dense_in(torch.float64)
    error = (out.double() - exact_out).abs().max().item()
    assert error <= error_budget(dense_in(dtype)[0], exact_out, dtype)
    blind = exact_lse == -math.inf
    assert bool((lse[blind] == -math.inf).all())
    assert bool((out[blind] == 0).all())
    error = (lse.double() - exact_lse)[~blind].abs().max().item()
    assert error <= error_budget(dense_in(torch.float32)[1], exact_lse, torch.float32)


def later(b, h, q, kv):
    """Rows of its first tile have no tiles, some of its second one see nothing, and no two heads are alike."""
    return q >= 150 and kv <= q - 150 + 40 * h - 60 * b


def neighbours(b, h, q, kv):
    """NATTEN's, in a picture 16 wide."""
    return abs(q // 16 - kv // 16) <= 3 and abs(q % 16 - kv % 16) <= 3


def columns(length):
    """FlashMask's four vectors: rows from `start` to `end` don't see a column."""
    draw = torch.Generator().manual_seed(3)
    start = torch.randint(0, length, (1, 1, length), generator=draw)
    hidden = start.int(), (start + 60).clamp(max=length).int()
    none = torch.zeros(1, 1, length, dtype=torch.int32)
    return mf.ColumnIntervals(*hidden, none, none)


def neither_of(length):
    """One of its comparisons has no bits of rows, so all pairs are compared: with what two look-ups give a column."""
    doc, start = torch.arange(length) // 70, torch.arange(length).flip(0)
    return lambda b, h, q, kv: (doc[q] == doc[kv]) & (q >= start[kv]) | (kv < 3)


MASKS = {
    "causal": (mf.causal(), Shape(1, 2, 1, 300, 300, 64, 64)),
    "all": (lambda b, h, q, kv: True, Shape(1, 1, 1, 128, 384, 64, 64)),
    "a ragged window, more keys than rows": (mf.sliding_window(100, 30), Shape(2, 4, 2, 200, 333, 64, 64)),
    "documents": (mf.causal() & mf.document([130, 1, 200, 53]), Shape(1, 1, 1, 384, 384, 64, 64)),
    "a prefix": (mf.prefix_lm(170), Shape(1, 1, 1, 300, 300, 64, 64)),
    "rows without tiles": (later, Shape(2, 2, 2, 290, 290, 64, 64)),
    "one row": (mf.causal(), Shape(1, 1, 1, 1, 15, 64, 64)),
}


@pytest.mark.parametrize("name", MASKS)
def test_intervals(name):
    assert_forward_matches(*MASKS[name])


def test_a_wide_head_dim_and_another_of_values_in_float16():
    assert_forward_matches(mf.causal(), Shape(1, 2, 2, 300, 420, 128, 72), torch.float16)


def test_a_head_dim_of_256():
    assert_forward_matches(mf.sliding_window(150), Shape(1, 1, 1, 256, 256, 256, 256))


def test_values_wider_than_keys():
    assert_forward_matches(mf.causal(), Shape(1, 1, 1, 200, 200, 16, 128))


@pytest.mark.parametrize("mask", [neighbours, columns(300)], ids=["neighbours", "flashmask"])
def test_masks_with_gaps(mask):
    length = 256 if mask is neighbours else 300
    assert_forward_matches(mask, Shape(1, 2, 1, length, length, 64, 64))


def test_sinks():
    sinks = torch.tensor([0.5, -math.inf])
    assert_forward_matches(later, Shape(1, 2, 1, 290, 290, 64, 64), sinks=sinks)


SLOPES = torch.tensor([0.25, 0.5])


def alibi(scores):
    q, kv = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
    return scores + SLOPES.to(scores.dtype)[:, None, None] * (kv - q)


@pytest.mark.parametrize(
    ("score", "weigh"),
    [
        (mf.scores.softcap(3.0), lambda scores: 3.0 * torch.tanh(scores / 3.0)),
        (mf.scores.alibi(SLOPES), alibi),
    ],
    ids=["soft-cap", "alibi"],
)
def test_scores(score, weigh):
    """Also where the first tile is a full one: then partial tiles are none, and steps still know where they are."""
    assert_forward_matches(mf.sliding_window(200), Shape(1, 2, 1, 280, 280, 64, 64), score=score, weigh=weigh)
    assert_forward_matches(lambda b, h, q, kv: True, Shape(1, 2, 1, 128, 384, 64, 64), score=score, weigh=weigh)


def test_look_ups_of_pairs_at_the_widest_head_dim():
    """Its steps are of 32 keys, the shortest there are."""
    shape = Shape(1, 1, 1, 140, 200, 256, 256)
    bias = torch.randn(1, 1, 140, 200, generator=torch.Generator().manual_seed(5))
    assert choose(90, "hopper", torch.bfloat16, 256, (128, 128), of_pairs=1).block_n == 32
    weigh = lambda scores: scores + bias.to(scores.dtype)  # noqa: E731
    assert_forward_matches(mf.causal(), shape, score=mf.scores.bias(bias), weigh=weigh)


@pytest.mark.parametrize("dim", [128, 256])
def test_flashmask_s_vectors_at_every_head_dim(dim):
    """Every row of the table has their bits: steps of 128 keys, and of 64."""
    assert_forward_matches(columns(200), Shape(1, 1, 1, 200, 200, dim, dim))


def test_columns_that_are_spread_to_pairs():
    assert_forward_matches(neither_of(300), Shape(1, 2, 1, 300, 300, 64, 64))


def test_dropout():
    assert_forward_matches(mf.causal(), Shape(1, 2, 1, 280, 280, 64, 64), dropout_p=0.25)


def test_strides_of_any_kind(on_hopper):
    """Heads beside tokens, an expanded batch, a head dim that is no whole vector."""
    q, k, v = Shape(2, 2, 2, 200, 200, 64, 64).tensors(torch.bfloat16)
    wanted = mf.attention(q, k[:1].expand(2, -1, -1, -1), v, mf.causal(), backend="triton")
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    found = mf.attention(apart[0], apart[1][:1].expand(2, -1, -1, -1), apart[2], mf.causal(), backend="triton")
    assert torch.equal(found, wanted)


def test_keys_that_nobody_sees_may_hold_anything():
    q, k, v = (x.detach() for x in Shape(1, 1, 1, 200, 200, 64, 64).tensors(torch.bfloat16))
    hide = partial(mf.attention, mask=lambda b, h, q, kv: kv <= q and kv != 130, backend="triton")
    wanted = hide(q, k, v)
    k[:, :, 130], v[:, :, 130] = math.nan, math.inf
    assert torch.equal(hide(q, k, v), wanted)


def test_backward_takes_what_it_leaves():
    shape = Shape(1, 2, 1, 200, 200, 64, 64)
    mf.testing.assert_matches_dense(mf.causal(), shape, dtype=torch.bfloat16, backend="triton")


# Steps of both kinds, eleven in all: the rings go round more than twice.
LONG = (lambda b, h, q, kv: kv <= q + 500), Shape(1, 1, 1, 128, 700, 16, 16)
STEP = (128, 64)


def record(mask, shape):
    """A launch; what it wrote, and a copy of it."""
    q, k, v = (x.detach() for x in shape.tensors(torch.bfloat16))
    DEVICE.calls = []
    out = mf.attention(q, k, v, mask, backend="triton", block_size=STEP)
    (call,), DEVICE.calls = DEVICE.calls, None
    return call, out, out.clone()


@pytest.fixture
def recorded(on_hopper):
    return record(*LONG)


OF_COLUMNS = {
    "intervals": LONG,
    "bits": (columns(300), Shape(1, 1, 1, 128, 300, 16, 16)),
    "spread": (neither_of(300), Shape(1, 1, 1, 128, 300, 16, 16)),
}


@pytest.mark.parametrize("name", OF_COLUMNS)
def test_every_order_gives_the_same_bits(on_hopper, name):
    """Also where threads of a consumer tell one another what they found of columns."""
    call, out, wanted = record(*OF_COLUMNS[name])
    for order in ORDERS:
        out.zero_()
        call.run(order=order)
        assert torch.equal(out, wanted), order


def test_consumers_that_do_not_meet_are_noticed(on_hopper):
    """A barrier between what warps of a consumer write of columns and what others read: without it there is a race."""
    call, out, wanted = record(*OF_COLUMNS["bits"])
    assert any(noticed(call, out, wanted, text) == "shared race" for _, text in dropped(call.text, "bar.sync"))


def noticed(call, out, wanted, text):
    """How a broken kernel ends in the first order that notices it."""
    for order in (TEXT, *ORDERS[2:5]):
        try:
            call.run(text, order=order)
        except Fault as found:
            return found.kind
        if not torch.equal(out, wanted):
            return "other results"
    return None


def dropped(text, start):
    """A kernel's text without one of the lines that begin so, for each of them."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.sub(r"^@!?%p\d+\s+", "", line.strip()).startswith(start):
            yield number + 1, "\n".join((*lines[:number], *lines[number + 1 :]))


# How many of a kind may be dropped unnoticed, and how it is noticed.
BREAKS = {
    "mbarrier.arrive.shared": 0,
    "mbarrier.arrive.expect_tx": 0,
    "mbarrier.init": 0,
    "cp.async.bulk.tensor": 0,
    "fence.proxy.async": 0,
    "wgmma.wait_group": 0,
}


@pytest.mark.parametrize("start", BREAKS)
def test_what_is_dropped_is_noticed(recorded, start):
    call, out, wanted = recorded
    ends = {line: noticed(call, out, wanted, text) for line, text in dropped(call.text, start)}
    print(f"{start}:", ends)
    assert ends
    assert sum(end is None for end in ends.values()) <= BREAKS[start], ends


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_rings_of_any_number_of_slots(monkeypatch, stages):
    find = tile_choice.find

    def found(case):
        choice = find(case)
        return replace(choice, tile=replace(choice.tile, stages=stages)) if case.pass_name == "hopper" else choice

    monkeypatch.setattr(tile_choice, "find", found)
    assert_forward_matches(*LONG, block_size=STEP)


SABOTAGE = {
    "a producer that waits for the wrong phase": ("phase = 1  #", "phase = 0  #"),
    "a phase that never turns": ("phase = tl.where(slot == STAGES, phase ^ 1, phase)", "phase = phase + 0"),
    "a step that is left out": ("partial_steps == 0, 1, 0), full_steps)", "partial_steps == 0, 1, 1), full_steps)"),
    "a maximum that grows unnoticed": (
        "acc = acc * tl.convert_layout(alpha",
        "acc = acc * tl.convert_layout(alpha * 0 + 1",
    ),
    "bytes that never come": ("mbarrier.expect(q_full, 2 *", "mbarrier.expect(q_full, 3 *"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_broken_text_is_noticed(monkeypatch, name):
    sound, broken = SABOTAGE[name]
    render = launch.render

    def changed(special, pass_name):
        text = render(special, pass_name)
        if sound not in text:
            pytest.fail(f"nothing to break: {sound}")
        return text.replace(sound, broken)

    monkeypatch.setattr(launch, "render", changed)
    launch.kernel.cache_clear()
    try:
        with pytest.raises((Fault, AssertionError)) as caught:
            assert_forward_matches(*LONG, block_size=STEP)
        print(name, "->", str(caught.value)[:100])
    finally:
        launch.kernel.cache_clear()
