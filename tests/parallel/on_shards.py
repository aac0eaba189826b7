"""Calls on shards, and how far each rank's part of their results is from what one process computes."""

import torch
import torch.distributed as dist

import maskflash as mf
from maskflash.testing import error_budget, reference

LENGTH, TILE = 101, 8

doc = torch.arange(LENGTH).expand(2, -1) // torch.tensor([[23], [34]])
reach = torch.tensor([3, 0, 40, 101])
summary = torch.arange(LENGTH) % 16 == 0
table = torch.linspace(-1, 1, 4 * LENGTH, dtype=torch.float64).reshape(4, LENGTH)


@mf.mask
def packed(b, h, q, kv, *, ids):
    return q >= kv and ids[b, q] == ids[b, kv]


def biased(score, b, h, q, kv):
    return score + table[h, kv] * (q - kv) * b


def readable(b, h, q, kv):
    if summary[kv]:
        return kv <= q
    return q - 9 <= kv <= q


MASKS = {
    "full": (mf.full(), {}),
    "causal": (mf.causal(), {}),
    "window": (mf.sliding_window(11, 4), {}),
    "documents": (mf.causal_document([40, 1, 33, 27]), {}),
    "documents by table": (packed, {"ids": doc}),
    "prefix": (mf.prefix_lm(30), {}),
    "holes": (mf.mask(readable), {}),
    "by head": (mf.mask(lambda b, h, q, kv: (q - kv <= reach[h]) & (kv <= q)), {}),
    "by batch row": (mf.mask(lambda b, h, q, kv: (doc[b, q] < doc[b, kv]) & (kv % (h + 1) == 0)), {}),
    "rows and columns of nothing": (mf.mask(lambda b, h, q, kv: q > 10 and 20 < kv < 60 and kv <= q), {}),
    "column intervals": (mf.causal_document([40, 1, 33, 27]).to_flashmask(LENGTH, LENGTH), {}),
    "a tensor": ((torch.arange(LENGTH)[:, None] * 7 + torch.arange(LENGTH) * 5) % 11 < 4, {}),
}
CALLS = {
    "alibi": {"score": mf.scores.alibi()},
    "softcap": {"score": mf.scores.softcap(2.0)},
    "a score that learns": {"score": biased},
    "sinks": {"sinks": torch.linspace(-1, 2, 4, dtype=torch.float64)},
    "dropout": {"dropout_p": 0.3, "seed": 7},
    "all of it": {
        "score": (biased, mf.scores.softcap(3.0)),
        "sinks": torch.linspace(-1, 2, 4, dtype=torch.float64),
        "dropout_p": 0.2,
        "seed": -5,
    },
}


def tensors(dtype=torch.float64, batch=2, length=LENGTH):
    """q, k, v, and what out and lse are multiplied by for a loss."""
    shapes = [(4, length, 8), (2, length, 8), (2, length, 5), (4, length, 5), (4, length)]
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def shards_by_line(owner, length=LENGTH, tile=TILE):
    """Shards of the ranks that hold each line."""
    found = [[] for _ in range(max(owner) + 1)]
    for line, rank in enumerate(owner):
        start, stop = line * tile, min(length, (line + 1) * tile)
        if found[rank] and found[rank][-1][1] == start:
            start = found[rank].pop()[0]
        found[rank].append((start, stop))
    return tuple(map(tuple, found))


def planned(shards, length=LENGTH, tile=TILE):
    """A plan of any shards."""
    return mf.parallel.plan(mf.full(), length, len(shards), chunk=tile, shards=shards)


