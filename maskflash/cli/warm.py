"""`maskflash warm`: masks, dtypes and head dims -> their kernels, compiled side by side into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.cli import terminal
from maskflash.cli.masks import subject
from maskflash.cli.parser import USUAL
from maskflash.errors import BackendError


@dataclass(frozen=True, slots=True)
class Share:
    """The kernels of one mask, dtype and head dim: what one process compiles, one after another."""

    args: Namespace
    dtype: str
    head_dim: int


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of a share: kernels that were compiled, and those that lay on disk."""

    mask: str
    dtype: str
    head_dim: int
    compiled: int
    found: int
    seconds: float


def run(args: Namespace) -> int:
    """Compile, and print a line for each share."""
    if reason := gpu.missing():
        raise BackendError(f"warm: {reason}")
    if not (args.arch or torch.cuda.is_available()):
        raise BackendError(
            "--arch: torch finds no CUDA device here to compile for; name one, such as --arch sm_90, or run this where "
            "the GPU is"
        )
    shares = [
        Share(Namespace(**{**vars(args), "mask": mask}), dtype, head_dim)
        for mask, dtype, head_dim in product(args.mask or USUAL, args.dtype or ["bfloat16"], args.head_dim or [64, 128])
    ]
    for share in shares:
        subject(share.args)  # wrong usage is told before anything starts
    done = []
    for warmed in _side_by_side(shares, args.processes or os.cpu_count() or 1):
        done.append(warmed)
        if not args.json:
            print(
                f"{warmed.mask}, {warmed.dtype}, head dim {warmed.head_dim}: {warmed.compiled} compiled, "
                f"{warmed.found} found, {warmed.seconds:.1f} s",
                flush=True,
            )
    target = args.arch or torch.cuda.get_device_name()
    if args.json:
        terminal.print_json({"target": target, "folder": gpu.kept_in(), "shares": [asdict(warmed) for warmed in done]})
    else:
        print(f"kernels for {target} are in {gpu.kept_in()}")
    return 0


def _side_by_side(shares: list[Share], processes: int) -> Iterator[Warmed]:
    """Compile shares in processes of their own, which end with them."""
    with multiprocessing.get_context("spawn").Pool(min(processes, len(shares)), _start) as pool:
        yield from pool.imap(_warm, shares)


def _start() -> None:
    """A worker's surroundings: one core, and kernels compiled even where others interpret them."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def _warm(share: Share) -> Warmed:
    args, start = share.args, time.perf_counter()
    if args.arch:
        gpu.compile_only(int(args.arch.removeprefix("sm_")))
    seen = subject(args)
    attn = mf.compile(seen.mask, score=seen.score, block_size=args.block_size or 128, backend="triton")
    with gpu.asked_for() as kernels:
        for kv_heads in {args.kv_heads} if args.kv_heads else {seen.heads, 1}:
            attn.warm(
                seen.q_len,
                seen.kv_len,
                head_dim=share.head_dim,
                dtype=getattr(torch, share.dtype),
                batch=seen.batch,
                heads=seen.heads,
                kv_heads=kv_heads,
                backward=not args.forward,
                device="cpu" if args.arch else "cuda",
            )
    found, seconds = sum(kernels), time.perf_counter() - start
    return Warmed(seen.mask.name, share.dtype, share.head_dim, len(kernels) - found, found, round(seconds, 2))
