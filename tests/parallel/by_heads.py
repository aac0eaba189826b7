"""What ranks that share heads out compute, each a process of its own: how far it is from what one process does."""

import torch
from torch import distributed

import maskflash as mf
from maskflash.functions.sizes import Sizes
from maskflash.op import autograd
from maskflash.op.asking import Dropped
from maskflash.parallel.heads import HeadExchange, attend
from maskflash.parallel.peers import find_ranks

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


def held(x, ranges):
    return torch.cat([x[:, :, :0], *(x[:, :, start:stop] for start, stop in ranges)], 2)


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


def compare(ranks, group, shards, name, kv_heads):
    """How far each result is from one process's: out, lse, dq, dk, dv, and what ranks sum."""
    mask, asked = CASES[name]
    table.requires_grad_(asked.get("score") is biased)
    sinks = [asked["sinks"]] if "sinks" in asked else []
    whole = tensors(kv_heads)
    score, p, seed = asked.get("score"), asked.get("dropout_p", 0.0), asked.get("seed")
    op = mf.compile(mask, score=score)

    def of_one(q, k, v, *sinks):
        return op(q, k, v, dropout_p=p, seed=seed, sinks=sinks[0] if sinks else None, return_lse=True)

    def of_all(q, k, v, *sinks):
        sizes = Sizes.of(*whole[:2])
        dropout = Dropped(p, torch.tensor([seed])) if p else Dropped()
        spec = op._spec(sizes, whole[0], sinks[0] if sinks else None, {}, dropout=dropout)
        exchange = HeadExchange.of(shards, ranks.heads, q.device)
        return attend(exchange, spec, q, k, v, lambda *x: autograd.dispatch(*x), lse=True)

    expected, expected_sums = trained(whole, of_one, *sinks)
    own = shards[ranks.rank]
    found, sums = trained([held(x, own) for x in whole], of_all, *sinks)
    for x in sums:
        distributed.all_reduce(x, group=group)
    pairs = [(x, held(y, own)) for x, y in zip(found, expected, strict=True)] + list(
        zip(sums, expected_sums, strict=True)
    )
    return [float((x - y).abs().max()) if x.numel() else 0.0 for x, y in pairs]


def rank_of_four(rank, port, queue):
    """All cases in one world of four: all share heads out; then pairs do, as groups and as rows of a mesh."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "heads"))
    whole, pair, row = find_ranks(None, 4, 4), find_ranks(pairs[rank // 2], 2, 2), find_ranks(mesh["heads"], 2, 2)
    found = {}
    for name in CASES:
        found["four", name] = compare(whole, None, SHARDS[4], name, kv_heads=4)
    for name in ("learned scores", "sinks"):
        found["pair", name] = compare(pair, pairs[rank // 2], SHARDS[2], name, kv_heads=2)
        found["row of a mesh", name] = compare(row, mesh.get_group("heads"), SHARDS[2], name, kv_heads=8)
    queue.put((rank, found))
    distributed.barrier()
    distributed.destroy_process_group()
