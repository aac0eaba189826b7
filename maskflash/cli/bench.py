"""`maskflash bench`: a mask -> time here, beside SDPA under the dense mask and, if asked, compiled FlexAttention.

All contenders run by turns in one process, after one call each that isn't counted; a ratio is that of a round. Before
anything is timed, one head of the output is held against dense float64.
"""

from __future__ import annotations

import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.cli import terminal
from maskflash.cli.masks import Subject, device, subject
from maskflash.demo.checks import Check
from maskflash.errors import ArgumentError
from maskflash.testing import Shape, error_budget, reference

_PAIRS: Final = 1 << 22  # of a head that are checked at a time
_DENSE: Final = 1 << 32  # pairs of a dense mask: 4 GiB

Inputs = tuple[Tensor, Tensor, Tensor]  # q, k and v
Forward = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Spread:
    """20th, 50th and 80th percentile of samples."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(samples: list[float]) -> Spread:
        """The percentiles, between neighbours by straight lines."""
        return Spread(*np.percentile(samples, (20, 50, 80)).tolist())


def run(args: Namespace) -> int:
    """Measure and print; 1 if the output is wrong."""
    seen = subject(args)
    place, dtype = device(args), getattr(torch, args.dtype)
    if args.flex and args.backward and place.type == "cpu":
        raise ArgumentError("--flex: FlexAttention has no backward on the CPU; drop --backward")
    if seen.q_len * seen.kv_len > _DENSE:
        raise ArgumentError(
            f"the dense mask that SDPA takes would have {seen.q_len:,} x {seen.kv_len:,} pairs, expected at most "
            f"{_DENSE:,}; use a smaller --q-len and --kv-len"
        )
    shape = Shape(seen.batch, seen.heads, seen.heads, seen.q_len, seen.kv_len, args.head_dim, args.head_dim)
    q, k, v = (x.requires_grad_(args.backward) for x in shape.tensors(dtype, device=str(place)))
    inputs = q, k, v
    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("analysing and checking", total=args.rounds + 2)
        attend = mf.compile(seen.mask, block_size=args.block_size or 128)
        check = _check(attend, seen, inputs)
        progress.update(bar, advance=1, description="making the dense mask")
        contenders = _contenders(attend, seen, inputs, args.flex)
        progress.update(bar, advance=1, description="timing by turns")
        samples = _by_turns(contenders, inputs, args.rounds, args.backward, lambda: progress.advance(bar))
    facts = _facts(seen, args, samples, check)
    if args.json:
        terminal.print_json(facts)
    else:
        _print(seen, args, facts)
    return 0 if check.passed else 1


def _contenders(attend: mf.Attention, seen: Subject, inputs: Inputs, flex: bool) -> dict[str, Forward]:
    q, k, v = inputs
    dense = seen.dense(q.device)
    found: dict[str, Forward] = {
        "maskflash": partial(attend, q, k, v),
        "SDPA, dense mask": partial(scaled_dot_product_attention, q, k, v, dense),
    }
    if flex:
        found["FlexAttention"] = _flex(seen, inputs)
    return found


def _flex(seen: Subject, inputs: Inputs) -> Forward:
    """FlexAttention, with the tiles and the mask function that `Mask.to_block_mask` gives it."""
    from torch.nn.attention.flex_attention import flex_attention

    device = inputs[0].device
    block_mask = seen.mask.to_block_mask(seen.q_len, seen.kv_len, batch=seen.batch, heads=seen.heads, device=device)
    return partial(torch.compile(flex_attention, dynamic=False), *inputs, block_mask=block_mask)


def _check(attend: mf.Attention, seen: Subject, inputs: Inputs) -> Check:
    """Hold the first head of the first batch row against dense float64, some rows at a time."""
    q, k, v = (x.detach() for x in inputs)
    found = attend(q, k, v)[:1, :1]
    q, k, v = q[:1, :1], k[:1, :1], v[:1, :1]
    rows = max(1, _PAIRS // seen.kv_len)
    bands = list(zip(q.split(rows, 2), seen.dense(q.device)[:1, :1].split(rows, 2), strict=True))

    def dense(dtype: torch.dtype) -> Tensor:
        keys, values, scale = k.to(dtype), v.to(dtype), q.shape[3] ** -0.5
        return torch.cat([reference(band.to(dtype), keys, values, mask, scale)[0] for band, mask in bands], dim=2)

    exact = dense(torch.float64)
    return Check("out", (found.double() - exact).abs().max().item(), error_budget(dense(q.dtype), exact))


def _by_turns(
    contenders: dict[str, Forward], inputs: Inputs, rounds: int, backward: bool, tick: Callable[[], None]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part of each contender, in rounds; who goes first changes from round to round."""
    grads = torch.randn_like(contenders["maskflash"]()) if backward else None
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for forward in contenders.values():
        _timed(forward, inputs, grads)
    for round_ in range(rounds):
        for name in sorted(contenders, reverse=round_ % 2 == 1):
            for part, seconds in _timed(contenders[name], inputs, grads).items():
                samples[name].setdefault(part, []).append(seconds)
        tick()
    return samples


