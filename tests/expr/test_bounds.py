"""Bounds are sound on random expressions over random boxes, and tight on the masks of the field."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.errors import MaskIndexError, MaskTraceError
from maskflash.expr.bounds import bounds, largest
from maskflash.expr.evaluate import Inputs, evaluate, every_value
from maskflash.expr.intervals import Interval
from maskflash.expr.nodes import Builder
from maskflash.expr.ranges import RangeMinima
from maskflash.trace.trace import trace

ENDS = {"b": (0, 1), "h": (0, 1), "q": (-4, 9), "kv": (0, 11)}


def random_boxes(data, count):
    """`count` boxes of pairs, as first and last index of b, h, q and kv."""
    boxes = {}
    for name, (first, last) in ENDS.items():
        ends = st.tuples(st.integers(first, last), st.integers(first, last)).map(sorted)
        drawn = torch.tensor(data.draw(st.lists(ends, min_size=count, max_size=count)))
        boxes[name] = Interval(drawn[:, 0], drawn[:, 1])
    return boxes


def inside(boxes, place):
    """Index tensors of every pair of one box."""
    pairs = {}
    for axis, (name, box) in enumerate(boxes.items()):
        shape = [-1 if a == axis else 1 for a in range(4)]
        pairs[name] = torch.arange(int(box.lo[place]), int(box.hi[place]) + 1).view(shape)
    return pairs


def check_sound(expr, inputs, boxes):
    verdict = bounds(expr, inputs, boxes)
    count = len(boxes["q"].lo)
    always, maybe, faulty = (x.expand(count).tolist() for x in (verdict.always, verdict.maybe, verdict.faulty))
    for place in range(count):
        box = {name: (int(x.lo[place]), int(x.hi[place])) for name, x in boxes.items()}
        try:
            seen = evaluate(expr, inputs, inside(boxes, place))
        except MaskIndexError:
            assert faulty[place], f"a fault is hidden in {box}:\n{expr}"
            continue
        assert seen.all() or not always[place], f"not always in {box}:\n{expr}"
        assert maybe[place] or not seen.any(), f"not never in {box}:\n{expr}"


def random_trace(data, texts, brute):
    """The trace of a random predicate; None if it is refused."""
    try:
        return trace(brute.compile(data.draw(texts, label="predicate")))
    except MaskTraceError:
        return None


@given(data=st.data())
@settings(max_examples=250)
def test_bounds_are_sound(data, texts, brute):
    traced = random_trace(data, texts, brute)
    if traced is not None:
        check_sound(traced.expr, traced.bind({}), random_boxes(data, 8))


@given(data=st.data())
@settings(max_examples=250)
def test_integers_keep_to_their_cap(data, texts, brute):
    traced = random_trace(data, texts, brute)
    if traced is None:
        return
    expr, inputs = traced.expr, traced.bind({})
    cap = largest(expr, inputs, ENDS)
    box = {name: Interval(torch.tensor([first]), torch.tensor([last])) for name, (first, last) in ENDS.items()}
    if cap is None or cap >= 2**62:
        return  # beyond it they may wrap
    assert cap >= bounds(expr, inputs, box).largest
    values, _ = every_value(expr, inputs, inside(box, 0))
    wide = [value for value, node in zip(values, expr.nodes, strict=True) if node.dtype == torch.int64]
    assert all(value.abs().max() <= cap for value in wide)


INDICES = {"b": (0, 0), "h": (0, 0), "q": (0, 3), "kv": (0, 3)}


def test_a_difference_of_large_numbers_is_small():
    base = 2**61 + 3
    traced = trace(lambda b, h, q, kv: (q - base) - (kv - base) < 4)
    assert base <= largest(traced.expr, traced.bind({}), INDICES) < 2**62


def test_a_product_of_a_difference_is_bounded_to_the_last_bit():
    base = 2**61 + 3  # no float tells it from 2**61
    traced = trace(lambda b, h, q, kv: ((q - 2**61) - (kv - base)) * 2**60 < 4)
    assert largest(traced.expr, traced.bind({}), INDICES) >= 2**62


def test_what_may_have_wrapped_does_not_become_small_again():
    far, int8 = 2**62, torch.tensor([100] * 4, dtype=torch.int8)
    traced = trace(lambda b, h, q, kv: (q + far) - (kv + far) < 4)
    assert largest(traced.expr, traced.bind({}), INDICES) >= 2**62
    traced = trace(lambda b, h, q, kv: (int8[q] + 100) - q - 100 < kv)  # 200 is -56, and 228 is -28
    assert largest(traced.expr, traced.bind({}), INDICES) >= 128 + 3 + 100


def test_a_negative_number_made_a_byte_keeps_to_its_cap():
    traced = trace(lambda b, h, q, kv: q.to(torch.uint8).to(torch.int64) * 2 > kv)
    assert largest(traced.expr, traced.bind({}), INDICES) >= 2 * 255


def test_a_real_number_made_an_integer_has_no_cap_without_its_bounds():
    traced = trace(lambda b, h, q, kv: (q / 2).to(torch.int64) > kv)
    assert largest(traced.expr, traced.bind({}), INDICES) is None


def test_the_check_can_fail():
    builder = Builder()
    q = builder.add("q", dtype=torch.int64)
    expr = builder.finish(builder.add("gt", q, builder.const(3)))
    lying = builder.finish(builder.add("gt", q, builder.const(-9)))
    boxes = {name: Interval(torch.tensor([0]), torch.tensor([1])) for name in ENDS}
    check_sound(expr, Inputs(), boxes)
    with pytest.raises(AssertionError, match="not always"):
        verdict = bounds(lying, Inputs(), boxes)
        assert not verdict.always.all() or evaluate(expr, Inputs(), inside(boxes, 0)).all(), "not always"


# Tightness


def tiles(predicate, q_len, kv_len, block=16, batch=1, **mask_args):
    """Kinds of all tiles by bounds (1 always, 0 never, -1 undecided, -2 faulty) and by brute force (-1 mixed)."""
    traced = trace(predicate, mask_args)
    inputs = traced.bind(mask_args)

    def extent(length):
        start = torch.arange(0, length, block)
        return Interval(start, (start + block).clamp(max=length) - 1)

    q, kv = extent(q_len), extent(kv_len)
    b = torch.arange(batch).view(-1, 1, 1)
    zero = torch.zeros(1, 1, 1, dtype=torch.int64)
    boxes = {
        "b": Interval(b, b),
        "h": Interval(zero, zero),
        "q": Interval(q.lo.view(1, -1, 1), q.hi.view(1, -1, 1)),
        "kv": Interval(kv.lo.view(1, 1, -1), kv.hi.view(1, 1, -1)),
    }
    verdict = bounds(traced.expr, inputs, boxes)
    shape = (batch, len(q.lo), len(kv.lo))
    kinds = torch.where(verdict.always, 1, torch.where(verdict.maybe, -1, 0))
    kinds = torch.where(verdict.faulty, -2, kinds).expand(shape)
    pairs = {"b": b, "h": zero, "q": torch.arange(q_len).view(1, -1, 1), "kv": torch.arange(kv_len).view(1, 1, -1)}
    seen = evaluate(traced.expr, inputs, pairs)
    truth = torch.empty(shape, dtype=torch.int64)
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        n, i, j = place
        tile = seen[n, i * block : (i + 1) * block, j * block : (j + 1) * block]
        truth[n, i, j] = 1 if tile.all() else -1 if tile.any() else 0
    return kinds, truth


def assert_exact(predicate, *args, **kwargs):
    kinds, truth = tiles(predicate, *args, **kwargs)
    assert torch.equal(kinds, truth)
    assert set(truth.flatten().tolist()) >= {0, -1}


def documents(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def test_exact_on_causal_and_windows():
    assert_exact(lambda b, h, q, kv: q >= kv, 128, 100)
    assert_exact(lambda b, h, q, kv: 0 <= q - kv < 50, 128, 128)
    assert_exact(lambda b, h, q, kv: abs(q - kv) <= 40, 128, 128)
    assert_exact(lambda b, h, q, kv: q - kv >= -20 and q - kv <= 20, 120, 90)


def test_exact_on_documents():
    doc = documents(30, 5, 61, 32)
    assert_exact(lambda b, h, q, kv: doc[q] == doc[kv], 128, 128)
    both = torch.stack([doc, documents(64, 64)])
    assert_exact(lambda b, h, q, kv, *, ids: ids[b, q] == ids[b][kv], 128, 128, batch=2, ids=both)
    assert_exact(
        lambda b, h, q, kv: both.int()[b, q] == both[b, kv] if False else both[b, q] == both[b, kv], 128, 128, batch=2
    )


def test_causal_documents_leave_only_tiles_on_a_boundary():
    """A tile on the diagonal that spans documents, or one that two documents share, is all that stays open."""
    doc = documents(30, 5, 61, 32)
    kinds, truth = tiles(lambda b, h, q, kv: q >= kv and doc[q] == doc[kv], 128, 128)
    assert torch.equal(kinds, truth)


def test_exact_on_padding_prefix_and_global_tokens():
    lengths = torch.tensor([70, 128, 16])
    assert_exact(lambda b, h, q, kv: kv < lengths[b], 128, 128, batch=3)
    assert_exact(lambda b, h, q, kv: kv < 40 or kv <= q, 128, 128)
    assert_exact(lambda b, h, q, kv: kv < 4 or q < 4 or abs(q - kv) < 10, 128, 128)


def test_exact_on_document_offsets():
    doc, offset = documents(32, 48, 48), torch.tensor([0, 32, 80])
    kinds, truth = tiles(lambda b, h, q, kv: doc[q] == doc[kv] and q - offset[doc[q]] >= kv - offset[doc[kv]], 128, 128)
    assert torch.equal(kinds == 0, truth == 0)


def test_dilated_windows_settle_every_skipped_tile():
    kinds, truth = tiles(lambda b, h, q, kv: 0 <= q - kv < 60 and (q - kv) % 3 == 0, 256, 256)
    assert torch.equal(kinds, truth)


def test_neighbourhoods_in_two_dimensions_settle_most_skipped_tiles():
    width = height = 32

    def natten(b, h, q, kv):
        centre_x = (q % width).clamp(3, width - 4)
        centre_y = (q // width).clamp(3, height - 4)
        return abs(centre_x - kv % width) <= 3 and abs(centre_y - kv // width) <= 3

    kinds, truth = tiles(natten, 1024, 1024)
    assert ((kinds == 0) == (truth == 0)).double().mean() > 0.99
    settled = (kinds != -1).sum() / (truth != -1).sum()
    assert settled > 0.95


def test_circles_settle_every_tile_off_their_boundary():
    """A square is never negative, so that tiles far away in one direction are far away."""
    place = torch.arange(1024)
    x, y = place % 32, place // 32 * 1.0
    for circle in (
        lambda b, h, q, kv: (x[q] - x[kv]) ** 2 + (y[q] - y[kv]) ** 2 < 40.0,
        lambda b, h, q, kv: (x[q] - x[kv]) * (x[q] - x[kv]) + torch.square(y[q] - y[kv]) < 40,
        lambda b, h, q, kv: (x[q] - x[kv]) ** 4 + (y[q] - y[kv]) ** 2 <= 40,
    ):
        kinds, truth = tiles(circle, 1024, 1024)
        assert torch.equal(kinds, truth)
    assert (tiles(lambda b, h, q, kv: (x[q] - x[kv]) ** 2 >= 0, 128, 128)[0] == 1).all()
    assert (tiles(lambda b, h, q, kv: (q - kv) ** 6 < 0, 128, 128)[0] == 0).all()


def test_nothing_is_faulty_behind_a_guard():
    short = torch.arange(40)
    kinds, truth = tiles(lambda b, h, q, kv: q < 40 and kv < 40 and short[q] == short[kv], 128, 128)
    assert -2 not in kinds[0, 3:]
    assert (kinds == -2).sum() <= 5  # only tiles that hold the guard's edge
    assert torch.equal(kinds == 1, truth == 1)
    unguarded, _ = tiles(lambda b, h, q, kv: short[kv % 40] >= q, 64, 64)
    assert -2 not in unguarded


@pytest.mark.parametrize("offset", [0, 2**40, 2**62 - 200])
def test_large_row_numbers_are_sound(offset):
    traced = trace(lambda b, h, q, kv: (q * 3 - kv) % 5 < 2 or q + q < 0)
    q = torch.arange(offset, offset + 64)
    zero = torch.zeros(8, dtype=torch.int64)
    boxes = {
        "b": Interval(zero, zero),
        "h": Interval(zero, zero),
        "q": Interval(q[::8], q[7::8]),
        "kv": Interval(torch.arange(0, 64, 8), torch.arange(7, 64, 8)),
    }
    check_sound(traced.expr, traced.bind({}), boxes)


def test_a_bound_that_wraps_on_the_way_is_no_bound():
    """Each sum fits, and so does each element's total, but not the total of the greatest."""
    table = torch.tensor([0, 2**60, 2**61])
    zero = torch.zeros(1, dtype=torch.int64)
    boxes = {
        "b": Interval(zero, zero),
        "h": Interval(zero, zero),
        "q": Interval(zero, zero + 2),
        "kv": Interval(zero, zero),
    }
    for predicate in (
        lambda b, h, q, kv: (table[q] + table[q]) + (table[q] + table[q]) > 1,
        lambda b, h, q, kv: (table[q] - -table[q]) - (-table[q] - table[q]) > 1,
        lambda b, h, q, kv: (table[q] * 2) * 2 > 1,
        lambda b, h, q, kv: table[q] << 2 > 1,
    ):
        traced = trace(predicate)
        check_sound(traced.expr, traced.bind({}), boxes)


