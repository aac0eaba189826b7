"""Attention on shards in this process: threads as ranks under any mask, and what a call of one rank refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks
from maskflash.testing import scores as some_scores

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
distributed = pytest.importorskip("torch.distributed")
from tests.parallel.on_shards import distance, held, planned, shards_by_line, trained  # noqa: E402
from tests.parallel.worlds import in_threads  # noqa: E402

q, k, v = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0)).unbind()
alone = planned((((0, 24),),), 24)
ids = torch.arange(24)


def drawn(seed, batch, heads, kv_heads, length):
    """q, k, v, and what out and lse are multiplied by for a loss."""
    shapes = (heads, length, 5), (kv_heads, length, 5), (kv_heads, length, 3), (heads, length, 3), (heads, length)
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


@given(data=st.data())
@settings(max_examples=40)
def test_any_mask_on_any_shards_is_what_it_is_on_one_machine(data):
    mask, length, tile = data.draw(masks()), data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    ranks, stages = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    lines = -(-length // tile)
    owner = data.draw(st.lists(st.integers(0, ranks - 1), min_size=lines, max_size=lines))
    shards = shards_by_line(owner, length, tile)
    plan = planned((*shards, *[()] * (ranks - len(shards))), length, tile)
    kv_heads = data.draw(st.sampled_from([1, 2, 4]))
    call = {"dropout_p": 0.4, "seed": 3} if data.draw(st.booleans()) else {}
    score = data.draw(st.none() | some_scores())
    *qkv, of_out, of_lse = drawn(length, 2, 4, kv_heads, length)
    try:
        one = mf.compile(mask, score=score, scale=0.3)
        expected, _ = trained(qkv, (of_out, of_lse), lambda *x: one(*x, return_lse=True, **call))
    except mf.MaskIndexError as error:
        expected = error

    def rank_does(rank):
        attn = mf.parallel.compile(mask, plan, score=score, scale=0.3, stages=stages)
        own = [held(plan, x, rank) for x in (*qkv, of_out, of_lse)]
        return trained(own[:3], own[3:], lambda *x: attn(*x, return_lse=True, **call))[0]

    for rank, found in enumerate(in_threads(ranks, rank_does)):
        if isinstance(expected, Exception):
            assert type(found) is type(expected)
            continue
        if isinstance(found, Exception):
            raise found
        for ours, whole in zip(found, expected, strict=True):
            assert distance(ours, held(plan, whole, rank)) <= 1e-12 * max(
                1.0, float(whole.nan_to_num(0, 0, 0).abs().max())
            )


def test_one_rank_needs_no_group():
    attn = mf.parallel.compile(mf.causal(), alone)
    assert torch.equal(attn(q, k, v), mf.attention(q, k, v, mf.causal()))
    out, lse = attn(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert repr(attn) == "ShardedAttention(causal(), 1 ranks of 24 tokens)"


def test_tables_are_seen_when_they_are_written_to_and_when_someone_says_so():
    ids = torch.zeros(24, dtype=torch.int64)
    attn = mf.parallel.compile(lambda b, h, q, kv: ids[q] == ids[kv], alone)
    assert torch.equal(attn(q, k, v), mf.attention(q, k, v))
    ids[12:] = 1
    halves = mf.attention(q, k, v, mf.document([12, 12]))
    assert torch.equal(attn(q, k, v), halves)
    ids.numpy()[:] = 0
    assert torch.equal(attn(q, k, v), halves)
    mf.invalidate()
    assert torch.equal(attn(q, k, v), mf.attention(q, k, v))


def test_what_is_kept_is_bounded_and_goes_with_its_tables():
    attn = mf.parallel.compile(lambda b, h, q, kv, *, ids: ids[q] == ids[kv], alone)
    for _ in range(3):
        attn(q, k, v, ids=torch.zeros(24, dtype=torch.int64))
    assert len(attn._ready) == 1
    for reach in range(40):
        mf.parallel.compile(lambda b, h, q, kv, *, n: q - kv <= n, alone)(q, k, v, n=reach)
        attn(q, k, v, ids=(torch.arange(24) > reach).long())
    assert len(attn._ready) <= 16


def test_autocast_casts_as_it_does_on_one_machine():
    attn = mf.parallel.compile(mf.causal(), alone)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = attn(q, k, v), mf.attention(q, k, v, mf.causal())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_torch_compile_leaves_the_call_as_it_is():
    attn = mf.parallel.compile(mf.causal(), alone)

    def step(q, k, v):
        return attn(q * 2, k, v).sin()

    assert torch.equal(torch.compile(step, backend="eager")(q, k, v), step(q, k, v))
    assert torch._dynamo.explain(step)(q, k, v).graph_break_count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch's forward mode
def test_what_has_no_derivative_says_so():
    x = q.clone().requires_grad_()
    attn = mf.parallel.compile(mf.causal(), alone)
    (gradient,) = torch.autograd.grad(attn(x, k, v).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        attn(torch.autograd.forward_ad.make_dual(q, q), k, v)


def test_a_write_before_backward_is_an_error():
    x, table = q.clone().requires_grad_(), torch.zeros(24, dtype=torch.int64)
    attn = mf.parallel.compile(lambda b, h, q, kv, *, ids: ids[q] == ids[kv], alone)
    out = attn(x, k, v, ids=table)
    table += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("kind", "said", "call"),
    [
        (mf.ArgumentTypeError, "parallel.compile: plan is .*, expected a ShardPlan",
         lambda: mf.parallel.compile(mf.causal(), 3)),
        (mf.ArgumentTypeError, "group is a.* str, expected a process group or a DeviceMesh",
         lambda: mf.parallel.compile(mf.causal(), alone, group="all")),
        (mf.ArgumentError, 'backend is .*, expected "auto", "cpu" or "triton"',
         lambda: mf.parallel.compile(mf.causal(), alone, backend="flex")),
        (mf.ArgumentError, "stages is 0, expected", lambda: mf.parallel.compile(mf.causal(), alone, stages=0)),
        (mf.ArgumentTypeError, "parallel.compile: unexpected argument 'q_offset'",
         lambda: mf.parallel.compile(mf.causal(), alone, q_offset=3)),
        (mf.ArgumentError, "q has 23 tokens, expected the 24 that rank 0 of the plan holds; plan.shard\\(q, 0\\)",
         lambda: mf.parallel.compile(mf.causal(), alone)(q[:, :, 1:], k, v)),
        (mf.ArgumentError, "k has 23 tokens",
         lambda: mf.parallel.compile(mf.causal(), alone)(q, k[:, :, 1:], v[:, :, 1:])),
        (mf.ArgumentTypeError, "unexpected argument 'q_offset'",
         lambda: mf.parallel.compile(mf.causal(), alone)(q, k, v, q_offset=3)),
        (mf.ArgumentError, "the plan has 2 ranks and torch.distributed isn't initialised",
         lambda: mf.parallel.compile(mf.causal(), planned((((0, 24),), ()), 24))(q, k, v)),
        (mf.ArgumentError, "q has 2 heads, expected a multiple of the plan's 3 head ranks",
         lambda: mf.parallel.compile(mf.causal(), replace(alone, head_ranks=3))(q, k, v)),
        (mf.MaskIndexError, "reads index 24",
         lambda: mf.parallel.compile(lambda b, h, q, kv: ids[q + 1] > kv, alone)(q, k, v)),
    ],
)  # fmt: skip
def test_mistakes_are_told(kind, said, call):
    with pytest.raises(kind, match=said):
        call()


def test_a_rank_of_a_mesh_with_heads_shared_out_attends_as_one_machine_does():
    shards = shards_by_line([0, 2, 1, 3, 3, 0], 45, 8)
    plan = replace(planned(shards, 45), head_ranks=2)
    *qkv, of_out, of_lse = drawn(1, 2, 4, 2, 45)
    reach = torch.tensor([3, 0, 40, 9])
    mask = mf.mask(lambda b, h, q, kv: (q - kv <= reach[h] + b) & (kv <= q))
    sinks, call = torch.linspace(-1, 1, 4, dtype=torch.float64), {"dropout_p": 0.3, "seed": 1}
    one = mf.compile(mask, score=mf.scores.alibi())
    expected, (dsinks,) = trained(
        qkv, (of_out, of_lse), lambda *x, **more: one(*x, return_lse=True, **call, **more), sinks
    )

    def rank_does(rank, as_mesh):
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2)) if as_mesh else None
        attn = mf.parallel.compile(mask, plan, score=mf.scores.alibi(), group=mesh)
        own = [held(plan, x, rank) for x in (*qkv, of_out, of_lse)]
        found, learned = trained(own[:3], own[3:], lambda *x, **more: attn(*x, return_lse=True, **call, **more), sinks)
        return found, learned[0]

    for as_mesh in (False, True):
        of_ranks = in_threads(4, lambda rank, as_mesh=as_mesh: rank_does(rank, as_mesh))
        for error in of_ranks:
            if isinstance(error, Exception):
                raise error
        assert distance(sum(found for _, found in of_ranks), dsinks) < 1e-12
        for rank, (found, _) in enumerate(of_ranks):
            for ours, whole in zip(found, expected, strict=True):
                assert distance(ours, held(plan, whole, rank)) < 1e-12
