"""What ranks that share heads out compute, each a process of its own: how far it is from what one process does."""

from dataclasses import replace

import torch
from torch import distributed

import maskflash as mf
from maskflash.parallel.links import Links
from maskflash.parallel.needs import find_needs
from maskflash.parallel.price import Load, price

BATCH, HEADS, LENGTH, DIM, V_DIM = 2, 8, 37, 8, 5

doc = torch.arange(LENGTH).expand(2, -1) // torch.tensor([[9], [14]])
reach = torch.tensor([3, 0, 8, 1, 40, 5, 2, 9])
causal = mf.causal()
by_head = mf.mask(lambda b, h, q, kv: (q - kv <= reach[h]) & (kv <= q))
by_both = mf.mask(lambda b, h, q, kv: (doc[b, q] == doc[b, kv]) & ((kv % (h + 1) == 0) | (q == kv)))
table = torch.linspace(-1, 1, HEADS * LENGTH, dtype=torch.float64).reshape(HEADS, LENGTH)


def biased(score, b, h, q, kv):
    return score + table[h, kv] * b


CASES = {
    "causal": (causal, {}),
    "mask by head": (by_head, {}),
    "mask by head and batch row": (by_both, {}),
    "scores by head": (causal, {"score": mf.scores.alibi()}),
    "learned scores": (by_both, {"score": biased}),
    "sinks": (by_head, {"sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)}),
    "dropout": (by_both, {"dropout_p": 0.3, "seed": 7}),
}
SHARDS = {
    4: (((0, 8), (30, 37)), ((8, 12), (16, 19)), (), ((12, 16), (19, 30))),
    2: (((0, 10), (25, 37)), ((10, 25),)),
}


def tensors(kv_heads):
    """q, k, v, and what out and lse are multiplied by for a loss."""
    shapes = [(HEADS, DIM), (kv_heads, DIM), (kv_heads, V_DIM), (HEADS, V_DIM), (HEADS, 1)]
    drawn = torch.Generator().manual_seed(kv_heads)
    return [torch.randn(BATCH, h, LENGTH, d, generator=drawn, dtype=torch.float64) for h, d in shapes]


def planned(world_size, head_ranks):
    plan = mf.parallel.plan(causal, LENGTH, world_size, heads=HEADS, head_dim=DIM, chunk=1)
    return replace(plan, shards=SHARDS[world_size], head_ranks=head_ranks)


def trained(tensors, attention, sinks=None):
    """out, lse, and the gradients of q, k, v and what else is learned."""
    *qkv, of_out, of_lse = tensors
    learned = [x.detach().clone().requires_grad_() for x in (*qkv, *([] if sinks is None else [sinks]))]
    table.grad = None
    out, lse = attention(*learned)
    ((out * of_out).sum() + (lse * of_lse[..., 0]).sum()).backward()
    summed = [] if sinks is None else [learned[3].grad]
    summed += [] if table.grad is None else [table.grad.clone()]
    return [out.detach(), lse.detach(), *(x.grad for x in learned[:3])], summed


class Counted:
    """What a process receives of others, in bytes, while this is entered."""

    def __enter__(self):
        self.bytes, self.send = 0, distributed.all_to_all_single

        def send(received, sent, of_each, to_each, group=None, async_op=False):
            own = of_each[distributed.get_rank(group)]
            self.bytes += (sum(of_each) - own) * received[:1].nbytes
            return self.send(received, sent, of_each, to_each, group=group, async_op=async_op)

        distributed.all_to_all_single = send
        return self

    def __exit__(self, *error):
        distributed.all_to_all_single = self.send


def bytes_of(plan, rank, mask, kv_heads):
    """What a rank receives forward and backward, counted on the dense mask; float64 all."""
    ranks = plan.head_ranks
    place = torch.full((LENGTH,), -1)
    for other, ranges in enumerate(plan.shards):
        for start, stop in ranges:
            place[start:stop] = other // ranks
    seen = mask.dense(LENGTH, LENGTH, batch=BATCH, heads=HEADS).expand(BATCH, HEADS, -1, -1).any((0, 1))
    needs = [seen[place == t].any(0) for t in range(plan.world_size // ranks)]
    here = rank // ranks
    come = (needs[here] & (place != here)).sum()
    go = sum((need & (place == here)).sum() for t, need in enumerate(needs) if t != here)
    own = plan.tokens(rank)
    others = int((place == here).sum()) - own
    own *= ranks - 1
    query, key, out, lse = (
        BATCH * n // ranks * 8 for n in (HEADS * DIM, kv_heads * (DIM + V_DIM), HEADS * V_DIM, HEADS)
    )
    forward = others * (query + key) + own * (out + lse) + come * key
    backward = own * (query + key) + others * (out + lse) + (come + go) * key
    return int(forward), int(backward)


def compare(rank, group, ranks, plan, name, kv_heads):
    """How far out, lse, dq, dk, dv and what ranks sum are from one process's, and bytes from those that are needed."""
    mask, asked = CASES[name]
    table.requires_grad_(asked.get("score") is biased)
    asked = dict(asked)
    sinks, score = asked.pop("sinks", None), asked.pop("score", None)
    one, all_ = mf.compile(mask, score=score), mf.parallel.compile(mask, plan, group=group, score=score)

    def by(attn):
        return lambda q, k, v, *sinks: attn(q, k, v, **asked, sinks=sinks[0] if sinks else None, return_lse=True)

    whole = tensors(kv_heads)
    expected, expected_sums = trained(whole, by(one), sinks)
    with Counted() as counted:
        found, sums = trained([plan.shard(x, rank) for x in whole], by(all_), sinks)
    for x in sums:
        distributed.all_reduce(x, group=ranks)
    pairs = [(x, plan.shard(y, rank)) for x, y in zip(found, expected, strict=True)]
    pairs += zip(sums, expected_sums, strict=True)
    errors = [float((x - y).abs().max()) if x.numel() else 0.0 for x, y in pairs]
    return [*errors, abs(counted.bytes - sum(bytes_of(plan, rank, mask, kv_heads)))]


def beside_price(rank, head_ranks):
    """The bytes that a rank receives forward and backward, in float32 and bfloat16, each beside the plan's own."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        plan = planned(4, head_ranks)
        q, k, v = (
            torch.randn(BATCH, heads, plan.tokens(rank), DIM, dtype=dtype, requires_grad=True)
            for heads in (HEADS, 4, 4)
        )
        needs = find_needs(by_both.at(LENGTH, LENGTH, batch=BATCH, heads=HEADS).problem, plan.tile)
        load = Load(BATCH, HEADS, 4, DIM, dtype)
        (expected,) = price([(needs, 1)], plan.shards, head_ranks, load, Links.of("cpu"))
        with Counted() as forward:
            out = mf.parallel.compile(by_both, plan)(q, k, v)
        with Counted() as backward:
            out.sum().backward()
        found.append((forward.bytes, int(expected.forward.received[rank])))
        found.append((backward.bytes, int(expected.backward.received[rank])))
    return found


def refused(*args, **call):
    """The error of a call that can't be made."""
    plan, group, mask, kv_heads = args
    q, k, v, *_ = (plan.shard(x, distributed.get_rank()) for x in tensors(kv_heads))
    try:
        mf.parallel.compile(mask, plan, group=group)(q, k, v, **call)
    except mf.ArgumentError as error:
        return str(error)


def cases(rank):
    """What `compare` finds, and what `refused` does."""
    half, whole = rank // 2, distributed.group.WORLD
    pair = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][half]
    mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "heads"))
    row = mesh["heads"]
    found = {}
    for name in CASES:
        found["four", name] = compare(rank, None, whole, planned(4, 4), name, kv_heads=4)
        found["two by two", name] = compare(rank, None, whole, planned(4, 2), name, kv_heads=2)
    for name in ("learned scores", "sinks"):
        found["mesh", name] = compare(rank, mesh, whole, planned(4, 2), name, kv_heads=4)
        found["pair", name] = compare(rank % 2, pair, pair, planned(2, 2), name, kv_heads=2)
        found["row of a mesh", name] = compare(rank % 2, row, row.get_group(), planned(2, 2), name, kv_heads=8)
    bytes_ = [pair for head_ranks in (1, 2, 4) for pair in beside_price(rank, head_ranks)]
    errors = {
        "another mask": refused(planned(4, 2), mesh, by_head if rank == 2 else causal, 4),
        "one key head": refused(planned(4, 2), mesh, causal, 1),
        "another mesh": refused(planned(4, 4), mesh, causal, 4),
        "another plan": refused(planned(4, 2 if rank else 4), None, causal, 4),
    }
    return found, bytes_, errors