def test_a_verdict_costs_no_more_than_it_looks_at():
    """Shapes that broadcast stay broadcast: a mask of kv alone is bounded once per column."""
    traced = trace(lambda b, h, q, kv: kv < 7)
    boxes = {name: Interval(*[torch.zeros(4 if name == "kv" else 1, 1, dtype=torch.int64)] * 2) for name in ENDS}
    assert bounds(traced.expr, traced.bind({}), boxes).always.shape == (4, 1)


def test_range_minima_are_shared_and_follow_their_tables():
    doc = documents(30, 5, 61, 32)
    traced = trace(lambda b, h, q, kv: doc[q] == doc[kv])
    zero = torch.zeros(1, dtype=torch.int64)
    ends = Interval(torch.arange(0, 128, 16), torch.arange(15, 128, 16))
    boxes = {"b": Interval(zero, zero), "h": Interval(zero, zero), "q": ends, "kv": ends}
    ranges = RangeMinima()
    first = bounds(traced.expr, traced.bind({}), boxes, ranges)
    again = bounds(traced.expr, traced.bind({}), boxes, ranges)
    assert torch.equal(first.always, again.always)
    other = Inputs((), (torch.arange(128),))
    assert not torch.equal(bounds(traced.expr, other, boxes, ranges).always, first.always)
    assert math.prod(first.maybe.shape) == 8
