"""How long do steps of attention on shards take over slow links, and does the cost model know it? By real transfers.

Four processes of gloo, each in a network namespace of its own, whose link a token bucket slows down, both ways:

    rank 0 -- veth --.
    rank 1 -- veth --+-- bridge          all of it in a namespace that goes with the process
    rank 2 -- veth --+
    rank 3 -- veth --'

Contenders take turns: a plan's shards, contiguous and zigzag ones, and a gather of all keys, with zigzag's balance,
which keeps the keys for backward and scatters sums of gradients. The plan and the predictions are made with the rates
that the ranks measure themselves, as `mf.parallel.Links` says.

Run: python -m benchmarks.parallel_ranks --mbit 100 1000, as root, where ip, tc and unshare are; without --mbit on the
machine's own loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import maskflash as mf
from benchmarks.runner import ROOT, WIDTH

QUESTION: Final = "How long do steps of attention on shards take over slow links?"
RANKS: Final = 4
HEADS: Final = 4
HEAD_DIM: Final = 64
_COUNTER: Final = Path("/sys/class/net/eth0/statistics/rx_bytes")


def masks(tokens: int) -> dict[str, mf.Mask]:
    """What is attended under."""
    documents = [tokens * part // 32 for part in (3, 9, 14, 6)]
    return {
        "causal": mf.causal(),
        "causal documents": mf.causal() & mf.document(documents),
        "window": mf.sliding_window(tokens // 16),
    }


class _Gather(torch.autograd.Function):
    """The tokens of all ranks; backward each gets the sum of all ranks' gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: mf.parallel.ShardPlan) -> Tensor:
        ctx.plan = plan
        parts = [torch.empty_like(x) for _ in range(plan.world_size)]
        dist.all_gather(parts, x.contiguous())
        return plan.unshard(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = [ctx.plan.shard(gradient, rank) for rank in range(ctx.plan.world_size)]
        dist.reduce_scatter(own := torch.empty_like(parts[0]), parts)
        return own, None


def _gathered(mask: mf.Mask, plan: mf.parallel.ShardPlan, rank: int) -> Callable[..., Tensor]:
    """Attention of a rank's queries to gathered keys."""
    lengths = [stop - start for start, stop in plan.shards[rank]]

    def attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _Gather.apply(torch.cat([k, v], -1), plan).split(HEAD_DIM, -1)
        rows = zip(q.split(lengths, 2), plan.shards[rank], strict=True)
        return torch.cat([mf.attention(part, k, v, mask, q_offset=start) for part, (start, _) in rows], 2)

    return attn


def _gather_seconds(plan: mf.parallel.ShardPlan, links: mf.parallel.Links) -> float:
    """What the model says of a gather: its keys and its gradients move while nothing is computed."""
    work, others = max(plan.work), plan.world_size - 1
    moved = plan.seq_len * others / plan.world_size * 2 * HEADS * HEAD_DIM * 4
    passes = [links.compute(work, HEAD_DIM, backward=backward) for backward in (False, True)]
    return float(sum(passes)) + 2 * links.transfer(moved, moved, others)


def measured_links(tokens: int) -> mf.parallel.Links:
    """Rates as all ranks have them at once: the same on every rank."""
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD_DIM).unbind()
    attn = mf.compile(mf.causal())
    compute = _seconds(lambda: attn(q, k, v))
    rank = dist.get_rank()

    def ring(count: int) -> float:
        sent, received = torch.ones(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)

        def turn() -> None:
            ways = [
                dist.P2POp(dist.isend, sent, (rank + 1) % RANKS),
                dist.P2POp(dist.irecv, received, (rank - 1) % RANKS),
            ]
            for work in dist.batch_isend_irecv(ways):
                work.wait()

        return _seconds(turn)

    latency, large = ring(8), 2**22
    flops = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2 / compute
    return mf.parallel.Links(flops=flops, bandwidth=large / max(ring(large) - latency, 1e-9), latency=latency)


def _seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """The median of some rounds after a first one, each as long as on the slowest rank."""
    return float(np.median([_round(run) for _ in range(rounds + 1)][1:]))


