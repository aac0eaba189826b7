"""Swaps: what they leave is counted as if from the start, they never cost more, and ranks keep as many chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.parallel.price import Load
from maskflash.parallel.swaps import Aim, Chunks, Swaps


@st.composite
def deals(draw):
    """Random needs, and a deal of the chunks; some ranks have room left."""
    ranks, room, wide = draw(st.integers(2, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    count = draw(st.integers(1, ranks * room))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    home = np.repeat(np.arange(count), wide)
    sees = random.random((count, len(home))) < draw(st.sampled_from([0.05, 0.3, 0.7]))
    chunks = Chunks(sees, random.integers(1, 9, len(home)) * 1.0, home, random.integers(0, 99, count) * 1.0, ranks)
    owner = random.permutation(np.repeat(np.arange(ranks), chunks.slots))[:count]
    return chunks, sees, owner


def counted(chunks, sees, owner):
    """Work, keys received and keys sent of each rank, key by key."""
    work, received, sent = (np.zeros(chunks.ranks) for _ in range(3))
    for chunk, rank in enumerate(owner):
        work[rank] += chunks.area[chunk]
    for column, home in enumerate(chunks.home):
        for rank in range(chunks.ranks):
            if rank != owner[home] and sees[owner == rank, column].any():
                received[rank] += chunks.width[column]
                sent[owner[home]] += chunks.width[column]
    return work, received, sent


def aim(work, keys, most):
    """Of a transfer of `keys` received and sent that takes as long as the work, in either pass."""
    return Aim(work=work, forward=keys, backward=keys, back=0.25, weight=0.3, limit=1.019, most=most)


@given(deals())
def test_a_deal_is_counted(deal):
    chunks, sees, owner = deal
    for got, expected in zip(Swaps(chunks, owner).count[3:], counted(chunks, sees, owner), strict=True):
        np.testing.assert_allclose(got, expected)


@given(deals(), st.data())
def test_swaps_are_counted_as_new_deals(deal, data):
    """Each of several pairs as if it alone had swapped."""
    chunks, sees, owner = deal
    swaps = Swaps(chunks, owner)
    slot = st.integers(0, len(swaps.owner) - 1)
    pairs = data.draw(st.lists(st.tuples(slot, slot).filter(lambda x: swaps.owner[x[0]] != swaps.owner[x[1]])))
    ones, others = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    needs, count = swaps.swapped(ones, others)
    for place, pair in enumerate(pairs):
        after = swaps.owner.copy()
        after[[*pair]] = after[[*pair[::-1]]]
        for got, expected in zip(count[3:], counted(chunks, sees, after[: len(owner)]), strict=True):
            np.testing.assert_allclose(got[place], expected)
        for rank, got in zip(swaps.owner[[*pair]], needs[:, place], strict=True):
            assert (got == chunks.sees[after == rank].sum(0)).all()


@settings(max_examples=150)
@given(deals(), st.sampled_from([1.0, 20.0, 1e9]))
def test_swaps_never_cost_more(deal, keys):
    chunks, sees, owner = deal
    swaps = Swaps(chunks, owner)
    most = max(swaps.count.received.max(), swaps.count.sent.max(), 1)
    wanted = aim(max(swaps.count.work.mean(), 1), keys, most)
    before = swaps.costs(wanted).sum()
    swaps.improve(wanted)
    assert swaps.costs(wanted).sum() <= before
    assert np.bincount(swaps.owner).tolist() == [chunks.slots] * chunks.ranks
    assert sorted(swaps.members.ravel()) == list(range(len(swaps.owner)))
    assert (swaps.owner[swaps.members] == np.arange(chunks.ranks)[:, None]).all()
    for got, expected in zip(swaps.count[3:], counted(chunks, sees, swaps.owner[: len(owner)]), strict=True):
        np.testing.assert_allclose(got, expected)


def test_swaps_balance():
    """Eight chunks that need nothing, of areas 7 to 0, in order on two ranks: 22 to 6 becomes 14 to 14."""
    area = np.arange(7, -1, -1) * 1.0
    chunks = Chunks(np.zeros((8, 8), dtype=bool), np.ones(8), np.arange(8), area, 2)
    swaps = Swaps(chunks, np.repeat([0, 1], 4))
    assert swaps.count.work.tolist() == [22, 6]
    swaps.improve(aim(14, 1e9, 1))
    assert swaps.count.work.tolist() == [14, 14]


def test_swaps_bring_together_what_needs_one_another():
    """Four documents of two chunks, dealt apart."""
    same = np.arange(8) // 2
    chunks = Chunks(same[:, None] == same, np.ones(8), np.arange(8), np.ones(8), 4)
    swaps = Swaps(chunks, np.array([0, 1, 1, 2, 2, 3, 3, 0]))
    assert swaps.count.received.sum() == 8
    swaps.improve(aim(2, 1e9, 2))
    assert swaps.count.received.sum() == 0


@given(st.integers(0, 1000), st.integers(2, 4), st.integers(1, 3), st.sampled_from([0, 2**30]))
def test_swaps_are_estimated_well_where_their_own_keys_play_no_part(seed, ranks, slots, wide):
    """All keys belong to a chunk of the last rank, and the others swap; of wide columns sums don't fit 32 bits."""
    random = np.random.default_rng(seed)
    count = (ranks + 1) * slots
    sees, home = random.random((count, 9)) < 0.4, np.full(9, count - 1)
    chunks = Chunks(sees, random.integers(1, 9, 9) + 1.0 * wide, home, random.integers(0, 99, count) * 1.0, ranks + 1)
    swaps = Swaps(chunks, np.repeat(np.arange(ranks + 1), slots))
    wanted = aim(50, 20 + 2 * wide, 10 + wide)
    gains = swaps.estimate(np.arange(ranks), wanted)
    for one in range(ranks * slots):
        for other in range(ranks * slots):
            pair = swaps.owner[[one, other]]
            if pair[0] >= pair[1]:
                assert gains[one, other] == np.inf
                continue
            _, after = swaps.swapped(np.array([one]), np.array([other]))
            costs = wanted.cost(*(x[0, pair] for x in after[3:])), swaps.costs(wanted)[pair]
            rounding = 1e-5 * (10 + max(x.max() for x in costs))  # of 32 bits
            np.testing.assert_allclose(gains[one, other], costs[0].sum() - costs[1].sum(), rtol=1e-6, atol=rounding)


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3), st.sampled_from([1, 4]), st.sampled_from([0, 0.25]))
def test_a_share_costs_what_it_takes_beyond_the_limit(work, received, sent, head_ranks, over):
    """Forward keys come, backward they come again and their gradients go: as `price` counts them, but for latencies."""
    load = Load(1, 8, 4, 64, torch.bfloat16)
    key, gradient = load.key_bytes(head_ranks), load.gradient_bytes(head_ranks)
    wanted = Aim(
        work=10,
        forward=4 / key,
        backward=10 / (key + gradient),
        back=key / (key + gradient),
        weight=4 / 14,
        limit=1 + over,
        most=1e9,
    )
    forward = max(4 * work / 10, key * max(received, sent))
    backward = max(10 * work / 10, max(key * x + gradient * y for x, y in ((received, sent), (sent, received))))
    expected = 300 * max((forward + backward) / 14 - 1 - over, 0)
    found = wanted.cost(*(np.array([x]) for x in (work, received, sent)))
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_swaps_take_about_as_many_steps_as_they_may():
    """A pass is whole, so that the last may go beyond."""
    random = np.random.default_rng(0)
    chunks = Chunks(random.random((64, 64)) < 0.1, np.ones(64), np.arange(64), random.random(64), 8)
    swaps = Swaps(chunks, np.arange(64) // 8)
    assert swaps.improve(aim(4, 1e9, 8), 0) == 0 and swaps.turn == 0
    assert 0 < swaps.improve(aim(4, 1e9, 8), 1) < swaps.improve(aim(4, 1e9, 8), 1e12)
