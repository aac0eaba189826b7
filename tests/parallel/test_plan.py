"""Plans as users see them: what they hold, how tensors follow them, and what they refuse."""

import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.parallel import Links, ShardPlan
from maskflash.testing import masks
from tests.parallel.shards import dealt

SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
SHARDS = (((0, 2), (6, 7)), (), ((2, 6),))
PLAN = mf.parallel.plan(mf.causal(), 7, 3, chunk=1, shards=SHARDS, **SIZES)


@settings(max_examples=100)
@given(masks(), st.integers(1, 64), st.integers(1, 70), st.integers(1, 9), st.data())
def test_a_plan_of_shards_is_what_all_pairs_say(mask, length, tile, ranks, data):
    _, shards = data.draw(dealt(length, tile, ranks))
    check(mask, mf.parallel.plan(mask, length, ranks, chunk=tile, shards=shards, **SIZES))


@settings(max_examples=10)
@given(masks(), st.integers(1, 64), st.integers(1, 9), st.sampled_from([None, 1, 3, 16, 200]))
def test_a_plan_that_was_searched_is_what_all_pairs_say(mask, length, ranks, chunk):
    plan = mf.parallel.plan(mask, length, ranks, chunk=chunk, **SIZES)
    assert plan.tile == (128 if chunk is None else chunk)
    most = math.ceil(math.ceil(length / ranks) / plan.tile) * plan.tile
    assert all(plan.tokens(rank) <= most for rank in range(ranks))
    assert plan.name in {one.name for one in plan.tried}
    chosen = next(one for one in plan.tried if (one.name, one.head_ranks) == (plan.name, plan.head_ranks))
    assert plan.seconds == pytest.approx(chosen.seconds)
    assert plan.head_ranks > 1 or plan.imbalance == pytest.approx(chosen.imbalance)
    assert chosen.bytes_max == max(*plan.bytes_received, *plan.bytes_sent)
    assert chosen.bytes_sum == sum(plan.bytes_received)
    check(mask, plan)


