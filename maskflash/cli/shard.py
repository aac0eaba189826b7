"""`maskflash shard`: masks and a number of ranks -> which tokens each rank holds, and what follows from it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from maskflash import parallel
from maskflash.cli import terminal
from maskflash.cli.masks import TOKENS, load
from maskflash.errors import ArgumentError


def run(args: Namespace) -> int:
    """Print the plan; draw it if asked to."""
    if args.png is not None and not Path(args.png).resolve().parent.is_dir():
        raise ArgumentError(f"--png: there is no folder {Path(args.png).parent}")
    layers = args.layers or [1] * len(args.mask)
    if len(layers) != len(args.mask):
        raise ArgumentError(f"--layers: got {len(layers)}, expected one for each of {len(args.mask)} masks")
    written = [load(text) for text in args.mask]
    masks = [one.mask for one in written]
    tokens = args.tokens or max(one.tokens or 0 for one in written) or TOKENS
    with terminal.working(f"planning {', '.join(map(str, masks))}"):
        plan = parallel.plan(
            list(zip(masks, layers, strict=True)),
            tokens,
            args.world,
            batch=args.batch,
            heads=args.heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            dtype=getattr(torch, args.dtype),
            chunk=args.chunk,
            links=args.links,
            head_ranks=args.head_ranks,
        )
    if args.png is not None:
        from maskflash import visualize

        with terminal.working(f"drawing {args.png}"):
            visualize.draw_shards(plan, masks[0]).savefig(args.png, format="png")
    if args.json:
        terminal.print_json(plan.to_dict() | ({} if args.png is None else {"png": args.png}))
        return 0
    console = terminal.console()
    console.print(plan.report())
    if args.png is not None:
        console.print(f"\nwrote {args.png}")
    return 0
