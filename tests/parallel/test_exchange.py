"""Stages: every key that is needed and held elsewhere arrives once, in order, and its gradient goes back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
pytest.importorskip("torch.distributed")
from maskflash.parallel import exchange  # noqa: E402
from maskflash.parallel.needs import find_needs  # noqa: E402
from maskflash.parallel.routes import find_routes  # noqa: E402
from tests.parallel.on_shards import shards_by_line  # noqa: E402

CPU = torch.device("cpu")


class Carried:
    """What one rank hands over, to be brought to others later."""

    place = 0

    def all_to_all(self, received, sent, of_each, to_each, *, wait):
        self.received, self.parts = received, sent.split(list(to_each))
        assert received.dtype == sent.dtype == torch.uint8 and len(received) == sum(of_each) and not wait
        self.of_each = of_each
        return self

    def wait(self):
        pass


def bring(carried):
    """Do what torch would do with what all ranks handed over."""
    for rank, one in enumerate(carried):
        one.received.copy_(torch.cat([other.parts[rank] for other in carried]))
        assert tuple(len(other.parts[rank]) for other in carried) == tuple(one.of_each)


@st.composite
def layouts(draw):
    mask, length, tile = draw(masks()), draw(st.integers(1, 60)), draw(st.integers(1, 9))
    ranks = draw(st.integers(1, 5))
    lines = -(-length // tile)
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=lines, max_size=lines))
    shards = shards_by_line(owner, length, tile)
    return mask, length, tile, (*shards, *[()] * (ranks - len(shards)))


@given(layout=layouts(), count=st.integers(1, 4))
@settings(max_examples=60)
def test_all_that_is_needed_arrives_in_order_and_its_gradient_returns(layout, count):
    mask, length, tile, shards = layout
    problem = mask.at(length, length, batch=2, heads=4).problem
    try:
        dense = problem.visible(*(torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
                                  for d, n in enumerate((2, 4, length, length))))  # fmt: skip
    except mf.MaskIndexError:
        return
    seen = dense.expand(2, 4, length, length).any(0).any(0).numpy()
    held = [np.concatenate([np.arange(0), *(np.arange(*x) for x in ranges)]) for ranges in shards]
    routes = find_routes(find_needs(problem, tile), shards)
    of_ranks = [exchange.find_stages(routes, shards, rank, count, CPU) for rank in range(len(shards))]
    assert len({len(stages) for stages in of_ranks}) == 1
    k, v = torch.randn(2, 2, length, 3, dtype=torch.float64), torch.randn(2, 2, length, 2, dtype=torch.float64)
    arrived = [[] for _ in shards]
    returned = [[torch.zeros(2, 2, len(tokens), d, dtype=torch.float64) for d in (3, 2)] for tokens in held]
    for stages in zip(*of_ranks, strict=True):
        assert any(len(stage.keys.at) for stage in stages), "nobody receives anything: there is no such stage"
        carried = [Carried() for _ in shards]
        coming = [
            exchange.send_keys(stage, k[:, :, tokens], v[:, :, tokens], each)
            for stage, tokens, each in zip(stages, held, carried, strict=True)
        ]
        bring(carried)
        carried, back = [Carried() for _ in shards], []
        for rank, (stage, rows) in enumerate(zip(stages, coming, strict=True)):
            keys, values = exchange.keys_of(stage, rows.wait(), k, v)
            at = stage.keys.at
            assert bool((at.diff() > 0).all())
            assert torch.equal(keys, k[:, :, at]) and torch.equal(values, v[:, :, at])
            if stage.keys.first is not None:
                assert torch.equal(at, torch.arange(len(at)) + stage.keys.first)
            arrived[rank] += at.tolist()
            back.append(exchange.send_back(stage, keys * (rank + 1), values * (rank + 1), carried[rank]))
        bring(carried)
        for stage, rows, gradients in zip(stages, back, returned, strict=True):
            exchange.add_back(stage, rows.wait(), *gradients)
    times = torch.zeros(length, dtype=torch.float64)
    for rank, (tokens, own) in enumerate(zip(arrived, held, strict=True)):
        needed = np.setdiff1d(np.flatnonzero(seen[own].any(0)), own)
        assert sorted(tokens) == needed.tolist()
        times[needed] += rank + 1
    for own, gradients in zip(held, returned, strict=True):
        for whole, gradient in zip((k, v), gradients, strict=True):
            torch.testing.assert_close(gradient, whole[:, :, own] * times[own][:, None])
