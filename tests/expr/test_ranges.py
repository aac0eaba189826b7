"""Range minima bound every element that a range of indices reaches, and exactly where granules allow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.expr import ranges
from maskflash.expr.intervals import Interval
from maskflash.expr.ranges import RangeMinima

DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32]


def reached_elements(table, boxes, place):
    """The elements whose index lies in one box, or None if one is out of range."""
    axes = [range(int(box.lo[place]), int(box.hi[place]) + 1) for box in boxes]
    if any(i < -n or i >= n for axis, n in zip(axes, table.shape, strict=True) for i in axis):
        return None
    chosen = table
    for dim, axis in enumerate(axes):
        chosen = chosen.index_select(dim, torch.tensor([i % table.shape[dim] for i in axis]))
    return chosen


@given(data=st.data(), dtype=st.sampled_from(DTYPES), granules=st.sampled_from([1, 3, 8192]))
@settings(max_examples=200)
def test_bounds_of_every_range(data, dtype, granules):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    table = (torch.randn(shape) * 30).to(dtype) if dtype != torch.bool else torch.rand(shape) > 0.5
    boxes = []
    for n in shape:
        ends = st.tuples(st.integers(-n - 1, n), st.integers(-n - 1, n)).map(sorted)
        drawn = torch.tensor(data.draw(st.lists(ends, min_size=5, max_size=5)))
        boxes.append(Interval(drawn[:, 0], drawn[:, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_GRANULES", granules)
        bound, fault = RangeMinima().lookup(table, boxes)
    for place in range(5):
        found = reached_elements(table, boxes, place)
        if found is None:
            assert fault[place]
            continue
        assert not fault[place]
        lo, hi = bound.lo[place], bound.hi[place]
        assert (found >= lo).all()
        assert (found <= hi).all()


@pytest.mark.parametrize("size", [1, 2, 7, 8192, 8193, 20_000])
def test_aligned_ranges_are_exact(size):
    table = torch.randint(-1000, 1000, (size,))
    start = torch.arange(0, size, 128)
    stop = (start + 128).clamp(max=size) - 1
    bound, fault = RangeMinima().lookup(table, [Interval(start, stop)])
    parts = table.split(128)
    assert bound.lo.tolist() == [int(part.min()) for part in parts]
    assert bound.hi.tolist() == [int(part.max()) for part in parts]
    assert not fault.any()


def test_single_elements_are_exact_in_any_dimensions():
    table = torch.arange(24).view(2, 3, 4)
    index = [Interval(i, i) for i in (torch.tensor([1, -1]), torch.tensor([2, 0]), torch.tensor([3, -4]))]
    bound, fault = RangeMinima().lookup(table, index)
    assert bound.lo.tolist() == bound.hi.tolist() == [23, 12]
    assert not fault.any()


def test_a_table_without_elements_is_a_fault_everywhere():
    index = Interval(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    for table in (torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int32)):
        _, fault = RangeMinima().lookup(table, [index])
        assert fault.all()


def test_a_scalar_is_itself():
    bound, fault = RangeMinima().lookup(torch.tensor(7), [])
    assert (bound.lo, bound.hi, fault) == (7, 7, None)


def test_nan_anywhere_makes_a_range_unknown():
    table = torch.tensor([1.0, float("nan"), 3.0])
    index = Interval(torch.tensor([0, 2]), torch.tensor([2, 2]))
    bound, _ = RangeMinima().lookup(table, [index])
    assert bound.lo.isnan().tolist() == bound.hi.isnan().tolist() == [True, False]


def test_extremes_bound_a_table():
    minima = RangeMinima()
    assert minima.extremes(torch.tensor([3, -7])) == (-7, 3)
    assert minima.extremes(torch.tensor([torch.iinfo(torch.int64).min])) == (-(2.0**63), -(2.0**63))
    assert minima.extremes(torch.zeros(0, dtype=torch.int64)) == (0, 0)
    assert minima.extremes(torch.tensor([1], dtype=torch.uint8)) == (0, 255)
    assert minima.extremes(torch.tensor([1], dtype=torch.int8)) == (-128, 127)
    assert minima.extremes(torch.tensor([True])) == (0, 1)


def test_a_new_table_never_meets_an_old_one_s_minima():
    minima = RangeMinima()
    index = [Interval(torch.tensor([0]), torch.tensor([3]))]
    for value in range(50):
        bound, _ = minima.lookup(torch.full((4,), value), index)
        assert bound.lo.item() == value