def _round(run: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    took = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def _received() -> int:
    return int(_COUNTER.read_text()) if _COUNTER.exists() else 0


def measure(rank: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """What one rank finds, the same on all of them."""
    links, found = measured_links(tokens // RANKS), []
    size = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": torch.float32, "links": links}
    for name, mask in masks(tokens).items():
        cuts = [tokens * part // (2 * RANKS) for part in range(2 * RANKS + 1)]
        halves = list(pairwise(cuts))
        zigzag = [[halves[r], halves[-1 - r]] for r in range(RANKS - 1)] + [[(cuts[RANKS - 1], cuts[RANKS + 1])]]
        contiguous = [[(cuts[2 * r], cuts[2 * r + 2])] for r in range(RANKS)]
        plans = {"plan": mf.parallel.plan(mask, tokens, RANKS, **size)}
        for way, shards in (("contiguous", contiguous), ("zigzag", zigzag)):
            plans[way] = mf.parallel.plan(mask, tokens, RANKS, shards=shards, **size)
        ops = {way: (plan, mf.parallel.compile(mask, plan), plan.seconds) for way, plan in plans.items()}
        even = plans["zigzag"]
        ops["gather"] = even, _gathered(mask, even, rank), _gather_seconds(even, links)
        took: dict[str, list[float]] = {way: [] for way in ops}
        came: dict[str, list[int]] = {way: [] for way in ops}
        for _ in range(rounds + 1):
            for way, (plan, attn, _) in ops.items():
                q, k, v = (torch.randn(1, HEADS, plan.tokens(rank), HEAD_DIM, requires_grad=True) for _ in "qkv")
                before = _received()
                took[way].append(_round(lambda attn=attn, x=(q, k, v): attn(*x).sum().backward()))
                came[way].append(_received() - before)
        for way, (plan, _, predicted) in ops.items():
            wire = torch.tensor([float(np.median(came[way][1:]))])
            dist.all_reduce(wire, dist.ReduceOp.MAX)
            p20, p50, p80 = np.percentile(took[way][1:], (20, 50, 80)).tolist()
            moved = tokens * (RANKS - 1) // RANKS * 2 * HEADS * HEAD_DIM * 4 * 2
            row = {"mask": name, "way": way, "layout": plan.name, "p20": p20, "p50": p50, "p80": p80}
            row |= {"predicted": predicted, "bytes": moved if way == "gather" else max(plan.bytes_received)}
            found.append(row | {"wire": wire.item(), "links": [links.flops, links.bandwidth, links.latency]})
    return found


def _rank(arguments: argparse.Namespace) -> None:
    """One process of the world; the first one prints what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(arguments.rank)
    place = f"tcp://{arguments.address}:{arguments.port}"
    dist.init_process_group("gloo", init_method=place, rank=arguments.rank, world_size=RANKS)
    found = measure(arguments.rank, arguments.tokens, arguments.rounds)
    if arguments.rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def _commands(mbit: float) -> list[str]:
    """What makes the links, in a namespace without any."""
    bucket = f"root tbf rate {mbit}mbit burst 256kb latency 1s"
    made = ["mount -t tmpfs none /run", "mkdir /run/netns", "ip link add hub type bridge", "ip link set hub up"]
    for rank in range(RANKS):
        inside = f"ip netns exec rank{rank}"
        made += [f"ip netns add rank{rank}", f"ip link add port{rank} type veth peer name eth0 netns rank{rank}"]
        made += [
            f"ip link set port{rank} master hub up",
            f"{inside} ip link set lo up",
            f"{inside} ip link set eth0 up",
        ]
        made += [f"{inside} ip address add 10.9.0.{rank + 1}/24 dev eth0"]
        made += [f"tc qdisc add dev port{rank} {bucket}", f"{inside} tc qdisc add dev eth0 {bucket}"]
    return made


def _world(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of four processes, behind the links of this namespace or on loopback."""
    slow = arguments.inside is not None
    for command in _commands(arguments.inside) if slow else []:
        subprocess.run(command.split(), check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0) if not slow else ("", 0))
        port = free.getsockname()[1]
    given = ["--address", "10.9.0.1" if slow else "127.0.0.1", "--port", f"{port}"]
    given += ["--tokens", f"{arguments.tokens}", "--rounds", f"{arguments.rounds}"]
    where = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0" if slow else "lo"}
    processes = [
        subprocess.Popen(
            [*(f"ip netns exec rank{rank}".split() if slow else []), *_again("--rank", f"{rank}", *given)],
            stdout=subprocess.PIPE,
            env=where,
            cwd=ROOT,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank has failed")
    found: list[dict[str, Any]] = json.loads(said[0])
    return found


def _again(*given: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.parallel_ranks", *given]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; return the rows."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--mbit", type=float, nargs="*", default=[], help="rates of links, in Mbit/s; none is loopback")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="does it run at all?")
    for name, kind in (("rank", int), ("address", str), ("port", int), ("inside", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank is not None:
        _rank(arguments)
        return []
    if arguments.quick:
        arguments.tokens, arguments.rounds = 1024, 1
    if arguments.inside is not None:
        print(json.dumps(_world(arguments)))
        return []
    rows = []
    for mbit in arguments.mbit or [None]:
        if mbit is None:
            found = _world(arguments)
        else:
            given = "--inside", f"{mbit}", "--tokens", f"{arguments.tokens}", "--rounds", f"{arguments.rounds}"
            command = ["unshare", "--net", "--mount", *_again(*given)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)
        rows += [{"mbit": mbit, **row} for row in found]
    _print(rows, arguments)
    return rows


def _print(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    title = f"{arguments.tokens:,} tokens, {RANKS} ranks, {HEADS} heads of {HEAD_DIM}, float32: forward and backward"
    table = Table(title=title)
    for head in ("link", "mask", "shards", "seconds (20 % to 80 %)", "predicted", "MiB to a rank", "on the wire"):
        table.add_column(head)
    for row in rows:
        took = f"{row['p50']:.3f} ({row['p20']:.3f} to {row['p80']:.3f})"
        moved = (f"{row[name] / 2**20:.2f}" for name in ("bytes", "wire"))
        link = "loopback" if row["mbit"] is None else f"{row['mbit']:g} Mbit/s"
        way = f"{row['way']} ({row['layout']})" if row["way"] == "plan" else row["way"]
        table.add_row(link, row["mask"], way, took, f"{row['predicted']:.3f}", *moved)
    console.print(table)
    for mbit, links in {row["mbit"]: row["links"] for row in rows}.items():
        flops, bandwidth, latency = links
        console.print(f"{mbit or 'loopback'}: {flops:.3g} operations/s, {bandwidth:.3g} bytes/s, {latency:.3g} s")


if __name__ == "__main__":
    main()
