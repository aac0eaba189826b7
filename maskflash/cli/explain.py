"""`maskflash explain`: a mask -> what was traced, how its tiles were decided, what would run, and move how much."""

from __future__ import annotations

from argparse import Namespace

import torch

import maskflash as mf
from maskflash.cli import terminal
from maskflash.cli.masks import device, subject
from maskflash.cli.traffic import predict


def run(args: Namespace) -> int:
    """Print the explanation."""
    seen = subject(args)
    itemsize = getattr(torch, args.dtype).itemsize
    with terminal.working(f"analysing {seen.mask}"):
        attn = mf.compile(seen.mask, score=seen.score, block_size=args.block_size or 128)
        explained = attn.explain(seen.q_len, seen.kv_len, batch=seen.batch, heads=seen.heads, device=device(args))
        moved = predict(
            explained.analysis.block_map,
            head_dim=args.head_dim,
            itemsize=itemsize,
            fast_bytes=args.fast_memory * 1024,
        )
        facts = explained.to_dict() if args.json else {}
    if args.json:
        traffic = {"head_dim": args.head_dim, "dtype": args.dtype, **moved.to_dict()}
        terminal.print_json({**facts, "batch": seen.batch, "heads": seen.heads, "traffic": traffic})
        return 0
    console = terminal.console()
    console.print(str(explained))
    console.print(f"  {'memory traffic':<18} {moved}")
    for line in (
        "predicted for a head's forward pass, after FlashAttention's theorem 2:",
        "q (d + dv) + s kv (d + dv) max(1, 2 q (d + dv) / M) elements, with",
        f"d = dv = {args.head_dim}, {args.dtype}, s = {moved.visited:.3f} (tiles visited),",
        f"M = {args.fast_memory} KiB of fast memory (--fast-memory; 192 is an A100's)",
    ):
        console.print(f"  {'':<18} {line}")
    return 0