def check(mask, plan):
    """Everything that is counted, again from all pairs."""
    length, ranks = plan.seq_len, plan.world_size
    held = torch.full((length,), -1)
    for rank in range(ranks):
        assert plan.tokens(rank) == len(plan.positions(rank)) and (held[plan.positions(rank)] == -1).all()
        held[plan.positions(rank)] = rank
    assert (held >= 0).all()
    dense = mask.dense(length, length, batch=2, heads=4).sum((0, 1))
    group = held // plan.head_ranks
    needed = torch.stack([(dense[group == held_by // plan.head_ranks] > 0).any(0) for held_by in range(ranks)])
    work = [int(dense[group == rank // plan.head_ranks].sum()) / plan.head_ranks for rank in range(ranks)]
    assert plan.work == pytest.approx(work, abs=0.5)
    others = [needed[rank] & (group != rank // plan.head_ranks) for rank in range(ranks)]
    assert list(plan.received) == [int(x.sum()) for x in others]
    first = range(0, ranks, plan.head_ranks)
    sent = [sum(int(others[t][group == rank // plan.head_ranks].sum()) for t in first) for rank in range(ranks)]
    assert list(plan.sent) == sent
    if plan.head_ranks == 1:
        key = 2 * 2 * 2 * 8 * 4  # k and v, batch, heads, head_dim, bytes
        assert plan.forward.received == tuple(key * x for x in plan.received)
        assert plan.forward.sent == tuple(key * x for x in plan.sent)
        assert plan.bytes_received == tuple(key * (2 * x + y) for x, y in zip(plan.received, plan.sent, strict=True))
        assert plan.bytes_sent == tuple(key * (2 * y + x) for x, y in zip(plan.received, plan.sent, strict=True))
        sources = [len({int(x) for x in held[others[rank]].tolist()}) for rank in range(ranks)]
        targets = [sum(bool((others[t] & (held == rank)).any()) for t in range(ranks)) for rank in range(ranks)]
        assert plan.forward.messages == tuple(map(max, zip(sources, targets, strict=True)))


@settings(max_examples=30)
@given(masks(), st.integers(1, 64), st.sampled_from([1, 2]), st.integers(1, 4), st.sampled_from(["nvlink", "cpu"]))
def test_a_plan_has_the_head_ranks_that_were_asked_for(mask, length, head_ranks, groups, links):
    ranks = head_ranks * groups
    plan = mf.parallel.plan(mask, length, ranks, chunk=3, head_ranks=head_ranks, links=links, **SIZES)
    assert plan.head_ranks == head_ranks and {one.head_ranks for one in plan.tried} == {head_ranks}
    check(mask, plan)
    free = mf.parallel.plan(mask, length, ranks, chunk=3, links=links, **SIZES)
    if free.head_ranks == head_ranks:
        assert free.shards == plan.shards
    given = mf.parallel.plan(mask, length, ranks, chunk=3, head_ranks=head_ranks, shards=plan.shards, **SIZES)
    assert (given.name, given.head_ranks, given.received) == ("given", head_ranks, plan.received)
    check(mask, given)


def test_shards_of_ones_own_are_counted_as_they_are():
    assert PLAN.shards == SHARDS and PLAN.name == "given" and PLAN.tried == ()
    assert PLAN.work == (8 * (1 + 2 + 7), 0, 8 * (3 + 4 + 5 + 6))
    assert PLAN.received == (4, 0, 2) and PLAN.sent == (2, 0, 4)
    assert PLAN.imbalance == pytest.approx(18 / ((10 + 18) / 3))


def test_bytes_of_half_types_come_back_in_float32():
    plan = mf.parallel.plan(mf.causal(), 7, 3, chunk=1, shards=SHARDS, **{**SIZES, "dtype": torch.bfloat16})
    key = 2 * 2 * 2 * 8
    assert plan.forward.received == (key * 2 * 4, 0, key * 2 * 2)
    assert plan.backward.received == (key * (2 * 4 + 4 * 2), 0, key * (2 * 2 + 4 * 4))
    assert plan.backward.sent == (key * (2 * 2 + 4 * 4), 0, key * (2 * 4 + 4 * 2))


def test_layers_are_summed():
    window, causal = mf.sliding_window(1), mf.causal()
    plan = mf.parallel.plan([(window, 3), causal], 7, 3, chunk=1, shards=SHARDS, **SIZES)
    alone = [mf.parallel.plan(x, 7, 3, chunk=1, shards=SHARDS, **SIZES) for x in (window, causal)]
    assert [(layer.name, layer.count) for layer in plan.layers] == [(window.name, 3), (causal.name, 1)]
    assert replace(plan.layers[0], count=1) == alone[0].layers[0] and plan.layers[1] == alone[1].layers[0]
    for name in ("work", "received", "sent", "bytes_received", "bytes_sent"):
        assert getattr(plan, name) == tuple(3 * x + y for x, y in zip(*(getattr(p, name) for p in alone), strict=True))
    assert plan.seconds == pytest.approx(3 * alone[0].seconds + alone[1].seconds)


def test_a_pass_waits_for_its_slowest_rank():
    links = Links(flops=1e3, bandwidth=1e6, latency=0.25)
    plan = mf.parallel.plan(mf.causal(), 7, 3, chunk=1, shards=SHARDS, links=links, **SIZES)
    for backward, one in ((False, plan.forward), (True, plan.backward)):
        for rank in range(3):
            compute = links.compute(plan.work[rank], 8, backward=backward)
            transfer = links.transfer(one.received[rank], one.sent[rank], one.messages[rank])
            assert one.seconds[rank] == pytest.approx(max(compute, transfer))
    assert plan.seconds == max(plan.forward.seconds) + max(plan.backward.seconds)


def test_arguments_go_to_the_masks_that_take_them():
    near = mf.mask(lambda b, h, q, kv, *, reach: q - kv < reach)
    packed = mf.mask(lambda b, h, q, kv, *, doc: doc[b, q] == doc[b, kv])
    doc = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    plan = mf.parallel.plan([near, packed], 7, 3, chunk=1, shards=SHARDS, reach=2, doc=doc)
    assert plan.layers[0].work == mf.parallel.plan(near, 7, 3, chunk=1, shards=SHARDS, reach=2).work
    assert plan.layers[1].work == mf.parallel.plan(packed, 7, 3, chunk=1, shards=SHARDS, doc=doc).work
    with pytest.raises(mf.ArgumentTypeError, match=r"parallel.plan: the mask needs doc"):
        mf.parallel.plan([near, packed], 7, 3, reach=2)
    with pytest.raises(mf.ArgumentTypeError, match=r"parallel.plan: unexpected argument 'dox'"):
        mf.parallel.plan([near, packed], 7, 3, reach=2, doc=doc, dox=1)
    taken = mf.mask(lambda b, h, q, kv, *, chunk: q // chunk == kv // chunk)
    with pytest.raises(mf.ArgumentError, match=r"the argument 'chunk' of .* would never reach it"):
        mf.parallel.plan(taken, 7, 3, chunk=2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_shards_of_a_tensor_make_it_whole_again(dim, device):
    x = torch.randn(3, 4, 5, device=device).movedim(0, dim).contiguous()
    x = x.repeat_interleave(3, dim).narrow(dim, 0, 7)
    parts = [PLAN.shard(x, rank, dim) for rank in range(3)]
    assert [part.shape[dim] for part in parts] == [3, 0, 4]
    whole = PLAN.unshard(parts, dim)
    assert whole.shape == x.shape
    if device == "cpu":
        assert torch.equal(parts[0], x.index_select(dim, PLAN.positions(0))) and torch.equal(whole, x)
        assert torch.equal(PLAN.unshard(parts[::1], dim), x)


def test_gradients_go_through_shards():
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(PLAN.shard(x, rank) for rank in (0, 2)), x)
    parts = [PLAN.shard(x.detach(), rank).requires_grad_() for rank in range(3)]
    assert torch.autograd.gradcheck(lambda *parts: PLAN.unshard(parts), parts)


def test_positions_are_the_tokens_of_a_rank():
    assert PLAN.positions(0).tolist() == [0, 1, 6] and PLAN.positions(1).tolist() == []
    assert PLAN.positions(2, "cpu").shape == (4,) and PLAN.positions(2).dtype == torch.int64


def test_a_plan_is_plain_data():
    plan = mf.parallel.plan([(mf.sliding_window(30), 2), mf.causal()], 300, 3, links="cpu", **SIZES)
    for one in (plan, PLAN):
        assert pickle.loads(pickle.dumps(one)) == one
        assert ShardPlan.from_dict(json.loads(json.dumps(one.to_dict()))) == one
        assert ShardPlan.from_dict(one.to_dict()) == one
    assert hash(plan) != hash(PLAN) and plan != PLAN


def test_a_fingerprint_is_of_who_holds_what():
    again = mf.parallel.plan(mf.full(), 7, 3, chunk=1, shards=SHARDS)
    assert again != PLAN and again.fingerprint() == PLAN.fingerprint() and len(PLAN.fingerprint()) == 64
    others = [
        replace(PLAN, shards=(SHARDS[1], SHARDS[0], SHARDS[2])),
        replace(PLAN, head_ranks=3),
        replace(PLAN, tile=2),
        mf.parallel.plan(mf.causal(), 8, 3, chunk=1),
    ]
    assert len({plan.fingerprint() for plan in [PLAN, *others]}) == 5


def test_a_report_says_what_each_rank_does():
    plan = mf.parallel.plan([(mf.sliding_window(30), 2), mf.causal()], 300, 3, chunk=10, **SIZES)
    text = plan.report()
    assert text.startswith(f"300 tokens on 3 ranks: {plan.name}.\n")
    for rank in range(3):
        line = next(line for line in text.splitlines() if line.startswith(f"{rank} ")).split()
        assert line[1] == f"{plan.tokens(rank)}" and line[5] == f"{plan.received[rank]:,}"
    for layer in plan.layers:
        assert f"\n{layer.name} " in text
    for one in plan.tried:
        assert f"\n{one.name} " in text
    assert "and 36 more ranks" in mf.parallel.plan(mf.causal(), 100, 100, chunk=1).report()
    assert repr(PLAN) == "ShardPlan(7 tokens on 3 ranks, given, imbalance 1.929, 6 keys travel)"


def test_a_report_says_that_more_keys_travel_than_are_seen():
    inexact = replace(PLAN, layers=(replace(PLAN.layers[0], exact=False),))
    assert "Some keys that nobody sees count as needed" in inexact.report()
    assert "Some keys" not in PLAN.report()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"seq_len": 0}, r"seq_len is 0, expected at least 1"),
        ({"world_size": 0}, r"world_size is 0, expected at least 1"),
        ({"kv_heads": 3}, r"kv_heads is 3, expected a divisor of heads, 4"),
        ({"head_ranks": 0}, r"head_ranks is 0, expected at least 1"),
        ({"head_ranks": 2}, r"head_ranks is 2, expected a divisor of world_size, 3"),
        ({"world_size": 3, "head_ranks": 3}, r"head_ranks is 3, expected a divisor of heads, 4"),
        ({"world_size": 4, "head_ranks": 4}, r"head_ranks is 4, expected a divisor of kv_heads, 2"),
        ({"chunk": 0}, r"chunk is 0, expected at least 1"),
        ({"mask": []}, r"mask is an empty sequence"),
        ({"mask": [(mf.causal(), 0)]}, r"the layers of mask\[0\] is 0, expected at least 1"),
        ({"links": "carrier pigeons"}, r"Links: .*carrier pigeons"),
        ({"shards": SHARDS[:2]}, r"token 2 is on no rank"),
        ({"shards": (*SHARDS, ((3, 4),))}, r"token 3 is on several ranks"),
        ({"shards": (((0, 7),),)}, r"shards is of 1 ranks, expected world_size, 3"),
        ({"shards": (((0, 3), (3, 7)), (), ())}, r"shards\[0\] is .*, expected ranges that ascend and are apart"),
        ({"shards": (((0, 9),), (), ())}, r"shards don't fit 7 tokens"),
        ({"shards": (((0, 3),), ((3, 7),), ()), "chunk": 2}, r"shards\[0\] has the end 3, expected multiples of 2"),
    ],
)
def test_wrong_arguments_are_told(wrong, told):
    given = {"mask": mf.causal(), "seq_len": 7, "world_size": 3, "chunk": 1, **SIZES, **wrong}
    with pytest.raises(mf.ArgumentError, match=told):
        mf.parallel.plan(given.pop("mask"), given.pop("seq_len"), given.pop("world_size"), **given)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"mask": (mf.causal(), 3)}, r"mask\[1\] is an int, expected a mask or \(mask, layers\)"),
        ({"mask": [(mf.causal(), 2.5)]}, r"the layers of mask\[0\] is 2.5, expected an int"),
        ({"dtype": torch.int8}, r"parallel.plan: dtype"),
        ({"links": 3}, r"Links: "),
        ({"head_ranks": 1.5}, r"head_ranks is 1.5, expected an int"),
        ({"shards": 3}, r"shards is an int, expected for each rank"),
        ({"shards": [[(0.5, 7)]]}, r"shards is a list, expected for each rank"),
    ],
)
def test_wrong_types_are_told(wrong, told):
    given = {"mask": mf.causal(), "seq_len": 7, "world_size": 3, "chunk": 1, **SIZES, **wrong}
    with pytest.raises(mf.ArgumentTypeError, match=told):
        mf.parallel.plan(given.pop("mask"), given.pop("seq_len"), given.pop("world_size"), **given)


def test_a_mask_that_faults_is_told():
    table = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(mf.MaskIndexError):
        mf.parallel.plan(lambda b, h, q, kv: table[kv] == 0, 7, 3)


X = torch.zeros(1, 1, 7, 1)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: PLAN.shard(X, 3), r"ShardPlan.shard: rank is 3, expected at most 2"),
        (lambda: PLAN.shard(X, 0, 1), r"ShardPlan.shard: x has 1 tokens in dimension 1, expected the plan's 7"),
        (lambda: PLAN.shard(X, 0, 4), r"ShardPlan.shard: dim is 4, expected at most 3"),
        (lambda: PLAN.shard(torch.tensor(1), 0), r"ShardPlan.shard: x has no dimension"),
        (lambda: PLAN.tokens(-1), r"ShardPlan.tokens: rank is -1"),
        (lambda: PLAN.positions(3), r"ShardPlan.positions: rank is 3"),
        (lambda: PLAN.unshard([X]), r"ShardPlan.unshard: parts has 1 tensors, expected one for each of the 3 ranks"),
        (lambda: PLAN.unshard([X, X, X]), r"ShardPlan.unshard: parts\[0\] has 7 tokens in dimension 2, expected the 3"),
        (lambda: ShardPlan.from_dict({}), r"from_dict: a ShardPlan is the keys \[\], expected seq_len"),
        (lambda: ShardPlan.from_dict({**PLAN.to_dict(), "layers": [{}]}), r"a PlannedLayer is the keys \[\]"),
        (lambda: ShardPlan.from_dict({**PLAN.to_dict(), "tile": 0}), r"from_dict: tile is 0"),
        (
            lambda: ShardPlan.from_dict({**PLAN.to_dict(), "head_ranks": 2}),
            r"head_ranks is 2, expected a divisor",
        ),
        (lambda: ShardPlan.from_dict({**PLAN.to_dict(), "layers": 3}), r"from_dict: layers is an int, expected a list"),
        (lambda: ShardPlan.from_dict({**PLAN.to_dict(), "tried": None}), r"from_dict: tried is .*, expected a list"),
        (lambda: ShardPlan.from_dict({**PLAN.to_dict(), "seq_len": 9}), r"from_dict: shards don't fit 9 tokens"),
        (lambda: ShardPlan.from_dict({**PLAN.to_dict(), "dtype": "torch.int8"}), r"from_dict: dtype"),
        (lambda: PLAN.shard([1], 0), r"ShardPlan.shard: x is \[1\], expected a Tensor"),
        (lambda: PLAN.unshard(X), r"ShardPlan.unshard: parts is a Tensor, expected a list of tensors"),
        (lambda: PLAN.unshard([X, 1, 2]), r"ShardPlan.unshard: parts\[0\]"),
        (lambda: ShardPlan.from_dict(3), r"from_dict: a ShardPlan is an int"),
    ],
)
def test_what_does_not_fit_a_plan_is_told(call, told):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match=told):
        call()