def plans(world_size):
    """Plans of several kinds, by name."""
    lines = range(-(-LENGTH // TILE))
    turns = [*range(world_size), *reversed(range(world_size))]
    owners = {
        "one after the other": [line * world_size // len(lines) for line in lines],
        "to and fro": [turns[line % len(turns)] for line in lines],
        "scattered": [line * 5 % 7 % world_size for line in lines],
    }
    found = {name: planned(shards_by_line(owner)) for name, owner in owners.items()}
    empty = ((), *planned(shards_by_line([line % (world_size - 1) for line in lines])).shards)
    return {**found, "a rank without tokens": planned(empty)}


def held(plan, x, rank, dim=2):
    """What a rank holds; also where that is nothing."""
    return torch.cat([x.narrow(dim, 0, 0), *(x.narrow(dim, a, b - a) for a, b in plan.shards[rank])], dim)


def trained(qkv, weights, attend, sinks=None):
    """out, lse, dq, dk, dv; and the gradients of what is learned."""
    leaves = [x.detach().clone().requires_grad_() for x in (*qkv, *([] if sinks is None else [sinks]))]
    table.grad = None
    out, lse = attend(*leaves[:3], **({} if sinks is None else {"sinks": leaves[3]}))
    of_out, of_lse = weights
    ((out * of_out).sum() + (lse * of_lse).masked_fill(lse == -torch.inf, 0.0).sum()).backward()
    learned = [x.grad for x in leaves[3:]] + ([] if table.grad is None else [table.grad.clone()])
    return [out.detach(), lse.detach(), *(x.grad for x in leaves[:3])], learned


def compare(plan, rank, mask, args=None, *, stages=None, dtype=torch.float64, score=None, sinks=None, **call):
    """Pairs of what a rank computes and of that part of what one process computes."""
    args, learns = args or {}, score is not None and "biased" in str(score)
    table.requires_grad_(learns)
    *qkv, of_out, of_lse = tensors(dtype)
    one = mf.compile(mask, score=score)
    expected, expected_learned = trained(
        qkv, (of_out, of_lse), lambda *x, **more: one(*x, return_lse=True, **args, **call, **more), sinks
    )
    attn = mf.parallel.compile(mask, plan, score=score, stages=stages)
    own = [held(plan, x, rank) for x in (*qkv, of_out, of_lse)]
    found, learned = trained(
        own[:3], own[3:], lambda *x, **more: attn(*x, return_lse=True, **args, **call, **more), sinks
    )
    again, _ = trained(own[:3], own[3:], lambda *x, **more: attn(*x, return_lse=True, **args, **call, **more), sinks)
    assert all(map(torch.equal, found, again)), "the same call gives other bits"
    for x in learned:
        dist.all_reduce(x)
    return [
        *zip(found, [held(plan, x, rank) for x in expected], strict=True),
        *zip(learned, expected_learned, strict=True),
    ]


def distance(found, expected):
    """The largest difference; of what is infinite none."""
    assert found.shape == expected.shape and torch.equal(found.isinf(), expected.isinf())
    return float((found - expected).nan_to_num(0.0).abs().max()) if found.numel() else 0.0


def within_budget(plan, rank, mask, args, dtype):
    """How far results in a lower dtype are from dense float64, over twice one process's error and a rounding unit."""
    *qkv, of_out, of_lse = tensors(dtype)
    dense = mf.mask(mask).dense(LENGTH, LENGTH, batch=2, heads=4, **args)
    exact, _ = trained(
        [x.double() for x in qkv], [of_out.double(), of_lse.double()], lambda *x: reference(*x, dense, 8**-0.5)
    )
    one, _ = trained(qkv, (of_out, of_lse), lambda *x: mf.attention(*x, mask, return_lse=True, **args))
    attn = mf.parallel.compile(mask, plan)
    own = [held(plan, x, rank) for x in (*qkv, of_out, of_lse)]
    found, _ = trained(own[:3], own[3:], lambda *x: attn(*x, return_lse=True, **args))
    return [
        distance(ours.double(), held(plan, truth, rank)) / error_budget(other, truth)
        for ours, truth, other in zip(found, exact, one, strict=True)
    ]


def counted(plan, rank, mask, args, v_dim=5):
    """Bytes that a rank hands to torch for other ranks in forward and in backward, and how many come to it."""
    found, send = [], dist.all_to_all_single

    def counting(received, sent, of_each, to_each, **more):
        found.append(
            [
                sum(n for r, n in enumerate(x) if r != rank) * sent.shape[1] * sent.element_size()
                for x in (of_each, to_each)
            ]
        )
        return send(received, sent, of_each, to_each, **more)

    q, k, _ = tensors(torch.float32)[:3]
    v = k[..., :v_dim]
    attn = mf.parallel.compile(mask, plan)
    dist.all_to_all_single = counting
    try:
        q, k, v = (held(plan, x, rank).requires_grad_() for x in (q, k, v))
        out = attn(q, k, v, **args)
        forward = [sum(n) for n in zip(*found, strict=True)] or [0, 0]
        found.clear()
        out.sum().backward()
    finally:
        dist.all_to_all_single = send
    return forward, [sum(n) for n in zip(*found, strict=True)] or [0, 0]
