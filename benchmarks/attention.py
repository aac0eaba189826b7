"""How fast is attention? Beside SDPA with the dense mask, and beside the speed of SDPA without a mask.

Run: python -m benchmarks.attention --cpu
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import runner, workloads
from benchmarks.runner import Contender, Row

TITLES = {
    "documents": "Causal documents of 100 to 2,000 tokens, and of 20 to 200 (short), B1 H8 D64: maskflash beside SDPA "
    "with the dense bool mask",
    "efficiency": "Forward efficiency, B1 H8 D64: time of SDPA without a mask x visited 128 x 128 tiles / our time",
}
DTYPES = ("float32", "bfloat16")
MEASURES = ("forward", "backward", "forward + backward")
DOCUMENT_TOKENS = 8192
LENGTHS = (1024, 2048, 4096, 8192)
LONG = 4096  # lengths from here on have a floor

SPEEDUP_FLOORS = {
    ("forward", "float32"): 10.0,
    ("forward", "bfloat16"): 6.0,
    ("forward + backward", "float32"): 5.0,
    ("forward + backward", "bfloat16"): 3.5,
}
EFFICIENCY_FLOORS = {
    ("causal", "float32"): 0.8,
    ("causal", "bfloat16"): 0.6,
    ("causal documents", "float32"): 0.8,
    ("causal documents", "bfloat16"): 0.6,
    ("causal window S/16", "float32"): 0.6,
    ("causal window S/16", "bfloat16"): 0.45,
}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = _options(argv)
    tokens = 512 if options.quick else DOCUMENT_TOKENS
    lengths = (256, 384) if options.quick else LENGTHS
    pairs = 1 if options.quick else options.pairs
    rows: list[Row] = []
    for dtype in DTYPES:
        documents = workloads.masks(tokens, options.seed)["causal documents"]
        rows += _documents("causal documents", documents, tokens, dtype, pairs, options.seed, SPEEDUP_FLOORS)
    short = workloads.short_documents(tokens, options.seed)
    rows += _documents("short causal documents", short, tokens, "float32", pairs, options.seed, {})
    for length in lengths:
        for dtype in DTYPES:
            rows += _efficiency(length, dtype, pairs, options.seed)
    return runner.finish("attention", TITLES, rows, options)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.arguments("Time attention beside torch's scaled_dot_product_attention (SDPA).")
    parser.add_argument("--cpu", action="store_true", required=True, help="on the CPU, this version's only device")
    return parser.parse_args(argv)


def _documents(
    case: str, mask: mf.Mask, tokens: int, dtype: str, pairs: int, seed: int, floors: Mapping[tuple[str, str], float]
) -> list[Row]:
    """Forward, backward and their sum, as in a training step; the mask is analysed in the uncounted first call."""
    work = workloads.inputs(tokens, getattr(torch, dtype), seed)
    dense = mask.dense(tokens, tokens).contiguous()
    ours, theirs = runner.alternate(
        step(mf.compile(mask, backend="cpu"), work),
        step(partial(scaled_dot_product_attention, attn_mask=dense), work),
        pairs,
    )
    return [
        runner.compared(
            "documents",
            case,
            tokens,
            measure,
            mine,
            sdpa,
            dtype=dtype,
            floor=floors.get((measure, dtype)),
        )
        for measure, mine, sdpa in zip(MEASURES, ours, theirs, strict=True)
    ]


def _efficiency(tokens: int, dtype: str, pairs: int, seed: int) -> list[Row]:
    """Forward alone, beside what dense attention would need for just the visited tiles."""
    work = workloads.inputs(tokens, getattr(torch, dtype), seed)
    rows = []
    for name, mask in workloads.masks(tokens, seed).items():
        attend = mf.compile(mask, backend="cpu")
        with torch.no_grad():
            (ours,), (full,) = runner.alternate(
                runner.timed(partial(attend, work.q, work.k, work.v)),
                runner.timed(partial(scaled_dot_product_attention, work.q, work.k, work.v)),
                pairs,
            )
        rows.append(
            runner.compared(
                "efficiency",
                name,
                tokens,
                "forward",
                ours,
                full,
                dtype=dtype,
                visited=workloads.visited(mask, tokens),
                floor=EFFICIENCY_FLOORS[name, dtype] if tokens >= LONG else None,
            )
        )
    return rows


def step(attend: Callable[..., Tensor], work: workloads.Inputs) -> Contender:
    """Forward and backward: the seconds of each, and of both."""

    def run() -> tuple[float, float, float]:
        start = time.perf_counter()
        out = attend(work.q, work.k, work.v)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(out, (work.q, work.k, work.v), work.dout)
        end = time.perf_counter()
        del gradients
        return middle - start, end - middle, end - start

    return run


if __name__ == "__main__":
    main()