def _timed(forward: Forward, inputs: Inputs, grads: Tensor | None) -> dict[str, float]:
    start = _now(inputs[0])
    out = forward()
    middle = _now(inputs[0])
    if grads is None:
        return {"forward": middle - start}
    torch.autograd.grad(out, inputs, grads)
    end = _now(inputs[0])
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def _now(x: Tensor) -> float:
    """Seconds, when all that was asked of the device of x is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _facts(seen: Subject, args: Namespace, samples: dict[str, dict[str, list[float]]], check: Check) -> dict[str, Any]:
    ours = samples["maskflash"]
    return {
        **seen.to_dict(),
        "head_dim": args.head_dim,
        "dtype": args.dtype,
        "device": _device(args.device),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "versions": {"maskflash": mf.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "check": check.to_dict(),
        "seconds": {
            name: {part: asdict(Spread.of(times)) for part, times in parts.items()} for name, parts in samples.items()
        },
        "ratios": {
            name: {
                part: asdict(Spread.of([theirs / mine for theirs, mine in zip(times, ours[part], strict=True)]))
                for part, times in parts.items()
            }
            for name, parts in samples.items()
            if name != "maskflash"
        },
    }


def _print(seen: Subject, args: Namespace, facts: dict[str, Any]) -> None:
    out = terminal.console()
    out.print(
        f"{seen.mask}: {seen.q_len:,} queries x {seen.kv_len:,} keys\n"
        f"batch {seen.batch}, {seen.heads} heads of {args.head_dim}, {args.dtype}; {facts['threads']} threads of "
        f"{facts['device']}\nmedians of {args.rounds} rounds, by turns (20th to 80th percentile)\n"
    )
    out.print(f"{'':<18}{'':<10}{'ms':>25}{'over maskflash':>25}")
    for name, parts in facts["seconds"].items():
        for row, (part, spread) in enumerate(parts.items()):
            ratio = facts["ratios"].get(name, {}).get(part)
            took = _spread({key: 1e3 * value for key, value in spread.items()})
            line = f"{'' if row else name:<18}{part:<10}{took:>25}{_spread(ratio, 'x') if ratio else '':>25}"
            out.print(line.rstrip())
    check = facts["check"]
    out.print(
        f"\nhead 0 against dense float64: error {check['error']:.2g}, {'within' if check['passed'] else 'NOT within'} "
        f"its budget of {check['budget']:.2g}",
        style=None if check["passed"] else "bold red",
    )


def _spread(spread: dict[str, float], unit: str = "") -> str:
    return f"{spread['p50']:,.2f}{unit} ({spread['p20']:,.2f} to {spread['p80']:,.2f})"


def _device(name: str) -> str:
    if torch.device(name).type == "cuda":
        return torch.cuda.get_device_name(name)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # Linux; elsewhere the platform's own name
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
