"""What the processes of a world of gloo do for tests: all cases, one after the other, in one group."""

import os

import torch
import torch.distributed as dist

import maskflash as mf
from tests.parallel import on_shards
from tests.parallel.on_shards import CALLS, MASKS, compare, counted, distance, doc, held, planned, plans, tensors


def everything(rank):
    """By name, how far results are from those of one process, over what is allowed."""
    found = {}
    all_plans = plans(dist.get_world_size())
    for number, (name, (mask, args)) in enumerate(MASKS.items()):
        for kind in list(all_plans)[number % 2 :: 2]:
            pairs = compare(all_plans[kind], rank, mask, args, stages=1 + number % 3)
            found[f"{name}, {kind}"] = max(distance(*pair) for pair in pairs) / 1e-12
    for name, call in CALLS.items():
        for kind in ("to and fro", "a rank without tokens"):
            mask, args = MASKS["documents by table"]
            pairs = compare(all_plans[kind], rank, mask, args, **call)
            found[f"{name}, {kind}"] = max(distance(*pair) for pair in pairs) / 1e-12
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("to and fro", "one after the other"):
            name = f"{dtype}, {kind}".removeprefix("torch.")
            found[name] = max(on_shards.within_budget(all_plans[kind], rank, *MASKS["documents by table"], dtype))
    return found


def traffic(rank):
    """By mask and plan, the bytes that were received and sent, forward and backward."""
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "chunk": 8}
    for name in ("causal", "documents", "by batch row"):
        mask, args = MASKS[name]
        plan = mf.parallel.plan(mask, on_shards.LENGTH, dist.get_world_size(), **sizes, **args)
        for which, count in zip((plan.forward, plan.backward), counted(plan, rank, mask, args, v_dim=8), strict=True):
            assert count == [which.received[rank], which.sent[rank]], (name, plan.name)
    return {
        (name, kind): counted(plan, rank, *MASKS[name])
        for kind, plan in plans(dist.get_world_size()).items()
        for name in ("causal", "window", "documents", "by batch row")
    }


def mistakes(rank):
    """The error of each call that isn't the same on all ranks; and that a right one works afterwards."""
    world_size, first, last = dist.get_world_size(), rank == 0, rank == dist.get_world_size() - 1
    plan, other = plans(world_size)["to and fro"], plans(world_size)["scattered"]
    larger = planned((*plan.shards, ()))
    right = [held(plan, x, rank) for x in tensors()[:3]]
    causal = mf.parallel.compile(mf.causal(), plan)
    by_table = mf.parallel.compile(on_shards.packed, plan)
    learning = [x.clone().requires_grad_(first) for x in right]
    calls = {
        "mask": lambda: mf.parallel.compile(mf.full() if last else mf.causal(), plan)(*right),
        "number": lambda: mf.parallel.compile(mf.sliding_window(3 + rank), plan)(*right),
        "shard": lambda: causal(*(x[:, :, 1:] if first else x for x in right)),
        "dtype": lambda: causal(*(x.float() if last else x for x in right)),
        "shape": lambda: causal(*(x[:1] if last else x for x in right)),
        "table": lambda: by_table(*right, ids=doc + (doc == 2) * last),
        "short table": lambda: by_table(*right, ids=doc[:, : 50 if last else None]),
        "plan": lambda: mf.parallel.compile(mf.causal(), other if first else plan)(
            *(held(other if first else plan, x, rank) for x in tensors()[:3])
        ),
        "world size": lambda: mf.parallel.compile(mf.causal(), larger if last else plan)(*right),
        "seed": lambda: causal(*right, dropout_p=0.5, seed=rank),
        "gradients": lambda: causal(*learning),
        "score": lambda: mf.parallel.compile(mf.causal(), plan, score=mf.scores.softcap(3.0 + rank))(*right),
        "sinks": lambda: causal(*right, sinks=torch.zeros(3 if last else 4)),
        "no sinks": lambda: causal(*right, sinks=torch.zeros(4) if last else None),
        "a bug": lambda: mf.parallel.compile(mf.mask(buggy), plan)(*right, fails=last),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    causal(*right)
    return found


@mf.mask
def buggy(b, h, q, kv, *, fails):
    if fails:
        raise ZeroDivisionError("of the user's own")
    return q >= kv


def dies(rank, when):
    """Rank 1 goes before forward, or before backward; what the others see."""
    plan = plans(dist.get_world_size())["to and fro"]
    q, k, v = (held(plan, x, rank).requires_grad_() for x in tensors()[:3])
    try:
        if rank == 1 and when == "forward":
            os._exit(3)
        out = mf.parallel.compile(mf.causal(), plan)(q, k, v)
        if rank == 1:
            os._exit(3)
        out.sum().backward()
    except RuntimeError as error:
        return str(error)
    return None
