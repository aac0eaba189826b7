"""How fast is attention on this GPU? Beside FlexAttention (compiled) and SDPA's flash and cuDNN backends.

Run: python -m benchmarks.gpu --folder benchmarks/results   (`make gpu-bench` does)

First every case is run once, in processes side by side, so that all kernels lie in the caches on disk: compiling
FlexAttention takes most of the time. Then cases are measured, those of most interest first, for as long as there is
time. It stores after each case, under the device's name, so that what is cut short keeps what it had. `--tokens` and
`--dim` choose cases, and each choice has a file of its own.

Every contender of a case runs in one process by turns, after the results of both were compared. Speeds are TFLOP/s on
the area that the mask leaves: 4 (forward) or 10 (backward) x visible pairs x query heads x head dim. Beside them stands
what a model of the machine code predicts of the kernels' loops over full and over partial tiles, where it is stored.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from benchmarks import device, runner, workloads
from benchmarks.runner import ROOT, Row
from maskflash.backends.triton.device import arch

TITLES = {
    "flex": "TFLOP/s of the visible area, bf16, maskflash beside compiled FlexAttention",
    "flash": "the same, beside SDPA's flash backend",
    "cudnn": "the same, beside SDPA's cuDNN backend",
    "hopper": "the same, beside Hopper's own kernels, forward and backward",
    "fp8": "the same, beside forward in 8 bits (the backward is the same)",
    "copy": "a step of decoding, bf16, beside a copy that moves as many bytes as its keys and values have",
}
STEP_FLOOR = 0.85  # of a copy's bandwidth
PASSES = ("forward", "backward", "forward + backward")
WARM_UP, RUNS = 3, 10  # of one sample
QUESTION = "gpu attention"
DRY = ("causal", "causal document")
AHEAD = 0.4  # of the time, at most, for compiling
MODEL = ROOT / "benchmarks/results/sass_model.json"
MOST_DIFFERENT = 2.0**-7  # relative error of two bfloat16 results: that of one rounding
MOST_IN_8_BITS = 0.1
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
    called, clock = device.name(options.dry), device.Clock(options.seconds)
    where = _conditions(options.dry, called)
    if options.folder and not options.json:
        options.json = options.folder / device.slug(called) / _name(options)
    cases = list(_cases(options))
    _compile_ahead(options, len(cases), AHEAD * options.seconds)
    rows = []
    if clock.left and not (options.tokens or options.dim):
        try:
            rows += _steps(options.pairs, options.dry)
        except (RuntimeError, torch.cuda.OutOfMemoryError, mf.MaskflashError) as error:
            print(f"steps of decoding: {device.first_line(error)}", file=sys.stderr)
    for case in cases:
        if not clock.left:
            print(f"out of time before {case}", file=sys.stderr)
            break
        try:
            rows += _measured(case, options.pairs, options.dry)
        except (RuntimeError, torch.cuda.OutOfMemoryError, mf.MaskflashError) as error:
            print(f"{case}: {device.first_line(error)}", file=sys.stderr)
        if options.json:
            runner.store(options.json, QUESTION, where, rows)
        gc.collect()
        torch.cuda.empty_cache()
    return runner.finish(QUESTION, TITLES, rows, options, where)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.arguments(__doc__.splitlines()[0])
    device.add_options(parser)
    parser.set_defaults(pairs=5)
    parser.add_argument("--tokens", type=int, action="append", help="only this length; may be repeated")
    parser.add_argument("--dim", type=int, action="append", help="only this head dim; may be repeated")
    options = parser.parse_args(argv)
    options.quick |= options.dry
    options.pairs = 1 if options.quick else options.pairs
    return options


def _name(options: argparse.Namespace) -> str:
    chosen = [str(tokens) for tokens in options.tokens or ()] + [f"d{dim}" for dim in options.dim or ()]
    return "-".join(["attention", *chosen]) + ".json"


def _conditions(dry: bool, called: str) -> dict[str, Any]:
    where = runner.conditions(dry)
    if not dry:
        facts = torch.cuda.get_device_properties(0)
        where["device"] = f"{called}, {facts.multi_processor_count} multiprocessors"
    where["versions"] |= {"triton": version("triton"), "CUDA": torch.version.cuda or "none"}
    return where


def _compile_ahead(options: argparse.Namespace, cases: int, seconds: float) -> None:
    """Run each case once in some process: Triton's and inductor's caches on disk have its kernels then."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes themselves are side by side
    start = time.monotonic()
    jobs = [(options, number) for number in range(cases)]
    done = sum(1 for _ in device.side_by_side(_run_once, jobs, seconds))
    print(f"{done} of {cases} cases compiled ahead in {time.monotonic() - start:.0f} s", file=sys.stderr)


