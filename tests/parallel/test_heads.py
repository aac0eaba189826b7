"""Heads against tokens: every rank gets all tokens of some heads, and its own tokens' results back."""

import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.parallel.heads import HeadExchange, joined, share

CPU = torch.device("cpu")


class Room:
    """Threads that stand for ranks: what one sends is there when all have sent."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.sent = ranks, threading.Barrier(ranks, timeout=60), {}

    def run(self, work):
        """work(peers) on each rank, by rank."""
        found, errors = [None] * self.ranks, []

        def be(place):
            try:
                found[place] = work(Here(self, place))
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=be, args=(place,)) for place in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found


class Here:
    """`Peers` among threads. It counts the bytes that come from others."""

    def __init__(self, room, place):
        self.room, self.place, self.bytes = room, place, 0

    def all_to_all(self, received, sent, of_each, to_each):
        self.room.sent[self.place] = sent.split(list(to_each))
        self.room.barrier.wait()
        for source, rows in enumerate(received.split(list(of_each))):
            given = self.room.sent[source][self.place]
            assert given.shape == rows.shape and given.dtype == rows.dtype
            rows.copy_(given)
            self.bytes += given.nbytes if source != self.place else 0
        self.room.barrier.wait()


@st.composite
def splits(draw):
    """Shards of up to four ranks, of which some may be empty."""
    ranks, tile = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    length = draw(st.integers(0, 12))
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=length, max_size=length))
    last = length * tile - draw(st.integers(0, tile - 1)) if length else 0
    shards = []
    for rank in range(ranks):
        ranges = []
        for at in (i for i, one in enumerate(owner) if one == rank):
            start, stop = at * tile, min((at + 1) * tile, last)
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        shards.append(tuple(ranges))
    return tuple(shards), last


def held(x, ranges):
    return torch.cat([x[:, :, :0], *(x[:, :, start:stop] for start, stop in ranges)], 2)


@given(splits(), st.integers(0, 2), st.integers(1, 2), st.sampled_from([torch.float64, torch.bfloat16]))
def test_each_rank_has_all_tokens_of_its_heads_and_gradients_go_back(split, batch, each, dtype):
    shards, length = split
    ranks = len(shards)
    dims = [(2 * each, 5), (each, 3), (each, 4)]
    whole = [torch.randn(batch, heads * ranks, length, dim, dtype=dtype) for heads, dim in dims]
    weights = [torch.randn_like(x) for x in whole]

    def work(peers):
        exchange = HeadExchange.of(shards, peers, CPU)
        own = [held(x, shards[peers.place]).requires_grad_() for x in whole]
        parts = exchange.to_heads(*own)
        for x, part in zip(whole, parts, strict=True):
            assert torch.equal(part, x.chunk(ranks, 1)[peers.place])
        back = exchange.to_tokens(*(part * weight.chunk(ranks, 1)[peers.place] for part, weight in both(parts)))
        for x, weight, y in zip(whole, weights, back, strict=True):
            assert torch.equal(y, held(x * weight, shards[peers.place]))
        torch.autograd.backward(back, [torch.ones_like(y) for y in back])
        for x, weight in zip(own, weights, strict=True):
            assert torch.equal(x.grad, held(weight, shards[peers.place]))
        own_tokens, others = own[0].shape[2], length - own[0].shape[2]
        row = batch * sum(heads * dim for heads, dim in dims) * dtype.itemsize
        assert peers.bytes == 2 * row * (others + (ranks - 1) * own_tokens)

    def both(parts):
        return zip(parts, weights, strict=True)

    Room(ranks).run(work)


def test_an_out_and_its_lse_have_a_way_back_that_both_gradients_take():
    shards = (((0, 3), (7, 9)), ((3, 7),))
    out, lse = torch.randn(2, 4, 9, 3, dtype=torch.bfloat16), torch.randn(2, 4, 9, 1)

    def work(peers):
        exchange = HeadExchange.of(shards, peers, CPU)
        own = [x.chunk(2, 1)[peers.place].clone().requires_grad_() for x in (out, lse)]
        found = exchange.to_tokens(*own)
        for x, y in zip((out, lse), found, strict=True):
            assert y.dtype == x.dtype and torch.equal(y, held(x, shards[peers.place]))
        found[0].sum().backward()  # nobody asks for the lse's, which is 0, and still sent: no rank waits for another
        assert torch.equal(own[0].grad, torch.ones_like(own[0])) and not own[1].grad.any()

    Room(2).run(work)


@given(splits(), st.data())
def test_rows_of_ranks_hold_what_their_ranks_hold(split, data):
    shards, _ = split
    head_ranks = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if len(shards) % n == 0]))
    found = joined(shards, head_ranks)
    assert len(found) == len(shards) // head_ranks
    for t, ranges in enumerate(found):
        of_ranks = [at for held in shards[t * head_ranks : (t + 1) * head_ranks] for x in held for at in range(*x)]
        assert [at for x in ranges for at in range(*x)] == sorted(of_ranks)
        assert all(start < stop for start, stop in ranges)
        assert all(before[1] < after[0] for before, after in pairwise(ranges))


def test_heads_that_cannot_be_shared_out_are_refused():
    assert [share("parallel.compile", 8, 4, 4, place) for place in (0, 3)] == [range(2), range(6, 8)]
    with pytest.raises(
        mf.ArgumentError, match=r"parallel.compile: q has 6 heads, expected a multiple of .* 4 head ran"
    ):
        share("parallel.compile", 6, 2, 4, 0)
    with pytest.raises(mf.ArgumentError, match=r"k has 2 heads, expected a multiple of the plan's 4 .* kv_heads="):
        share("parallel.compile", 8, 2, 4, 0)
