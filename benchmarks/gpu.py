"""How fast is attention on this GPU? Beside FlexAttention (compiled) and SDPA's flash and cuDNN backends.

Run: python -m benchmarks.gpu --folder benchmarks/results   (`make gpu` does, after the tests)

It stores after each case, under the device's name, so that what is cut short keeps what it had. Compiling FlexAttention
takes most of the time: `--tokens` and `--dim` choose cases, and each choice has a file of its own.

Every contender of a case runs in one process by turns, after the results of both were compared. Speeds are TFLOP/s on
the area that the mask leaves: 4 (forward) or 10 (backward) x visible pairs x query heads x head dim.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import runner, workloads
from benchmarks.runner import Row

TITLES = {
    "flex": "TFLOP/s of the visible area, bf16, maskflash beside compiled FlexAttention",
    "flash": "the same, beside SDPA's flash backend",
    "cudnn": "the same, beside SDPA's cuDNN backend",
}
PASSES = ("forward", "backward", "forward + backward")
WARM_UP, RUNS = 3, 10  # of one sample
QUESTION = "gpu attention"
DEVICE = "cuda"
MOST_DIFFERENT = 2.0**-7  # relative error of two bfloat16 results: that of one rounding
# On an H200, D128 bf16, 4k to 16k: TFLOP/s wanted of our own, and the ratio wanted over FlexAttention.
FLOORS = {
    "full": {"forward": 1.15, "forward + backward": 1.15},
    "causal": {"forward": 1.15, "forward + backward": 1.15},
    "causal window S/16": {"forward": 1.15, "forward + backward": 1.3},
    "causal document": {"forward": 1.15, "forward + backward": 1.3},
    "document": {"forward": 1.15, "forward + backward": 1.3},
    "prefix S/4": {"forward": 1.15, "forward + backward": 1.15},
}


@dataclass(frozen=True)
class Case:
    """One mask at one size, with the same mask as FlexAttention and SDPA take it."""

    name: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    mask: mf.Mask
    mask_mod: Callable[..., Tensor]
    causal: bool | None  # SDPA's is_causal; None where SDPA has no fast form of the mask

    def __str__(self) -> str:
        return f"{self.name}, {self.tokens} tokens, D{self.dim}, heads {self.heads}:{self.kv_heads}"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = _options(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no CUDA device")
    where = _conditions(options.quick)
    if options.folder and not options.json:
        options.json = options.folder / slug(torch.cuda.get_device_name()) / _name(options)
    start, rows = time.monotonic(), []
    for case in _cases(options):
        if time.monotonic() - start > 60 * options.minutes:
            print(f"out of time before {case}", file=sys.stderr)
            break
        try:
            rows += _measured(case, 1 if options.quick else options.pairs)
        except (RuntimeError, torch.cuda.OutOfMemoryError, mf.MaskflashError) as error:
            print(f"{case}: {_first_line(error)}", file=sys.stderr)
        if options.json:
            runner.store(options.json, QUESTION, where, rows)
        gc.collect()
        torch.cuda.empty_cache()
    return runner.finish(QUESTION, TITLES, rows, options, where)


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.arguments(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="start no case after this (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="store in a folder of this one, named after the device")
    parser.add_argument("--tokens", type=int, action="append", help="only this length; may be repeated")
    parser.add_argument("--dim", type=int, action="append", help="only this head dim; may be repeated")
    return parser.parse_args(argv)


def _name(options: argparse.Namespace) -> str:
    chosen = [str(tokens) for tokens in options.tokens or ()] + [f"d{dim}" for dim in options.dim or ()]
    return "-".join(["attention", *chosen]) + ".json"


def _conditions(quick: bool) -> dict[str, Any]:
    where = runner.conditions(quick)
    facts = torch.cuda.get_device_properties(0)
    where["device"] = f"{torch.cuda.get_device_name()}, {facts.multi_processor_count} multiprocessors"
    where["versions"] |= {"triton": version("triton"), "CUDA": torch.version.cuda}
    return where


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    sizes = (
        [(1024, 64, 4, 4)]
        if options.quick
        else [
            *((tokens, 128, 16, 16) for tokens in (8192, 4096, 16384)),
            (8192, 128, 32, 4),
            (8192, 64, 32, 32),
            *((tokens, 128, 16, 16) for tokens in (32768, 2048)),
            *((tokens, 64, 32, 32) for tokens in (4096, 16384)),
        ]
    )
    for tokens, dim, heads, kv_heads in sizes:
        if tokens in (options.tokens or [tokens]) and dim in (options.dim or [dim]):
            for name, mask, mask_mod, causal in _masks(tokens, options.seed):
                yield Case(name, tokens, heads, kv_heads, dim, mask, mask_mod, causal)


def _masks(tokens: int, seed: int) -> Iterator[tuple[str, mf.Mask, Callable[..., Tensor], bool | None]]:
    window, prefix = tokens // 16, tokens // 4
    lengths = workloads.document_lengths(tokens, seed)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int().to(DEVICE)
    by_id = mf.document(ids=ids)
    yield "full", mf.full(), lambda b, h, q, kv: q >= 0, False
    yield "causal", mf.causal(), lambda b, h, q, kv: q >= kv, True
    yield "causal document", mf.causal() & by_id, lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv]), None
    yield (
        "causal window S/16",
        mf.sliding_window(window),
        lambda b, h, q, kv: (q >= kv) & (q - kv <= window),
        None,
    )
    yield "document", by_id, lambda b, h, q, kv: ids[q] == ids[kv], None
    yield "prefix S/4", mf.prefix_lm(prefix), lambda b, h, q, kv: (q >= kv) | (kv < prefix), None


def _measured(case: Case, pairs: int) -> list[Row]:
    draw = torch.Generator(DEVICE).manual_seed(0)

    def tensor(heads: int) -> Tensor:
        size = (1, heads, case.tokens, case.dim)
        return torch.randn(size, generator=draw, device=DEVICE, dtype=torch.bfloat16).requires_grad_()

    q, k, v = tensor(case.heads), tensor(case.kv_heads), tensor(case.kv_heads)
    dout = torch.randn(q.shape, generator=draw, device=DEVICE, dtype=torch.bfloat16)
    attn = mf.compile(case.mask)
    ours = _contender(lambda: attn(q, k, v), (q, k, v), dout)
    visible = _visible_pairs(case)
    rows = []
    for name, forward in _others(case, q, k, v).items():
        try:
            difference = _difference(attn(q, k, v), forward())
            if not difference < MOST_DIFFERENT:
                sys.exit(f"{name} and maskflash compute different things: {case}: relative error {difference:.3g}")
            samples = runner.alternate(ours, _contender(forward, (q, k, v), dout), pairs)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:  # a backend that does not take the case
            print(f"{name}: no {case}: {_first_line(error)}", file=sys.stderr)
            continue
        for part, (measure, mine, theirs) in enumerate(zip(PASSES, *samples, strict=True)):
            work = (4, 10, 14)[part] * visible * case.heads * case.dim
            floor = FLOORS[case.name].get(measure) if name == "flex" and case.tokens >= 4096 else None
            rows.append(
                runner.compared(
                    name,
                    f"{case.name}, D{case.dim}, heads {case.heads}:{case.kv_heads}, {work / min(mine) / 1e12:.0f} "
                    f"against {work / min(theirs) / 1e12:.0f} TFLOP/s at best",
                    case.tokens,
                    measure,
                    mine,
                    theirs,
                    dtype="bfloat16",
                    floor=floor,
                )
            )
    return rows


def _others(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    grouped = case.heads != case.kv_heads

    @cache
    def block_mask() -> Any:
        return create_block_mask(case.mask_mod, None, None, case.tokens, case.tokens, device=DEVICE, _compile=True)

    others: dict[str, Callable[[], Tensor]] = {
        "flex": lambda: _flex()(q, k, v, block_mask=block_mask(), enable_gqa=grouped),
    }
    if case.causal is not None:

        def sdpa(backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=bool(case.causal), enable_gqa=grouped)

        others["flash"] = lambda: sdpa(SDPBackend.FLASH_ATTENTION)
        others["cudnn"] = lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    return others


@cache
def _flex() -> Any:
    torch._dynamo.config.cache_size_limit = 1000  # every mask compiles anew: past 8 it would fall back to dense
    return torch.compile(flex_attention, dynamic=False)


def _contender(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> runner.Contender:
    """Mean seconds of forward, of backward and of both, between device events over RUNS calls."""

    def run() -> tuple[float, float, float]:
        def backward() -> object:
            return torch.autograd.grad(out, inputs, dout, retain_graph=True)

        out = forward()
        for _ in range(WARM_UP):
            forward()
            backward()
        ahead, back = _seconds(forward), _seconds(backward)
        return ahead, back, ahead + back

    return run


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over theirs; NaN where either has one."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(RUNS):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / RUNS


def _visible_pairs(case: Case) -> int:
    """Visible pairs of one head, counted a band of rows at a time."""
    band = max(1, 2**26 // case.tokens)
    total = 0
    for first in range(0, case.tokens, band):
        rows = min(band, case.tokens - first)
        total += int(case.mask.dense(rows, case.tokens, q_offset=first, device=DEVICE).sum())
    return total


if __name__ == "__main__":
    main()