def _run_once(job: tuple[argparse.Namespace, int]) -> None:
    options, number = job
    case = list(_cases(options))[number]
    q, k, v, dout = _inputs(case, options.dry)
    ours = mf.compile(case.mask, backend="triton")
    for forward in (lambda: ours(q, k, v), _others(case, q, k, v, options.dry)["flex"]):
        torch.autograd.grad(forward(), (q, k, v), dout)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    sizes = [
        (8192, 128, 16, 16),
        (8192, 64, 32, 32),
        (8192, 128, 32, 4),
        *((tokens, 128, 16, 16) for tokens in (16384, 4096)),
        *((tokens, 64, 32, 32) for tokens in (16384, 4096)),
        *((tokens, 128, 16, 16) for tokens in (32768, 2048)),
    ]
    if options.quick:
        sizes = [(64, 16, 2, 1)] if options.dry else [(1024, 64, 4, 4)]
    for tokens, dim, heads, kv_heads in sizes:
        if tokens in (options.tokens or [tokens]) and dim in (options.dim or [dim]):
            for name, *masks in _masks(tokens, options.seed, "cpu" if options.dry else "cuda"):
                if name in DRY or not options.dry:
                    yield Case(name, tokens, heads, kv_heads, dim, *masks)


def _masks(tokens: int, seed: int, on: str) -> Iterator[tuple[str, mf.Mask, Callable[..., Tensor], bool | None]]:
    window, prefix = tokens // 16, tokens // 4
    lengths = workloads.document_lengths(tokens, seed)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int().to(on)
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


def _inputs(case: Case, dry: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dO."""
    on, dtype = (
        ("cpu", torch.float16) if dry else ("cuda", torch.bfloat16)
    )  # interpreted products of bfloat16 are wrong
    draw = torch.Generator(on).manual_seed(0)

    def tensor(heads: int) -> Tensor:
        return torch.randn((1, heads, case.tokens, case.dim), generator=draw, device=on, dtype=dtype)

    q, k, v = (tensor(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
    return q, k, v, tensor(case.heads)


def _measured(case: Case, pairs: int, dry: bool) -> list[Row]:
    q, k, v, dout = _inputs(case, dry)
    attn = mf.compile(case.mask, backend="triton")
    ours = _contender(lambda: attn(q, k, v), (q, k, v), dout)
    visible = _visible_pairs(case, q.device)
    beside = predictions(arch(q.device), case.dim)
    rows = []
    for name, forward in _others(case, q, k, v, dry).items():
        try:
            difference = _difference(attn(q, k, v), forward())
            if not difference < (MOST_IN_8_BITS if name == "fp8" else MOST_DIFFERENT):
                sys.exit(f"{name} and maskflash compute different things: {case}: relative error {difference:.3g}")
            samples = runner.alternate(ours, _contender(forward, (q, k, v), dout), pairs)
        except (
            RuntimeError,
            torch.cuda.OutOfMemoryError,
        ) as error:  # who does not take the case
            print(f"{name}: no {case}: {device.first_line(error)}", file=sys.stderr)
            continue
        for part, (measure, mine, theirs) in enumerate(zip(PASSES, *samples, strict=True)):
            work = (4, 10, 14)[part] * visible * case.heads * case.dim
            floor = FLOORS[case.name].get(measure) if name == "flex" and case.tokens >= 4096 else None
            row = runner.compared(
                name,
                f"{case.name}, D{case.dim}, heads {case.heads}:{case.kv_heads}, {work / min(mine) / 1e12:.0f} "
                f"against {work / min(theirs) / 1e12:.0f} TFLOP/s at best",
                case.tokens,
                measure,
                mine,
                theirs,
                dtype=str(q.dtype).removeprefix("torch."),
                floor=floor,
            )
            rows.append(replace(row, predicted=beside.get(measure)))
    return rows


def _steps(pairs: int, dry: bool) -> list[Row]:
    """One query over a long cache, contiguous and in pages of 16."""
    tokens, heads, kv_heads, dim = (512, 2, 1, 16) if dry else (131072, 32, 8, 128)
    on, dtype = ("cpu", torch.float16) if dry else ("cuda", torch.bfloat16)
    q, *pools = (
        torch.randn(*shape, dim, device=on, dtype=dtype)
        for shape in ((1, heads, 1), (tokens // 16, 16, kv_heads), (tokens // 16, 16, kv_heads))
    )
    k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in pools)
    table = torch.randperm(tokens // 16, device=on)[None]
    pages = mf.PageTable(table, torch.tensor([tokens], device=on), 16)
    attn = mf.compile(mf.causal(), backend="triton")
    source, target = torch.empty(2, k.numel(), device=on, dtype=dtype).unbind()  # half is read, half is written

    def contender(run: Callable[[], object]) -> runner.Contender:
        def timed() -> tuple[float, ...]:
            for _ in range(WARM_UP):
                run()
            return (_seconds(run, q.device),)

        return timed

    rows = []
    for name, run in (
        ("contiguous", lambda: attn(q, k, v, q_offset=tokens - 1)),
        ("in shuffled pages of 16", lambda: attn.paged(q, *pools, pages)),
    ):
        (mine,), (theirs,) = runner.alternate(contender(run), contender(lambda: target.copy_(source)), pairs)
        what = f"{name}, D{dim}, heads {heads}:{kv_heads}, {2 * k.nbytes / min(mine) / 1e12:.2f} TB/s at best"
        kind = str(dtype).removeprefix("torch.")
        rows.append(runner.compared("copy", what, tokens, "forward", mine, theirs, dtype=kind, floor=STEP_FLOOR))
    return rows


def predictions(arch: int, head_dim: int, path: Path = MODEL) -> dict[str, str]:
    """What `sass_model` stored of the table's tiles, by measure: TFLOP/s over full tiles / over partial ones.

    Backward counts 10 products' worth of work, and its kernels compute 8 (dkdv) and 6 (dq).
    """
    if not path.exists():
        return {}
    speeds = {
        row["pass_name"]: [loop["tflops"] for loop in row["loops"]]
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if (row["arch"], row["bits"], row["head_dim"]) == (arch, 16, head_dim)
    }
    if set(speeds) < {"forward", "dkdv", "dq"}:
        return {}
    ahead = speeds["forward"]
    back = [10 / (8 / dkdv + 6 / dq) for dkdv, dq in zip(speeds["dkdv"], speeds["dq"], strict=True)]
    both = [14 / (4 / one + 10 / other) for one, other in zip(ahead, back, strict=True)]
    texts = (" / ".join(f"{speed:.0f}" for speed in each) + " TFLOP/s" for each in (ahead, back, both))
    return dict(zip(PASSES, texts, strict=True))


def _others(case: Case, q: Tensor, k: Tensor, v: Tensor, dry: bool) -> dict[str, Callable[[], Tensor]]:
    grouped = case.heads != case.kv_heads
    if dry:  # FlexAttention has no backward on a CPU, and SDPA not these backends
        pairs = case.mask.dense(case.tokens, case.tokens)
        return {"flex": lambda: scaled_dot_product_attention(q, k, v, attn_mask=pairs, enable_gqa=grouped)}

    @cache
    def block_mask() -> Any:
        return create_block_mask(case.mask_mod, None, None, case.tokens, case.tokens, device=q.device, _compile=True)

    others: dict[str, Callable[[], Tensor]] = {
        "flex": lambda: _flex()(q, k, v, block_mask=block_mask(), enable_gqa=grouped),
    }
    own = mf.compile(case.mask, backend="triton", kernels="hopper")
    in_8_bits = mf.compile(case.mask, backend="triton", precision="fp8")
    others |= {"hopper": lambda: own(q, k, v), "fp8": lambda: in_8_bits(q, k, v)}
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
        for _ in range(WARM_UP if dout.is_cuda else 0):
            forward()
            backward()
        ahead, back = (_seconds(part, dout.device) for part in (forward, backward))
        return ahead, back, ahead + back

    return run


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over theirs; NaN where either has one."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


def _seconds(function: Callable[[], object], on: torch.device) -> float:
    if on.type == "cpu":
        (seconds,) = runner.timed(function)()
        return seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(RUNS):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / RUNS


def _visible_pairs(case: Case, on: torch.device) -> int:
    """Visible pairs of one head, counted a band of rows at a time."""
    band = max(1, 2**26 // case.tokens)
    total = 0
    for first in range(0, case.tokens, band):
        rows = min(band, case.tokens - first)
        total += int(case.mask.dense(rows, case.tokens, q_offset=first, device=on).sum())
    return total


if __name__ == "__main__":
    main()
